// SPDX-License-Identifier: Apache-2.0
//
// upsample_add and its gradient for torch. One function per op checks the arguments and derives the
// sizes, symbolically, for CPU, CUDA and Meta alike; csrc/cpu and csrc/cuda compute.
#include "dilseg/upsample_add.h"

#include "ops/checks.h"
#include "ops/common.h"
#include "ops/result.h"
#include "ops/upsample_rule.h"

#include <array>
#include <optional>
#include <string_view>

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace dilseg::ops {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

constexpr const char* kForward = "upsample_add";
constexpr const char* kBackward = "upsample_add_backward";

// ---- arguments and sizes ------------------------------------------------------------------------

UpsampleSizes check_forward(const Tensor& input,
                            const std::optional<Tensor>& skip,
                            SymIntArrayRef output_size,
                            SymIntArrayRef offset) {
  const char* op = kForward;
  check_rank(op, "input", input, 4, "[n, c, h_in, w_in]");
  check_float(op, "input", input);
  const std::array<SymInt, 2> out = check_pair(op, "output_size", output_size);
  const std::array<SymInt, 2> crop = check_pair(op, "offset", offset);
  const UpsampleSizes s = {
      input.sym_size(0), input.sym_size(1), input.sym_size(2), input.sym_size(3), out[0], out[1]};
  check_map_sizes(op, s);
  DILSEG_CHECK_VALUE(op,
                     crop[0].sym_ge(0).sym_and(crop[1].sym_ge(0)),
                     format("expected offset of at least (0, 0), but got ({}, {}). Pad the skip to "
                            "begin before its first pixel.",
                            crop[0],
                            crop[1]));
  if (!skip.has_value()) {
    return s;
  }
  check_rank(op, "skip", *skip, 4, "[n, c, h_skip, w_skip]");
  check_same_dtype(op, "input", input, "skip", *skip);
  check_same_device(op, "input", input, "skip", *skip);
  DILSEG_CHECK_VALUE(op,
                     skip->sym_size(0).sym_eq(s.n).sym_and(skip->sym_size(1).sym_eq(s.c)),
                     format("expected skip of shape [n, c, h_skip, w_skip] with n={}, c={} as "
                            "input, but got skip of shape {} for input of shape {}. Bring both to "
                            "the same batch and channels, for instance by a 1x1 convolution.",
                            s.n,
                            s.c,
                            skip->sym_sizes(),
                            input.sym_sizes()));
  DILSEG_CHECK_VALUE(op,
                     // Not offset + output size, which could overflow.
                     (skip->sym_size(2) - out[0])
                         .sym_ge(crop[0])
                         .sym_and((skip->sym_size(3) - out[1]).sym_ge(crop[1])),
                     format("expected skip of size at least offset + output size = ({} + {}, {} + "
                            "{}) = ({}, {}), but got skip of size ({}, {}). Pass a smaller offset "
                            "or size=skip.shape[-2:], or pad the skip.",
                            crop[0],
                            out[0],
                            crop[1],
                            out[1],
                            crop[0] + out[0],
                            crop[1] + out[1],
                            skip->sym_size(2),
                            skip->sym_size(3)));
  return s;
}

UpsampleSizes check_backward(const Tensor& grad_output, SymIntArrayRef input_size) {
  check_rank(kBackward, "grad_output", grad_output, 4, "[n, c, h_out, w_out]");
  check_float(kBackward, "grad_output", grad_output);
  const std::array<SymInt, 2> in = check_pair(kBackward, "input_size", input_size);
  const UpsampleSizes s = {grad_output.sym_size(0),
                           grad_output.sym_size(1),
                           in[0],
                           in[1],
                           grad_output.sym_size(2),
                           grad_output.sym_size(3)};
  check_map_sizes(kBackward, s);
  return s;
}

// ---- results ------------------------------------------------------------------------------------

Tensor empty_output(const UpsampleSizes& s, const Tensor& input) {
  return empty_result({s.n, s.c, s.h_out, s.w_out}, input.options(), input.suggest_memory_format());
}

Tensor empty_grad_input(const UpsampleSizes& s, const Tensor& grad_output) {
  return empty_result(
      {s.n, s.c, s.h_in, s.w_in}, grad_output.options(), grad_output.suggest_memory_format());
}

UpsampleAddParams forward_params(const UpsampleGeometry& geometry,
                                 const Tensor& input,
                                 const std::optional<Tensor>& skip,
                                 SymIntArrayRef offset,
                                 const Tensor& output) {
  return {.dtype = to_dtype(input.scalar_type()),
          .geometry = geometry,
          .input = input.const_data_ptr(),
          .input_strides = to_strides(input),
          .skip = skip.has_value() ? skip->const_data_ptr() : nullptr,
          .skip_strides = skip.has_value() ? to_strides(*skip) : Strides4{},
          .offset_h = offset[0].expect_int(),
          .offset_w = offset[1].expect_int(),
          .output = output.mutable_data_ptr(),
          .output_strides = to_strides(output)};
}

UpsampleAddBackwardParams backward_params(const UpsampleGeometry& geometry,
                                          const Tensor& grad_output,
                                          const Tensor& grad_input) {
  return {.dtype = to_dtype(grad_output.scalar_type()),
          .geometry = geometry,
          .grad_output = grad_output.const_data_ptr(),
          .grad_output_strides = to_strides(grad_output),
          .grad_input = grad_input.mutable_data_ptr(),
          .grad_input_strides = to_strides(grad_input)};
}

// ---- Meta ---------------------------------------------------------------------------------------

Tensor upsample_add_meta(const Tensor& input,
                         const std::optional<Tensor>& skip,
                         SymIntArrayRef output_size,
                         ScaleFactors scale_factors,
                         bool align_corners,
                         std::string_view border,
                         SymIntArrayRef offset,
                         SymIntArrayRef origin) {
  check_rule(kForward, scale_factors, align_corners, border, origin);
  return empty_output(check_forward(input, skip, output_size, offset), input);
}

Tensor upsample_add_backward_meta(const Tensor& grad_output,
                                  SymIntArrayRef input_size,
                                  ScaleFactors scale_factors,
                                  bool align_corners,
                                  std::string_view border,
                                  SymIntArrayRef origin) {
  check_rule(kBackward, scale_factors, align_corners, border, origin);
  return empty_grad_input(check_backward(grad_output, input_size), grad_output);
}

// ---- CPU ----------------------------------------------------------------------------------------

Tensor upsample_add_cpu(const Tensor& input,
                        const std::optional<Tensor>& skip,
                        SymIntArrayRef output_size,
                        ScaleFactors scale_factors,
                        bool align_corners,
                        std::string_view border,
                        SymIntArrayRef offset,
                        SymIntArrayRef origin) {
  const UpsampleRule rule = check_rule(kForward, scale_factors, align_corners, border, origin);
  const UpsampleSizes s = check_forward(input, skip, output_size, offset);
  const UpsampleGeometry geometry = to_geometry(kForward, s, rule);
  const BackendScope scope;
  const Tensor output = empty_output(s, input);
  cpu::upsample_add(forward_params(geometry, input, skip, offset, output), torch_threads());
  return output;
}

Tensor upsample_add_backward_cpu(const Tensor& grad_output,
                                 SymIntArrayRef input_size,
                                 ScaleFactors scale_factors,
                                 bool align_corners,
                                 std::string_view border,
                                 SymIntArrayRef origin) {
  const UpsampleRule rule = check_rule(kBackward, scale_factors, align_corners, border, origin);
  const UpsampleSizes s = check_backward(grad_output, input_size);
  const UpsampleGeometry geometry = to_geometry(kBackward, s, rule);
  const BackendScope scope;
  const Tensor grad_input = empty_grad_input(s, grad_output);
  cpu::upsample_add_backward(backward_params(geometry, grad_output, grad_input), torch_threads());
  return grad_input;
}

// ---- CUDA ---------------------------------------------------------------------------------------

#ifdef DILSEG_WITH_CUDA

Tensor upsample_add_cuda(const Tensor& input,
                         const std::optional<Tensor>& skip,
                         SymIntArrayRef output_size,
                         ScaleFactors scale_factors,
                         bool align_corners,
                         std::string_view border,
                         SymIntArrayRef offset,
                         SymIntArrayRef origin) {
  const UpsampleRule rule = check_rule(kForward, scale_factors, align_corners, border, origin);
  const UpsampleSizes s = check_forward(input, skip, output_size, offset);
  const UpsampleGeometry geometry = to_geometry(kForward, s, rule);
  const c10::DeviceGuard guard(input.device());
  const Tensor output = empty_output(s, input);
  check_status(kForward,
               cuda::launch_upsample_add(forward_params(geometry, input, skip, offset, output),
                                         current_stream(input.device())));
  return output;
}

Tensor upsample_add_backward_cuda(const Tensor& grad_output,
                                  SymIntArrayRef input_size,
                                  ScaleFactors scale_factors,
                                  bool align_corners,
                                  std::string_view border,
                                  SymIntArrayRef origin) {
  const UpsampleRule rule = check_rule(kBackward, scale_factors, align_corners, border, origin);
  const UpsampleSizes s = check_backward(grad_output, input_size);
  const UpsampleGeometry geometry = to_geometry(kBackward, s, rule);
  const c10::DeviceGuard guard(grad_output.device());
  const Tensor grad_input = empty_grad_input(s, grad_output);
  check_status(
      kBackward,
      cuda::launch_upsample_add_backward(backward_params(geometry, grad_output, grad_input),
                                         current_stream(grad_output.device())));
  return grad_input;
}

#endif

}  // namespace

TORCH_LIBRARY_IMPL(dilseg, Meta, m) {
  m.impl(kForward, TORCH_FN(upsample_add_meta));
  m.impl(kBackward, TORCH_FN(upsample_add_backward_meta));
}

TORCH_LIBRARY_IMPL(dilseg, CPU, m) {
  m.impl(kForward, TORCH_FN(upsample_add_cpu));
  m.impl(kBackward, TORCH_FN(upsample_add_backward_cpu));
}

TORCH_LIBRARY_IMPL(dilseg, CUDA, m) {
#ifdef DILSEG_WITH_CUDA
  m.impl(kForward, TORCH_FN(upsample_add_cuda));
  m.impl(kBackward, TORCH_FN(upsample_add_backward_cuda));
#else
  for (const char* op : {kForward, kBackward}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&cuda_unavailable>());
  }
#endif
}

}  // namespace dilseg::ops
