// SPDX-License-Identifier: Apache-2.0
//
// upsample_cross_entropy and its gradient for torch. One function per op checks the arguments,
// symbolically, for CPU, CUDA and Meta alike; csrc/cpu and csrc/cuda compute.
#include "dilseg/upsample_cross_entropy.h"

#include "ops/checks.h"
#include "ops/common.h"
#include "ops/loss.h"
#include "ops/result.h"
#include "ops/upsample_rule.h"

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace dilseg::ops {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

constexpr const char* kForward = "upsample_cross_entropy";
constexpr const char* kBackward = "upsample_cross_entropy_backward";

// Everything but tensors: the index rule and the loss, in the order of the schemas.
struct Options {
  ScaleFactors scale_factors;
  bool align_corners;
  std::string_view border;
  SymIntArrayRef origin;
  std::string_view reduction;
  int64_t ignore_index;
  double label_smoothing;
};

// ---- arguments and sizes ------------------------------------------------------------------------

// What was checked: the sizes, the rule and the reduction.
struct Checked {
  UpsampleSizes sizes;
  UpsampleRule rule;
  Reduction reduction;

  std::array<SymInt, 3> pixels() const { return {sizes.n, sizes.h_out, sizes.w_out}; }
};

Checked check_problem(const char* op,
                      const Tensor& input,
                      const Tensor& target,
                      const std::optional<Tensor>& weight,
                      const Options& o) {
  check_rank(op, "input", input, 4, "[n, c, h_in, w_in]");
  check_rank(op, "target", target, 3, "[n, h_out, w_out]");
  const UpsampleSizes sizes = {input.sym_size(0),
                               input.sym_size(1),
                               input.sym_size(2),
                               input.sym_size(3),
                               target.sym_size(1),
                               target.sym_size(2)};
  const Checked checked = {sizes,
                           check_rule(op, o.scale_factors, o.align_corners, o.border, o.origin),
                           check_reduction(op, o.reduction)};
  check_loss_arguments(
      op, input, target, "[n, h_out, w_out]", checked.pixels(), weight, o.label_smoothing);
  check_map_sizes(op, sizes);
  return checked;
}

Checked check_backward(const Tensor& grad_output,
                       const Tensor& input,
                       const Tensor& target,
                       const std::optional<Tensor>& weight,
                       const Tensor& total_weight,
                       const Options& o) {
  const char* op = kBackward;
  const Checked checked = check_problem(op, input, target, weight, o);
  check_loss_type(op, "grad_output", grad_output, input);
  check_loss_type(op, "total_weight", total_weight, input);
  if (checked.reduction == Reduction::kNone) {
    check_shape(op, "grad_output", grad_output, "[n, h_out, w_out]", checked.pixels(), input);
  } else {
    check_scalar(op, "grad_output", grad_output);
  }
  check_scalar(op, "total_weight", total_weight);
  return checked;
}

// ---- results ------------------------------------------------------------------------------------

// Whether forward computes the gradient of the sum of the losses: only where one factor turns it
// into the gradient that is asked for.
bool keeps_sum_grad(const Checked& checked, bool gradient) {
  return gradient && checked.reduction != Reduction::kNone;
}

// loss, total_weight, sum_grad; an unwanted sum_grad has no elements.
std::tuple<Tensor, Tensor, Tensor> empty_results(const Tensor& input,
                                                 const Checked& checked,
                                                 bool gradient) {
  const at::TensorOptions options = input.options().dtype(loss_type(input));
  return {checked.reduction == Reduction::kNone ? empty_result(checked.pixels(), options)
                                                : at::empty({}, options),
          at::empty({}, options),
          keeps_sum_grad(checked, gradient) ? empty_result(input.sym_sizes(), options)
                                            : at::empty({0}, options)};
}

Tensor empty_grad_input(const Tensor& input) {
  return empty_result(input.sym_sizes(), input.options(), input.suggest_memory_format());
}

UpsampleCrossEntropyProblem to_problem(const char* op,
                                       const Tensor& input,
                                       const DenseArguments& dense,
                                       const Checked& checked,
                                       const Options& o) {
  return {.dtype = to_dtype(input.scalar_type()),
          .target_type = to_index_type(dense.target.scalar_type()),
          .reduction = checked.reduction,
          .geometry = to_geometry(op, checked.sizes, checked.rule),
          .ignore_index = o.ignore_index,
          .label_smoothing = o.label_smoothing,
          .input = input.const_data_ptr(),
          .input_strides = to_strides(input),
          .target = dense.target.const_data_ptr(),
          .weight = dense.weight.defined() ? dense.weight.const_data_ptr() : nullptr};
}

UpsampleCrossEntropyParams forward_params(const UpsampleCrossEntropyProblem& problem,
                                          const Tensor& loss,
                                          const Tensor& total_weight,
                                          const Tensor& sum_grad,
                                          bool keeps_sum_grad,
                                          void* workspace) {
  return {.problem = problem,
          .loss = loss.mutable_data_ptr(),
          .total_weight = total_weight.mutable_data_ptr(),
          .sum_grad = keeps_sum_grad ? sum_grad.mutable_data_ptr() : nullptr,
          .workspace = workspace};
}

UpsampleCrossEntropyBackwardParams backward_params(const UpsampleCrossEntropyProblem& problem,
                                                   const Tensor& dense_grad_output,
                                                   const Tensor& total_weight,
                                                   const Tensor& grad_input,
                                                   void* workspace) {
  return {.problem = problem,
          .grad_output = dense_grad_output.const_data_ptr(),
          .total_weight = total_weight.const_data_ptr(),
          .grad_input = grad_input.mutable_data_ptr(),
          .grad_input_strides = to_strides(grad_input),
          .workspace = workspace};
}

// ---- Meta ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> forward_meta(const Tensor& input,
                                                const Tensor& target,
                                                const std::optional<Tensor>& weight,
                                                ScaleFactors scale_factors,
                                                bool align_corners,
                                                std::string_view border,
                                                SymIntArrayRef origin,
                                                std::string_view reduction,
                                                int64_t ignore_index,
                                                double label_smoothing,
                                                bool gradient) {
  const Options o = {
      scale_factors, align_corners, border, origin, reduction, ignore_index, label_smoothing};
  return empty_results(input, check_problem(kForward, input, target, weight, o), gradient);
}

Tensor backward_meta(const Tensor& grad_output,
                     const Tensor& input,
                     const Tensor& target,
                     const std::optional<Tensor>& weight,
                     const Tensor& total_weight,
                     ScaleFactors scale_factors,
                     bool align_corners,
                     std::string_view border,
                     SymIntArrayRef origin,
                     std::string_view reduction,
                     int64_t ignore_index,
                     double label_smoothing) {
  const Options o = {
      scale_factors, align_corners, border, origin, reduction, ignore_index, label_smoothing};
  check_backward(grad_output, input, target, weight, total_weight, o);
  return empty_grad_input(input);
}

// ---- CPU ----------------------------------------------------------------------------------------

void check_labels(const char* op, const UpsampleCrossEntropyProblem& p, LabelError error) {
  const UpsampleGeometry& g = p.geometry;
  ops::check_labels(op, g.c, g.h_out, g.w_out, p.ignore_index, error);
}

std::tuple<Tensor, Tensor, Tensor> forward_cpu(const Tensor& input,
                                               const Tensor& target,
                                               const std::optional<Tensor>& weight,
                                               ScaleFactors scale_factors,
                                               bool align_corners,
                                               std::string_view border,
                                               SymIntArrayRef origin,
                                               std::string_view reduction,
                                               int64_t ignore_index,
                                               double label_smoothing,
                                               bool gradient) {
  const Options o = {
      scale_factors, align_corners, border, origin, reduction, ignore_index, label_smoothing};
  const Checked checked = check_problem(kForward, input, target, weight, o);
  const BackendScope scope;
  const DenseArguments dense(input, target, weight);
  const UpsampleCrossEntropyProblem problem = to_problem(kForward, input, dense, checked, o);
  const auto [loss, total_weight, sum_grad] = empty_results(input, checked, gradient);
  const LabelError error = cpu::upsample_cross_entropy(
      forward_params(
          problem, loss, total_weight, sum_grad, keeps_sum_grad(checked, gradient), nullptr),
      torch_threads());
  check_labels(kForward, problem, error);
  return {loss, total_weight, sum_grad};
}

Tensor backward_cpu(const Tensor& grad_output,
                    const Tensor& input,
                    const Tensor& target,
                    const std::optional<Tensor>& weight,
                    const Tensor& total_weight,
                    ScaleFactors scale_factors,
                    bool align_corners,
                    std::string_view border,
                    SymIntArrayRef origin,
                    std::string_view reduction,
                    int64_t ignore_index,
                    double label_smoothing) {
  const Options o = {
      scale_factors, align_corners, border, origin, reduction, ignore_index, label_smoothing};
  const Checked checked = check_backward(grad_output, input, target, weight, total_weight, o);
  const BackendScope scope;
  const DenseArguments dense(input, target, weight);
  const UpsampleCrossEntropyProblem problem = to_problem(kBackward, input, dense, checked, o);
  const Tensor grad_input = empty_grad_input(input);
  const Tensor dense_grad_output = grad_output.contiguous();
  const LabelError error = cpu::upsample_cross_entropy_backward(
      backward_params(problem, dense_grad_output, total_weight, grad_input, nullptr),
      torch_threads());
  check_labels(kBackward, problem, error);
  return grad_input;
}

// ---- CUDA ---------------------------------------------------------------------------------------

#ifdef DILSEG_WITH_CUDA

Tensor empty_workspace(const Tensor& input,
                       const UpsampleCrossEntropyProblem& problem,
                       bool gradient) {
  const size_t bytes = cuda::upsample_cross_entropy_workspace(problem, gradient);
  return at::empty({static_cast<int64_t>(bytes)}, input.options().dtype(at::kByte));
}

std::tuple<Tensor, Tensor, Tensor> forward_cuda(const Tensor& input,
                                                const Tensor& target,
                                                const std::optional<Tensor>& weight,
                                                ScaleFactors scale_factors,
                                                bool align_corners,
                                                std::string_view border,
                                                SymIntArrayRef origin,
                                                std::string_view reduction,
                                                int64_t ignore_index,
                                                double label_smoothing,
                                                bool gradient) {
  const Options o = {
      scale_factors, align_corners, border, origin, reduction, ignore_index, label_smoothing};
  const Checked checked = check_problem(kForward, input, target, weight, o);
  const BackendScope scope;
  const c10::DeviceGuard guard(input.device());
  const DenseArguments dense(input, target, weight);
  const UpsampleCrossEntropyProblem problem = to_problem(kForward, input, dense, checked, o);
  const auto [loss, total_weight, sum_grad] = empty_results(input, checked, gradient);
  const bool keeps = keeps_sum_grad(checked, gradient);
  const Tensor workspace = empty_workspace(input, problem, keeps);
  check_status(kForward,
               cuda::launch_upsample_cross_entropy(
                   forward_params(
                       problem, loss, total_weight, sum_grad, keeps, workspace.mutable_data_ptr()),
                   current_stream(input.device())));
  return {loss, total_weight, sum_grad};
}

Tensor backward_cuda(const Tensor& grad_output,
                     const Tensor& input,
                     const Tensor& target,
                     const std::optional<Tensor>& weight,
                     const Tensor& total_weight,
                     ScaleFactors scale_factors,
                     bool align_corners,
                     std::string_view border,
                     SymIntArrayRef origin,
                     std::string_view reduction,
                     int64_t ignore_index,
                     double label_smoothing) {
  const Options o = {
      scale_factors, align_corners, border, origin, reduction, ignore_index, label_smoothing};
  const Checked checked = check_backward(grad_output, input, target, weight, total_weight, o);
  const BackendScope scope;
  const c10::DeviceGuard guard(input.device());
  const DenseArguments dense(input, target, weight);
  const UpsampleCrossEntropyProblem problem = to_problem(kBackward, input, dense, checked, o);
  const Tensor grad_input = empty_grad_input(input);
  const Tensor dense_grad_output = grad_output.contiguous();
  const Tensor workspace = empty_workspace(input, problem, true);
  check_status(
      kBackward,
      cuda::launch_upsample_cross_entropy_backward(
          backward_params(
              problem, dense_grad_output, total_weight, grad_input, workspace.mutable_data_ptr()),
          current_stream(input.device())));
  return grad_input;
}

#endif

}  // namespace

TORCH_LIBRARY_IMPL(dilseg, Meta, m) {
  m.impl(kForward, TORCH_FN(forward_meta));
  m.impl(kBackward, TORCH_FN(backward_meta));
}

TORCH_LIBRARY_IMPL(dilseg, CPU, m) {
  m.impl(kForward, TORCH_FN(forward_cpu));
  m.impl(kBackward, TORCH_FN(backward_cpu));
}

TORCH_LIBRARY_IMPL(dilseg, CUDA, m) {
#ifdef DILSEG_WITH_CUDA
  m.impl(kForward, TORCH_FN(forward_cuda));
  m.impl(kBackward, TORCH_FN(backward_cuda));
#else
  for (const char* op : {kForward, kBackward}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&cuda_unavailable>());
  }
#endif
}

}  // namespace dilseg::ops
