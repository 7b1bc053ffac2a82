// SPDX-License-Identifier: Apache-2.0
//
// dilated_conv2d and its gradients for torch. One function per op checks the arguments and derives
// the sizes, symbolically, for CPU, CUDA and Meta alike. The CPU computes with ATen, or csrc/cpu
// where that is faster; CUDA with csrc/cuda.
#include "dilseg/dilated_conv2d.h"

#include "cpu/dilated_conv2d_select.h"
#include "cpu/dilated_conv2d_winograd.h"
#include "cuda/dilated_conv2d/describe.h"
#include "ops/checks.h"
#include "ops/common.h"
#include "ops/dilated_conv2d_plan.h"
#include "ops/result.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace dilseg::ops {
namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

constexpr const char* kForward = "dilated_conv2d";
constexpr const char* kGradInput = "dilated_conv2d_grad_input";
constexpr const char* kGradWeight = "dilated_conv2d_grad_weight";
constexpr const char* kPlan = "dilated_conv2d_plan";

// ---- arguments and sizes ------------------------------------------------------------------------

// The arguments that are plain numbers in every op.
struct Geometry {
  std::array<int64_t, 2> stride;
  std::array<int64_t, 4> padding;  // top, bottom, left, right
  std::array<int64_t, 2> dilation;
  int64_t groups;
};

// Sizes of a whole problem; an op is given some and derives the rest.
struct Sizes {
  SymInt n, c_in, h_in, w_in;
  SymInt c_out, h_out, w_out;
  SymInt k_h, k_w;
};

template <size_t kLength>
std::array<int64_t, kLength> check_numbers(const char* op,
                                           const char* name,
                                           IntArrayRef values,
                                           int64_t smallest) {
  DILSEG_CHECK_VALUE(op,
                     values.size() == kLength,
                     format("expected {} of {} numbers, but got {}.", name, kLength, values));
  std::array<int64_t, kLength> result;
  std::copy(values.begin(), values.end(), result.begin());
  // The upper bound keeps every product of two of these numbers within 64 bits.
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  DILSEG_CHECK_VALUE(
      op,
      std::ranges::all_of(result, [&](int64_t v) { return v >= smallest && v <= kLargest; }),
      format("expected {} from {} to {}, but got {}.{}",
             name,
             smallest,
             kLargest,
             values,
             smallest == 0 ? " Crop the input instead of padding it by a negative size." : ""));
  return result;
}

Geometry check_geometry(
    const char* op, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  DILSEG_CHECK_VALUE(op, groups >= 1, format("expected groups of at least 1, but got {}.", groups));
  return {check_numbers<2>(op, "stride", stride, 1),
          check_numbers<4>(op, "padding [top, bottom, left, right]", padding, 0),
          check_numbers<2>(op, "dilation", dilation, 1),
          groups};
}

// Two numbers that may be symbolic: a height and a width.
void check_pair(const char* op, const char* name, SymIntArrayRef values) {
  DILSEG_CHECK_VALUE(
      op, values.size() == 2, format("expected {} of 2 numbers, but got {}.", name, values));
  DILSEG_CHECK_VALUE(op,
                     values[0].sym_ge(0).sym_and(values[1].sym_ge(0)),
                     format("expected {} of at least 0, but got {}.", name, values));
}

// `channels` is called `symbol` and belongs to the tensor `name`.
void check_groups_divide(const char* op,
                         const SymInt& channels,
                         const char* symbol,
                         const char* name,
                         const Tensor& tensor,
                         int64_t groups) {
  DILSEG_CHECK_VALUE(
      op,
      (channels % groups).sym_eq(0),
      format("expected {} divisible by groups, but got {}={} with groups={} ({} of shape "
             "{}). Choose groups among the divisors of {}.",
             symbol,
             symbol,
             channels,
             groups,
             name,
             tensor.sym_sizes(),
             symbol));
}

// Derives h_out and w_out after checking that the dilated kernel fits into the padded map.
void derive_output_size(const char* op, const Geometry& g, Sizes& s) {
  DILSEG_CHECK_VALUE(
      op,
      s.k_h.sym_ge(1).sym_and(s.k_w.sym_ge(1)),
      format("expected a kernel [k_h, k_w] of at least 1x1, but got {}x{}.", s.k_h, s.k_w));
  const SymInt window_h = (s.k_h - 1) * g.dilation[0] + 1;
  const SymInt window_w = (s.k_w - 1) * g.dilation[1] + 1;
  const SymInt padded_h = s.h_in + g.padding[0] + g.padding[1];
  const SymInt padded_w = s.w_in + g.padding[2] + g.padding[3];
  const auto smallest_padding = [](const SymInt& window, const SymInt& size) {
    return ((window - size).max(0) + 1) / 2;
  };
  DILSEG_CHECK_VALUE(
      op,
      padded_h.sym_ge(window_h).sym_and(padded_w.sym_ge(window_w)),
      format("expected input of padded size at least the effective kernel, {}x{} (kernel "
             "{}x{}, dilation {}x{}), but got padded size {}x{} (input {}x{}, padding top "
             "{}, bottom {}, left {}, right {}). The smallest padding on each side that "
             "works is ({}, {}).",
             window_h,
             window_w,
             s.k_h,
             s.k_w,
             g.dilation[0],
             g.dilation[1],
             padded_h,
             padded_w,
             s.h_in,
             s.w_in,
             g.padding[0],
             g.padding[1],
             g.padding[2],
             g.padding[3],
             smallest_padding(window_h, s.h_in),
             smallest_padding(window_w, s.w_in)));
  s.h_out = (padded_h - window_h) / g.stride[0] + 1;
  s.w_out = (padded_w - window_w) / g.stride[1] + 1;
}

void check_grad_output(const char* op, const Tensor& grad_output, const Sizes& s) {
  const std::array<SymInt, 4> wanted = {s.n, s.c_out, s.h_out, s.w_out};
  const SymIntArrayRef sizes = grad_output.sym_sizes();
  for (size_t axis = 0; axis < wanted.size(); ++axis) {
    DILSEG_CHECK_VALUE(
        op,
        sizes[axis].sym_eq(wanted[axis]),
        format("expected grad_output of shape [n, c_out, h_out, w_out] = {}, but got {}. Pass "
               "the sizes, stride, padding, dilation and groups of the forward call.",
               SymIntArrayRef(wanted),
               sizes));
  }
}

bool check_activation(const char* op, std::optional<std::string_view> activation) {
  DILSEG_CHECK_VALUE(
      op,
      !activation.has_value() || *activation == "relu",
      format("expected activation None or \"relu\", but got \"{}\". Apply other activations "
             "to the output.",
             *activation));
  return activation.has_value();
}

Sizes check_forward(const char* op,
                    const Tensor& input,
                    const Tensor& weight,
                    const std::optional<Tensor>& bias,
                    const Geometry& g) {
  check_rank(op, "input", input, 4, "[n, c_in, h_in, w_in]");
  check_rank(op, "weight", weight, 4, "[c_out, c_in/groups, k_h, k_w]");
  check_float(op, "input", input);
  check_same_dtype(op, "input", input, "weight", weight);
  check_same_device(op, "input", input, "weight", weight);

  Sizes s;
  s.n = input.sym_size(0);
  s.c_in = input.sym_size(1);
  s.h_in = input.sym_size(2);
  s.w_in = input.sym_size(3);
  s.c_out = weight.sym_size(0);
  s.k_h = weight.sym_size(2);
  s.k_w = weight.sym_size(3);
  check_groups_divide(op, s.c_in, "c_in", "input", input, g.groups);
  check_groups_divide(op, s.c_out, "c_out", "weight", weight, g.groups);
  DILSEG_CHECK_VALUE(
      op,
      weight.sym_size(1).sym_eq(s.c_in / g.groups),
      format("expected weight of shape [c_out, c_in/groups, k_h, k_w] = [{}, {}/{}, {}, "
             "{}], but got weight of shape {} for input of shape {} with groups={}. Give "
             "the input {} channels or the weight {}.",
             s.c_out,
             s.c_in,
             g.groups,
             s.k_h,
             s.k_w,
             weight.sym_sizes(),
             input.sym_sizes(),
             g.groups,
             weight.sym_size(1) * g.groups,
             s.c_in / g.groups));
  if (bias.has_value()) {
    DILSEG_CHECK_VALUE(
        op,
        bias->dim() == 1 && holds(bias->sym_size(0).sym_eq(s.c_out)),
        format("expected bias of shape [c_out] = [{}], but got {}.", s.c_out, bias->sym_sizes()));
    check_same_dtype(op, "input", input, "bias", *bias);
    check_same_device(op, "input", input, "bias", *bias);
  }
  derive_output_size(op, g, s);
  return s;
}

Sizes check_grad_input(const Tensor& grad_output,
                       const Tensor& weight,
                       SymIntArrayRef input_size,
                       const Geometry& g) {
  const char* op = kGradInput;
  check_rank(op, "grad_output", grad_output, 4, "[n, c_out, h_out, w_out]");
  check_rank(op, "weight", weight, 4, "[c_out, c_in/groups, k_h, k_w]");
  check_float(op, "grad_output", grad_output);
  check_same_dtype(op, "grad_output", grad_output, "weight", weight);
  check_same_device(op, "grad_output", grad_output, "weight", weight);
  check_pair(op, "input_size [h_in, w_in]", input_size);

  Sizes s;
  s.n = grad_output.sym_size(0);
  s.c_in = weight.sym_size(1) * g.groups;
  s.h_in = input_size[0];
  s.w_in = input_size[1];
  s.c_out = weight.sym_size(0);
  s.k_h = weight.sym_size(2);
  s.k_w = weight.sym_size(3);
  check_groups_divide(op, s.c_out, "c_out", "weight", weight, g.groups);
  derive_output_size(op, g, s);
  check_grad_output(op, grad_output, s);
  return s;
}

Sizes check_grad_weight(const Tensor& grad_output,
                        const Tensor& input,
                        SymIntArrayRef kernel_size,
                        const Geometry& g) {
  const char* op = kGradWeight;
  check_rank(op, "grad_output", grad_output, 4, "[n, c_out, h_out, w_out]");
  check_rank(op, "input", input, 4, "[n, c_in, h_in, w_in]");
  check_float(op, "input", input);
  check_same_dtype(op, "input", input, "grad_output", grad_output);
  check_same_device(op, "input", input, "grad_output", grad_output);
  check_pair(op, "kernel_size [k_h, k_w]", kernel_size);

  Sizes s;
  s.n = input.sym_size(0);
  s.c_in = input.sym_size(1);
  s.h_in = input.sym_size(2);
  s.w_in = input.sym_size(3);
  s.c_out = grad_output.sym_size(1);
  s.k_h = kernel_size[0];
  s.k_w = kernel_size[1];
  check_groups_divide(op, s.c_in, "c_in", "input", input, g.groups);
  check_groups_divide(op, s.c_out, "c_out", "grad_output", grad_output, g.groups);
  derive_output_size(op, g, s);
  check_grad_output(op, grad_output, s);
  return s;
}

// ---- results ------------------------------------------------------------------------------------

// New tensors follow the memory format of the tensor they answer to.
Tensor empty_like_format(const Tensor& like, std::array<SymInt, 4> sizes) {
  return empty_result(sizes, like.options(), like.suggest_memory_format());
}

Tensor empty_output(const Sizes& s, const Tensor& input) {
  return empty_like_format(input, {s.n, s.c_out, s.h_out, s.w_out});
}

Tensor empty_grad_input(const Sizes& s, const Tensor& grad_output) {
  return empty_like_format(grad_output, {s.n, s.c_in, s.h_in, s.w_in});
}

std::tuple<Tensor, Tensor> empty_grad_weight(const Sizes& s,
                                             const Geometry& g,
                                             const Tensor& input,
                                             bool bias) {
  return {empty_like_format(input, {s.c_out, s.c_in / g.groups, s.k_h, s.k_w}),
          at::empty_symint({bias ? s.c_out : SymInt(0)}, input.options())};
}

// ---- plans --------------------------------------------------------------------------------------

DilatedConv2dShape plain_shape(const Geometry& g, const Sizes& s) {
  return {s.n.expect_int(),
          s.c_in.expect_int(),
          s.h_in.expect_int(),
          s.w_in.expect_int(),
          s.c_out.expect_int(),
          s.h_out.expect_int(),
          s.w_out.expect_int(),
          s.k_h.expect_int(),
          s.k_w.expect_int(),
          g.stride[0],
          g.stride[1],
          g.padding[0],
          g.padding[2],
          g.dilation[0],
          g.dilation[1],
          g.groups};
}

DilatedConv2dShape to_shape(const char* op, const Geometry& g, const Sizes& s) {
  const DilatedConv2dShape shape = plain_shape(g, s);
  DILSEG_CHECK_VALUE(
      op,
      cuda::fits_dilated_conv2d(shape),
      format("expected channels and padded coordinates below 2^31 on CUDA, but got c_in={}, "
             "c_out={}, input {}x{}, padding {}, stride {}, kernel {}x{}, dilation {}. "
             "Split the map into tiles.",
             s.c_in,
             s.c_out,
             s.h_in,
             s.w_in,
             IntArrayRef(g.padding),
             IntArrayRef(g.stride),
             s.k_h,
             s.k_w,
             IntArrayRef(g.dilation)));
  return shape;
}

// Addresses count for their alignment only; a tensor without memory is taken as aligned.
const void* address(const Tensor& t) { return t.is_meta() ? nullptr : t.const_data_ptr(); }

cuda::Gpu check_gpu(int64_t arch, int64_t multiprocessors) {
  DILSEG_CHECK_VALUE(
      kPlan,
      arch >= 10 && arch < 1000,
      format("expected arch from 10 to 999, ten times the compute capability, but got {}.", arch));
  DILSEG_CHECK_VALUE(
      kPlan,
      multiprocessors >= 1 && multiprocessors < 65536,
      format("expected multiprocessors from 1 to 65535, but got {}.", multiprocessors));
  const int number = static_cast<int>(arch);
  return {number, static_cast<int>(multiprocessors), cuda::shared_bytes_of(number), number == 90};
}

// What runs on such a GPU: the kernels, words, bytes of workspace, modelled microseconds.
std::tuple<std::string, std::string, int64_t, double> dilated_conv2d_plan(
    const Tensor& input,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    IntArrayRef stride,
    IntArrayRef padding,
    IntArrayRef dilation,
    int64_t groups,
    std::string_view operation,
    int64_t arch,
    int64_t multiprocessors) {
  const Geometry g = check_geometry(kPlan, stride, padding, dilation, groups);
  const Sizes s = check_forward(kPlan, input, weight, bias, g);
  const cuda::Gpu gpu = check_gpu(arch, multiprocessors);
  const DilatedConv2dShape shape = to_shape(kPlan, g, s);
  // Results, and grad_output, which is taken to come as the forward pass returns its output.
  const auto dense = [&](std::array<SymInt, 4> sizes) {
    return to_strides(
        at::empty_symint(sizes, input.options().device(at::kMeta), input.suggest_memory_format()));
  };
  const Strides4 output_strides = dense({s.n, s.c_out, s.h_out, s.w_out});
  const Dtype dtype = to_dtype(input.scalar_type());
  int wanted = 0;  // a place to name; its address does not count
  const auto plan = [&]() {
    if (operation == "grad_input") {
      return plan_now(
          DilatedConv2dGradInputParams{.shape = shape,
                                       .dtype = dtype,
                                       .grad_output = nullptr,
                                       .weight = address(weight),
                                       .grad_input = nullptr,
                                       .grad_output_strides = output_strides,
                                       .weight_strides = to_strides(weight),
                                       .grad_input_strides = dense({s.n, s.c_in, s.h_in, s.w_in}),
                                       .precision = float32_precision(),
                                       .workspace = nullptr},
          gpu);
    }
    if (operation == "grad_weight") {
      return plan_now(
          DilatedConv2dGradWeightParams{
              .shape = shape,
              .dtype = dtype,
              .grad_output = nullptr,
              .input = address(input),
              .grad_weight = nullptr,
              .grad_bias = bias.has_value() ? &wanted : nullptr,
              .grad_output_strides = output_strides,
              .input_strides = to_strides(input),
              .grad_weight_strides = dense({s.c_out, s.c_in / g.groups, s.k_h, s.k_w}),
              .precision = float32_precision(),
              .workspace = nullptr},
          gpu);
    }
    DILSEG_CHECK_VALUE(kPlan,
                       operation == "forward",
                       format("expected operation \"forward\", \"grad_input\" or "
                              "\"grad_weight\", but got \"{}\".",
                              operation));
    return plan_now(DilatedConv2dParams{.shape = shape,
                                        .dtype = dtype,
                                        .input = address(input),
                                        .weight = address(weight),
                                        .bias = nullptr,
                                        .output = nullptr,
                                        .input_strides = to_strides(input),
                                        .weight_strides = to_strides(weight),
                                        .output_strides = output_strides,
                                        .relu = false,
                                        .precision = float32_precision(),
                                        .workspace = nullptr},
                    gpu);
  }();
  return {kKernels[static_cast<size_t>(plan.kernel)],
          cuda::describe(plan),
          static_cast<int64_t>(plan.workspace_bytes),
          plan.microseconds};
}

// ---- Meta ---------------------------------------------------------------------------------------

Tensor dilated_conv2d_meta(const Tensor& input,
                           const Tensor& weight,
                           const std::optional<Tensor>& bias,
                           IntArrayRef stride,
                           IntArrayRef padding,
                           IntArrayRef dilation,
                           int64_t groups,
                           std::optional<std::string_view> activation) {
  const Geometry g = check_geometry(kForward, stride, padding, dilation, groups);
  const Sizes s = check_forward(kForward, input, weight, bias, g);
  check_activation(kForward, activation);
  return empty_output(s, input);
}

Tensor dilated_conv2d_grad_input_meta(const Tensor& grad_output,
                                      const Tensor& weight,
                                      SymIntArrayRef input_size,
                                      IntArrayRef stride,
                                      IntArrayRef padding,
                                      IntArrayRef dilation,
                                      int64_t groups) {
  const Geometry g = check_geometry(kGradInput, stride, padding, dilation, groups);
  return empty_grad_input(check_grad_input(grad_output, weight, input_size, g), grad_output);
}

std::tuple<Tensor, Tensor> dilated_conv2d_grad_weight_meta(const Tensor& grad_output,
                                                           const Tensor& input,
                                                           SymIntArrayRef kernel_size,
                                                           IntArrayRef stride,
                                                           IntArrayRef padding,
                                                           IntArrayRef dilation,
                                                           int64_t groups,
                                                           bool bias) {
  const Geometry g = check_geometry(kGradWeight, stride, padding, dilation, groups);
  return empty_grad_weight(check_grad_weight(grad_output, input, kernel_size, g), g, input, bias);
}

// ---- CPU ----------------------------------------------------------------------------------------

// Half types are computed in float and rounded once: ATen's own half convolutions exist only for
// some shapes and machines, and not all of them add in float.
at::ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// ATen pads both sides of an axis alike: `both` is what the sides share, the rest goes on
// beforehand.
struct PaddingSplit {
  explicit PaddingSplit(const std::array<int64_t, 4>& p)
      : both{std::min(p[0], p[1]), std::min(p[2], p[3])},
        top(p[0] - both[0]),
        bottom(p[1] - both[0]),
        left(p[2] - both[1]),
        right(p[3] - both[1]) {}

  bool even() const { return top + bottom + left + right == 0; }
  Tensor pad(const Tensor& t) const {
    return even() ? t : at::constant_pad_nd(t, {left, right, top, bottom});
  }
  std::array<int64_t, 4> padded(IntArrayRef sizes) const {
    return {sizes[0], sizes[1], sizes[2] + top + bottom, sizes[3] + left + right};
  }
  Tensor crop(const Tensor& t) const {
    return even() ? t : t.slice(2, top, t.size(2) - bottom).slice(3, left, t.size(3) - right);
  }

  std::array<int64_t, 2> both;
  int64_t top, bottom, left, right;
};

constexpr std::array<int64_t, 2> kNoOutputPadding = {0, 0};

// For an argument of at::convolution_backward of which only size, dtype and memory format count.
Tensor stand_in(IntArrayRef sizes, const Tensor& like, at::ScalarType type) {
  if (sizes == like.sizes() && type == like.scalar_type()) {
    return like;
  }
  return at::empty(sizes, like.options().dtype(type), like.suggest_memory_format());
}

// ATen refuses some convolutions without elements, which here are empty sums: zero.
bool any_empty(const Tensor& a, const Tensor& b) { return a.numel() == 0 || b.numel() == 0; }

// `computed` in the dtype and with exactly the strides of the empty tensor `wanted`: what an op
// returns must not depend on the path that ATen took, also not in the strides of axes of size 1.
Tensor finish(const Tensor& computed, const Tensor& wanted) {
  if (computed.scalar_type() == wanted.scalar_type() && computed.strides() == wanted.strides()) {
    return computed;
  }
  return wanted.copy_(computed);
}

// Rows of channels_last are ATen's: there oneDNN is as fast as memory.
bool has_rows(const Tensor& t) { return t.suggest_memory_format() == at::MemoryFormat::Contiguous; }

// Tiles that are multiplied at once: their matrices stay in the last-level cache.
constexpr int64_t kWinogradTiles = 512;

// False where ATen has to compute the result, since one of ours is not finite.
bool run_winograd(const cpu::WinogradParams& p) {
  const ParallelFor threads = torch_threads();
  const cpu::WinogradPlan plan = cpu::winograd_plan(p);
  const int64_t pieces = plan.pieces(p.n);
  const int64_t chunk = std::clamp<int64_t>(kWinogradTiles / plan.tiles(), 1, pieces);
  const int64_t row = chunk * plan.tiles() + cpu::kWinogradSlack;
  // A power of two between the 16 matrices would map them to the same lines of a cache.
  const int64_t matrix = p.c_in * row + 32;
  const Tensor u = empty_result({16, p.c_out, p.c_in}, at::kFloat);
  const Tensor v = empty_result({16 * matrix}, at::kFloat);
  const Tensor m = empty_result({16 * p.c_out * chunk * plan.tiles()}, at::kFloat);
  cpu::winograd_weight(p, u.mutable_data_ptr<float>(), threads);
  for (int64_t first = 0; first < pieces; first += chunk) {
    const int64_t count = std::min(chunk, pieces - first);
    const int64_t tiles = count * plan.tiles();
    cpu::winograd_input(p, plan, first, count, {v.mutable_data_ptr<float>(), matrix, row}, threads);
    Tensor product = m.as_strided({16, p.c_out, tiles}, {p.c_out * tiles, tiles, 1});
    at::bmm_out(product, u, v.as_strided({16, p.c_in, tiles}, {matrix, row, 1}));
    const cpu::WinogradMatrix result = {m.mutable_data_ptr<float>(), p.c_out * tiles, tiles};
    if (!cpu::winograd_output(p, plan, first, count, result, threads)) {
      return false;
    }
  }
  return true;
}

// Whether Winograd may compute in the place of ATen: in rows, in float, and with products of
// matrices that are as exact as a convolution's.
bool allows_winograd(const Tensor& like) {
  if (like.scalar_type() == at::kDouble || !has_rows(like)) {
    return false;
  }
  // Of the CPU alone: torch refuses to name one precision where its backends differ.
  const at::Float32Precision products =
      at::globalContext().float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::MATMUL);
  return products == at::Float32Precision::IEEE || products == at::Float32Precision::NONE;
}

Tensor dilated_conv2d_cpu(const Tensor& input,
                          const Tensor& weight,
                          const std::optional<Tensor>& bias,
                          IntArrayRef stride,
                          IntArrayRef padding,
                          IntArrayRef dilation,
                          int64_t groups,
                          std::optional<std::string_view> activation) {
  const Geometry g = check_geometry(kForward, stride, padding, dilation, groups);
  const Sizes s = check_forward(kForward, input, weight, bias, g);
  const bool relu = check_activation(kForward, activation);
  const BackendScope scope;
  const Tensor output = empty_output(s, input);
  const DilatedConv2dShape shape = plain_shape(g, s);
  if (!any_empty(input, weight) && has_rows(input) &&
      cpu::prefers_depthwise(shape, to_dtype(input.scalar_type()))) {
    const Tensor dense_bias = bias.has_value() ? bias->contiguous() : Tensor();
    const bool done = cpu::dilated_conv2d_depthwise(
        {.shape = shape,
         .dtype = to_dtype(input.scalar_type()),
         .input = input.const_data_ptr(),
         .weight = weight.const_data_ptr(),
         .bias = dense_bias.defined() ? dense_bias.const_data_ptr() : nullptr,
         .output = output.mutable_data_ptr(),
         .input_strides = to_strides(input),
         .weight_strides = to_strides(weight),
         .output_strides = to_strides(output),
         .relu = relu,
         .precision = Float32Precision::kIeee,
         .workspace = nullptr},
        torch_threads());
    if (done) {
      return output;
    }
  }
  if (!any_empty(input, weight) && allows_winograd(input) &&
      cpu::prefers_winograd(shape, cpu::instruction_set())) {
    const Tensor source = input.to(at::kFloat);
    const Tensor factor = weight.to(at::kFloat);
    const Tensor added = bias.has_value() ? bias->to(at::kFloat).contiguous() : Tensor();
    const Tensor result = empty_output(s, source);
    const bool done =
        run_winograd({.n = shape.n,
                      .c_in = shape.c_in,
                      .h_in = shape.h_in,
                      .w_in = shape.w_in,
                      .c_out = shape.c_out,
                      .h_out = shape.h_out,
                      .w_out = shape.w_out,
                      .pad_top = shape.pad_top,
                      .pad_left = shape.pad_left,
                      .dil_h = shape.dil_h,
                      .dil_w = shape.dil_w,
                      .source = source.const_data_ptr<float>(),
                      .weight = factor.const_data_ptr<float>(),
                      .bias = added.defined() ? added.const_data_ptr<float>() : nullptr,
                      .result = result.mutable_data_ptr<float>(),
                      .source_strides = to_strides(source),
                      .weight_strides = to_strides(factor),
                      .result_strides = to_strides(result),
                      .relu = relu});
    if (done) {
      return finish(result, output);
    }
  }
  Tensor computed;
  if (any_empty(input, weight)) {
    computed = bias.has_value() ? output.copy_(bias->view({1, -1, 1, 1})) : output.zero_();
  } else {
    const at::ScalarType type = compute_type(input);
    const PaddingSplit split(g.padding);
    const bool turn = has_rows(input) && cpu::prefers_channels_last(shape, cpu::instruction_set());
    const auto format = turn ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Preserve;
    computed = at::convolution(split.pad(input.to(type, false, false, format)),
                               weight.to(type, false, false, format),
                               bias.has_value() ? bias->to(type) : Tensor(),
                               g.stride,
                               split.both,
                               g.dilation,
                               /*transposed=*/false,
                               kNoOutputPadding,
                               groups);
  }
  if (relu) {
    at::relu_(computed);
  }
  return finish(computed, output);
}

Tensor dilated_conv2d_grad_input_cpu(const Tensor& grad_output,
                                     const Tensor& weight,
                                     SymIntArrayRef input_size,
                                     IntArrayRef stride,
                                     IntArrayRef padding,
                                     IntArrayRef dilation,
                                     int64_t groups) {
  const Geometry g = check_geometry(kGradInput, stride, padding, dilation, groups);
  const Sizes s = check_grad_input(grad_output, weight, input_size, g);
  const BackendScope scope;
  const Tensor grad_input = empty_grad_input(s, grad_output);
  if (any_empty(grad_output, weight) || grad_input.numel() == 0) {
    return grad_input.zero_();
  }
  const DilatedConv2dShape shape = plain_shape(g, s);
  if (has_rows(grad_output) && cpu::prefers_depthwise_grad_input(shape)) {
    const bool done =
        cpu::dilated_conv2d_depthwise_grad_input({.shape = shape,
                                                  .dtype = to_dtype(grad_output.scalar_type()),
                                                  .grad_output = grad_output.const_data_ptr(),
                                                  .weight = weight.const_data_ptr(),
                                                  .grad_input = grad_input.mutable_data_ptr(),
                                                  .grad_output_strides = to_strides(grad_output),
                                                  .weight_strides = to_strides(weight),
                                                  .grad_input_strides = to_strides(grad_input),
                                                  .precision = Float32Precision::kIeee,
                                                  .workspace = nullptr},
                                                 torch_threads());
    if (done) {
      return grad_input;
    }
  }
  if (allows_winograd(grad_output) && cpu::prefers_winograd_grad_input(shape)) {
    const Tensor source = grad_output.to(at::kFloat);
    const Tensor factor = weight.to(at::kFloat);
    const Tensor result = empty_grad_input(s, source);
    const Strides4 w = to_strides(factor);
    // The convolution of grad_output with the window turned round.
    const bool done = run_winograd({.n = shape.n,
                                    .c_in = shape.c_out,
                                    .h_in = shape.h_out,
                                    .w_in = shape.w_out,
                                    .c_out = shape.c_in,
                                    .h_out = shape.h_in,
                                    .w_out = shape.w_in,
                                    .pad_top = 2 * shape.dil_h - shape.pad_top,
                                    .pad_left = 2 * shape.dil_w - shape.pad_left,
                                    .dil_h = shape.dil_h,
                                    .dil_w = shape.dil_w,
                                    .source = source.const_data_ptr<float>(),
                                    .weight = factor.const_data_ptr<float>() + 2 * (w.h + w.w),
                                    .bias = nullptr,
                                    .result = result.mutable_data_ptr<float>(),
                                    .source_strides = to_strides(source),
                                    .weight_strides = {w.c, w.n, -w.h, -w.w},
                                    .result_strides = to_strides(result),
                                    .relu = false});
    if (done) {
      return finish(result, grad_input);
    }
  }
  const at::ScalarType type = compute_type(grad_output);
  const PaddingSplit split(g.padding);
  const Tensor input = stand_in(split.padded(grad_input.sizes()), grad_input, type);
  const Tensor computed = std::get<0>(at::convolution_backward(grad_output.to(type),
                                                               input,
                                                               weight.to(type),
                                                               /*bias_sizes=*/std::nullopt,
                                                               g.stride,
                                                               split.both,
                                                               g.dilation,
                                                               /*transposed=*/false,
                                                               kNoOutputPadding,
                                                               groups,
                                                               {true, false, false}));
  return finish(split.crop(computed), grad_input);
}

std::tuple<Tensor, Tensor> dilated_conv2d_grad_weight_cpu(const Tensor& grad_output,
                                                          const Tensor& input,
                                                          SymIntArrayRef kernel_size,
                                                          IntArrayRef stride,
                                                          IntArrayRef padding,
                                                          IntArrayRef dilation,
                                                          int64_t groups,
                                                          bool bias) {
  const Geometry g = check_geometry(kGradWeight, stride, padding, dilation, groups);
  const Sizes s = check_grad_weight(grad_output, input, kernel_size, g);
  const BackendScope scope;
  const auto [grad_weight, grad_bias] = empty_grad_weight(s, g, input, bias);
  const DilatedConv2dShape shape = plain_shape(g, s);
  if (!any_empty(grad_output, input) && grad_weight.numel() > 0 && has_rows(input) &&
      cpu::prefers_depthwise_grad_weight(shape, to_dtype(input.scalar_type()))) {
    const bool done = cpu::dilated_conv2d_depthwise_grad_weight(
        {.shape = shape,
         .dtype = to_dtype(input.scalar_type()),
         .grad_output = grad_output.const_data_ptr(),
         .input = input.const_data_ptr(),
         .grad_weight = grad_weight.mutable_data_ptr(),
         .grad_bias = bias ? grad_bias.mutable_data_ptr() : nullptr,
         .grad_output_strides = to_strides(grad_output),
         .input_strides = to_strides(input),
         .grad_weight_strides = to_strides(grad_weight),
         .precision = Float32Precision::kIeee,
         .workspace = nullptr},
        torch_threads());
    if (done) {
      return {grad_weight, grad_bias};
    }
  }
  const at::ScalarType type = compute_type(input);
  const Tensor grad = grad_output.to(type);
  if (bias) {
    grad_bias.copy_(grad.sum({0, 2, 3}));
  }
  if (any_empty(grad_output, input)) {
    return {grad_weight.zero_(), grad_bias};
  }
  const PaddingSplit split(g.padding);
  const Tensor computed =
      std::get<1>(at::convolution_backward(grad,
                                           split.pad(input.to(type)),
                                           stand_in(grad_weight.sizes(), grad_weight, type),
                                           /*bias_sizes=*/std::nullopt,
                                           g.stride,
                                           split.both,
                                           g.dilation,
                                           /*transposed=*/false,
                                           kNoOutputPadding,
                                           groups,
                                           {false, true, false}));
  return {finish(computed, grad_weight), grad_bias};
}

// ---- CUDA ---------------------------------------------------------------------------------------

#ifdef DILSEG_WITH_CUDA

Tensor dilated_conv2d_cuda(const Tensor& input,
                           const Tensor& weight,
                           const std::optional<Tensor>& bias,
                           IntArrayRef stride,
                           IntArrayRef padding,
                           IntArrayRef dilation,
                           int64_t groups,
                           std::optional<std::string_view> activation) {
  const Geometry g = check_geometry(kForward, stride, padding, dilation, groups);
  const Sizes s = check_forward(kForward, input, weight, bias, g);
  const bool relu = check_activation(kForward, activation);
  const DilatedConv2dShape shape = to_shape(kForward, g, s);
  const c10::DeviceGuard guard(input.device());
  const Tensor output = empty_output(s, input);
  const Tensor dense_bias = bias.has_value() ? bias->contiguous() : Tensor();
  DilatedConv2dParams params = {
      .shape = shape,
      .dtype = to_dtype(input.scalar_type()),
      .input = input.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .bias = dense_bias.defined() ? dense_bias.const_data_ptr() : nullptr,
      .output = output.mutable_data_ptr(),
      .input_strides = to_strides(input),
      .weight_strides = to_strides(weight),
      .output_strides = to_strides(output),
      .relu = relu,
      .precision = float32_precision(),
      .workspace = nullptr};
  const Planned planned(params, input);
  check_status(kForward,
               cuda::launch_dilated_conv2d(params, planned.plan, current_stream(input.device())));
  return output;
}

Tensor dilated_conv2d_grad_input_cuda(const Tensor& grad_output,
                                      const Tensor& weight,
                                      SymIntArrayRef input_size,
                                      IntArrayRef stride,
                                      IntArrayRef padding,
                                      IntArrayRef dilation,
                                      int64_t groups) {
  const Geometry g = check_geometry(kGradInput, stride, padding, dilation, groups);
  const Sizes s = check_grad_input(grad_output, weight, input_size, g);
  const DilatedConv2dShape shape = to_shape(kGradInput, g, s);
  const c10::DeviceGuard guard(grad_output.device());
  const Tensor grad_input = empty_grad_input(s, grad_output);
  DilatedConv2dGradInputParams params = {.shape = shape,
                                         .dtype = to_dtype(grad_output.scalar_type()),
                                         .grad_output = grad_output.const_data_ptr(),
                                         .weight = weight.const_data_ptr(),
                                         .grad_input = grad_input.mutable_data_ptr(),
                                         .grad_output_strides = to_strides(grad_output),
                                         .weight_strides = to_strides(weight),
                                         .grad_input_strides = to_strides(grad_input),
                                         .precision = float32_precision(),
                                         .workspace = nullptr};
  const Planned planned(params, grad_output);
  check_status(kGradInput,
               cuda::launch_dilated_conv2d_grad_input(
                   params, planned.plan, current_stream(grad_output.device())));
  return grad_input;
}

std::tuple<Tensor, Tensor> dilated_conv2d_grad_weight_cuda(const Tensor& grad_output,
                                                           const Tensor& input,
                                                           SymIntArrayRef kernel_size,
                                                           IntArrayRef stride,
                                                           IntArrayRef padding,
                                                           IntArrayRef dilation,
                                                           int64_t groups,
                                                           bool bias) {
  const Geometry g = check_geometry(kGradWeight, stride, padding, dilation, groups);
  const Sizes s = check_grad_weight(grad_output, input, kernel_size, g);
  const DilatedConv2dShape shape = to_shape(kGradWeight, g, s);
  const c10::DeviceGuard guard(input.device());
  const auto [grad_weight, grad_bias] = empty_grad_weight(s, g, input, bias);
  DilatedConv2dGradWeightParams params = {
      .shape = shape,
      .dtype = to_dtype(input.scalar_type()),
      .grad_output = grad_output.const_data_ptr(),
      .input = input.const_data_ptr(),
      .grad_weight = grad_weight.mutable_data_ptr(),
      .grad_bias = bias ? grad_bias.mutable_data_ptr() : nullptr,
      .grad_output_strides = to_strides(grad_output),
      .input_strides = to_strides(input),
      .grad_weight_strides = to_strides(grad_weight),
      .precision = float32_precision(),
      .workspace = nullptr};
  const Planned planned(params, input);
  check_status(kGradWeight,
               cuda::launch_dilated_conv2d_grad_weight(
                   params, planned.plan, current_stream(input.device())));
  return {grad_weight, grad_bias};
}

#endif

}  // namespace

TORCH_LIBRARY_IMPL(dilseg, Meta, m) {
  m.impl(kForward, TORCH_FN(dilated_conv2d_meta));
  m.impl(kGradInput, TORCH_FN(dilated_conv2d_grad_input_meta));
  m.impl(kGradWeight, TORCH_FN(dilated_conv2d_grad_weight_meta));
}

TORCH_LIBRARY_IMPL(dilseg, CompositeExplicitAutograd, m) {
  m.impl(kPlan, TORCH_FN(dilated_conv2d_plan));
  m.impl("_prefer_dilated_conv2d_kernel", TORCH_FN(prefer_kernel));
  m.impl("_set_float32_conv_precision", TORCH_FN(set_precision));
  m.impl("_get_float32_conv_precision", TORCH_FN(get_precision));
}

TORCH_LIBRARY_IMPL(dilseg, CPU, m) {
  m.impl(kForward, TORCH_FN(dilated_conv2d_cpu));
  m.impl(kGradInput, TORCH_FN(dilated_conv2d_grad_input_cpu));
  m.impl(kGradWeight, TORCH_FN(dilated_conv2d_grad_weight_cpu));
}

TORCH_LIBRARY_IMPL(dilseg, CUDA, m) {
#ifdef DILSEG_WITH_CUDA
  m.impl(kForward, TORCH_FN(dilated_conv2d_cuda));
  m.impl(kGradInput, TORCH_FN(dilated_conv2d_grad_input_cuda));
  m.impl(kGradWeight, TORCH_FN(dilated_conv2d_grad_weight_cuda));
#else
  for (const char* op : {kForward, kGradInput, kGradWeight}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&cuda_unavailable>());
  }
#endif
}

}  // namespace dilseg::ops
