// SPDX-License-Identifier: Apache-2.0
//
// upsample_argmax for torch: checks the arguments, symbolically, for CPU, CUDA and Meta alike;
// csrc/cpu and csrc/cuda compute.
#include "dilseg/upsample_argmax.h"

#include "ops/checks.h"
#include "ops/common.h"
#include "ops/loss.h"
#include "ops/result.h"
#include "ops/upsample_rule.h"

#include <string_view>
#include <tuple>

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace dilseg::ops {
namespace {

using at::Tensor;
using c10::SymIntArrayRef;

constexpr const char* kOp = "upsample_argmax";

UpsampleSizes check_arguments(const Tensor& input,
                              SymIntArrayRef output_size,
                              at::ScalarType dtype) {
  check_rank(kOp, "input", input, 4, "[n, c, h_in, w_in]");
  check_float(kOp, "input", input);
  const std::array<c10::SymInt, 2> out = check_pair(kOp, "output_size", output_size);
  const UpsampleSizes s = {
      input.sym_size(0), input.sym_size(1), input.sym_size(2), input.sym_size(3), out[0], out[1]};
  check_map_sizes(kOp, s);
  DILSEG_CHECK_VALUE(kOp,
                     s.c.sym_ge(1),
                     format("expected input [n, c, h_in, w_in] with at least 1 class, but got "
                            "shape {}.",
                            input.sym_sizes()));
  DILSEG_CHECK_TYPE(kOp,
                    dtype == at::kLong || dtype == at::kInt || dtype == at::kByte,
                    format("expected dtype int64, int32 or uint8, but got {}.", dtype_name(dtype)));
  DILSEG_CHECK_VALUE(kOp,
                     dtype != at::kByte || holds(s.c.sym_le(256)),
                     format("expected at most 256 classes for dtype uint8, but got {}. Pass "
                            "dtype=torch.int64.",
                            s.c));
  return s;
}

// label, confidence; an unwanted confidence has no elements.
std::tuple<Tensor, Tensor> empty_results(const UpsampleSizes& s,
                                         const Tensor& input,
                                         at::ScalarType dtype,
                                         bool confidence) {
  const at::TensorOptions options = input.options().dtype(loss_type(input));
  return {empty_result({s.n, s.h_out, s.w_out}, input.options().dtype(dtype)),
          confidence ? empty_result({s.n, s.h_out, s.w_out}, options) : at::empty({0}, options)};
}

UpsampleArgmaxParams to_params(const UpsampleGeometry& geometry,
                               const Tensor& input,
                               const Tensor& label,
                               const Tensor& confidence,
                               bool wants_confidence) {
  return {.dtype = to_dtype(input.scalar_type()),
          .label_type = to_index_type(label.scalar_type()),
          .geometry = geometry,
          .input = input.const_data_ptr(),
          .input_strides = to_strides(input),
          .label = label.mutable_data_ptr(),
          .confidence = wants_confidence ? confidence.mutable_data_ptr() : nullptr};
}

std::tuple<Tensor, Tensor> upsample_argmax_meta(const Tensor& input,
                                                SymIntArrayRef output_size,
                                                ScaleFactors scale_factors,
                                                bool align_corners,
                                                std::string_view border,
                                                SymIntArrayRef origin,
                                                at::ScalarType dtype,
                                                bool confidence) {
  check_rule(kOp, scale_factors, align_corners, border, origin);
  return empty_results(check_arguments(input, output_size, dtype), input, dtype, confidence);
}

std::tuple<Tensor, Tensor> upsample_argmax_cpu(const Tensor& input,
                                               SymIntArrayRef output_size,
                                               ScaleFactors scale_factors,
                                               bool align_corners,
                                               std::string_view border,
                                               SymIntArrayRef origin,
                                               at::ScalarType dtype,
                                               bool confidence) {
  const UpsampleRule rule = check_rule(kOp, scale_factors, align_corners, border, origin);
  const UpsampleSizes s = check_arguments(input, output_size, dtype);
  const UpsampleGeometry geometry = to_geometry(kOp, s, rule);
  const BackendScope scope;
  const auto [label, share] = empty_results(s, input, dtype, confidence);
  cpu::upsample_argmax(to_params(geometry, input, label, share, confidence), torch_threads());
  return {label, share};
}

#ifdef DILSEG_WITH_CUDA

std::tuple<Tensor, Tensor> upsample_argmax_cuda(const Tensor& input,
                                                SymIntArrayRef output_size,
                                                ScaleFactors scale_factors,
                                                bool align_corners,
                                                std::string_view border,
                                                SymIntArrayRef origin,
                                                at::ScalarType dtype,
                                                bool confidence) {
  const UpsampleRule rule = check_rule(kOp, scale_factors, align_corners, border, origin);
  const UpsampleSizes s = check_arguments(input, output_size, dtype);
  const UpsampleGeometry geometry = to_geometry(kOp, s, rule);
  const c10::DeviceGuard guard(input.device());
  const auto [label, share] = empty_results(s, input, dtype, confidence);
  check_status(kOp,
               cuda::launch_upsample_argmax(to_params(geometry, input, label, share, confidence),
                                            current_stream(input.device())));
  return {label, share};
}

#endif

}  // namespace

TORCH_LIBRARY_IMPL(dilseg, Meta, m) { m.impl(kOp, TORCH_FN(upsample_argmax_meta)); }

TORCH_LIBRARY_IMPL(dilseg, CPU, m) { m.impl(kOp, TORCH_FN(upsample_argmax_cpu)); }

TORCH_LIBRARY_IMPL(dilseg, CUDA, m) {
#ifdef DILSEG_WITH_CUDA
  m.impl(kOp, TORCH_FN(upsample_argmax_cuda));
#else
  m.impl(kOp, torch::CppFunction::makeFromBoxedFunction<&cuda_unavailable>());
#endif
}

}  // namespace dilseg::ops
