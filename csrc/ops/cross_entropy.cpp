// SPDX-License-Identifier: Apache-2.0
//
// cross_entropy and its gradient for torch. One function per op checks the arguments, symbolically,
// for CPU, CUDA and Meta alike; csrc/cpu and csrc/cuda compute.
#include "dilseg/cross_entropy.h"

#include "ops/checks.h"
#include "ops/common.h"
#include "ops/loss.h"
#include "ops/result.h"

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

constexpr const char* kForward = "cross_entropy";
constexpr const char* kBackward = "cross_entropy_backward";

// ---- arguments and sizes ------------------------------------------------------------------------

std::array<SymInt, 3> pixel_sizes(const Tensor& input) {
  return {input.sym_size(0), input.sym_size(2), input.sym_size(3)};
}

void check_problem(const char* op,
                   const Tensor& input,
                   const Tensor& target,
                   const std::optional<Tensor>& weight,
                   double label_smoothing) {
  check_rank(op, "input", input, 4, "[n, c, h, w]");
  check_loss_arguments(op, input, target, "[n, h, w]", pixel_sizes(input), weight, label_smoothing);
}

void check_backward(const Tensor& grad_output,
                    const Tensor& input,
                    const Tensor& target,
                    const std::optional<Tensor>& weight,
                    const Tensor& logsumexp,
                    const Tensor& total_weight,
                    Reduction reduction,
                    double label_smoothing) {
  const char* op = kBackward;
  check_problem(op, input, target, weight, label_smoothing);
  check_loss_type(op, "grad_output", grad_output, input);
  check_loss_type(op, "logsumexp", logsumexp, input);
  check_loss_type(op, "total_weight", total_weight, input);
  const std::array<SymInt, 3> pixels = pixel_sizes(input);
  if (reduction == Reduction::kNone) {
    check_shape(op, "grad_output", grad_output, "[n, h, w]", pixels, input);
  } else {
    check_scalar(op, "grad_output", grad_output);
  }
  check_shape(op, "logsumexp", logsumexp, "[n, h, w]", pixels, input);
  check_scalar(op, "total_weight", total_weight);
}

// ---- results ------------------------------------------------------------------------------------

// loss, logsumexp, total_weight
std::tuple<Tensor, Tensor, Tensor> empty_results(const Tensor& input, Reduction reduction) {
  const at::TensorOptions options = input.options().dtype(loss_type(input));
  const std::array<SymInt, 3> pixels = pixel_sizes(input);
  return {reduction == Reduction::kNone ? empty_result(pixels, options) : at::empty({}, options),
          empty_result(pixels, options),
          at::empty({}, options)};
}

Tensor empty_grad_input(const Tensor& input) {
  return empty_result(input.sym_sizes(), input.options(), input.suggest_memory_format());
}

CrossEntropyProblem to_problem(const Tensor& input,
                               const DenseArguments& dense,
                               Reduction reduction,
                               int64_t ignore_index,
                               double label_smoothing) {
  return {.dtype = to_dtype(input.scalar_type()),
          .target_type = to_index_type(dense.target.scalar_type()),
          .reduction = reduction,
          .n = input.size(0),
          .c = input.size(1),
          .h = input.size(2),
          .w = input.size(3),
          .ignore_index = ignore_index,
          .label_smoothing = label_smoothing,
          .input = input.const_data_ptr(),
          .input_strides = to_strides(input),
          .target = dense.target.const_data_ptr(),
          .weight = dense.weight.defined() ? dense.weight.const_data_ptr() : nullptr};
}

CrossEntropyBackwardParams backward_params(const CrossEntropyProblem& problem,
                                           const Tensor& dense_grad_output,
                                           const Tensor& dense_logsumexp,
                                           const Tensor& total_weight,
                                           const Tensor& grad_input) {
  return {.problem = problem,
          .grad_output = dense_grad_output.const_data_ptr(),
          .logsumexp = dense_logsumexp.const_data_ptr(),
          .total_weight = total_weight.const_data_ptr(),
          .grad_input = grad_input.mutable_data_ptr(),
          .grad_input_strides = to_strides(grad_input)};
}

// ---- Meta ---------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> cross_entropy_meta(const Tensor& input,
                                                      const Tensor& target,
                                                      const std::optional<Tensor>& weight,
                                                      std::string_view reduction,
                                                      int64_t /*ignore_index*/,
                                                      double label_smoothing) {
  check_problem(kForward, input, target, weight, label_smoothing);
  return empty_results(input, check_reduction(kForward, reduction));
}

Tensor cross_entropy_backward_meta(const Tensor& grad_output,
                                   const Tensor& input,
                                   const Tensor& target,
                                   const std::optional<Tensor>& weight,
                                   const Tensor& logsumexp,
                                   const Tensor& total_weight,
                                   std::string_view reduction,
                                   int64_t /*ignore_index*/,
                                   double label_smoothing) {
  check_backward(grad_output,
                 input,
                 target,
                 weight,
                 logsumexp,
                 total_weight,
                 check_reduction(kBackward, reduction),
                 label_smoothing);
  return empty_grad_input(input);
}

// ---- CPU ----------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cpu(const Tensor& input,
                                                     const Tensor& target,
                                                     const std::optional<Tensor>& weight,
                                                     std::string_view reduction,
                                                     int64_t ignore_index,
                                                     double label_smoothing) {
  check_problem(kForward, input, target, weight, label_smoothing);
  const Reduction how = check_reduction(kForward, reduction);
  const BackendScope scope;
  const auto [loss, logsumexp, total_weight] = empty_results(input, how);
  const DenseArguments dense(input, target, weight);
  const CrossEntropyProblem problem = to_problem(input, dense, how, ignore_index, label_smoothing);
  const LabelError error = cpu::cross_entropy({.problem = problem,
                                               .loss = loss.mutable_data_ptr(),
                                               .logsumexp = logsumexp.mutable_data_ptr(),
                                               .total_weight = total_weight.mutable_data_ptr(),
                                               .partials = nullptr},
                                              torch_threads());
  check_labels(kForward, problem.c, problem.h, problem.w, ignore_index, error);
  return {loss, logsumexp, total_weight};
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_output,
                                  const Tensor& input,
                                  const Tensor& target,
                                  const std::optional<Tensor>& weight,
                                  const Tensor& logsumexp,
                                  const Tensor& total_weight,
                                  std::string_view reduction,
                                  int64_t ignore_index,
                                  double label_smoothing) {
  const Reduction how = check_reduction(kBackward, reduction);
  check_backward(grad_output, input, target, weight, logsumexp, total_weight, how, label_smoothing);
  const BackendScope scope;
  const Tensor grad_input = empty_grad_input(input);
  const DenseArguments dense(input, target, weight);
  const Tensor dense_grad_output = grad_output.contiguous();
  const Tensor dense_logsumexp = logsumexp.contiguous();
  const CrossEntropyProblem problem = to_problem(input, dense, how, ignore_index, label_smoothing);
  const LabelError error = cpu::cross_entropy_backward(
      backward_params(problem, dense_grad_output, dense_logsumexp, total_weight, grad_input),
      torch_threads());
  check_labels(kBackward, problem.c, problem.h, problem.w, ignore_index, error);
  return grad_input;
}

// ---- CUDA ---------------------------------------------------------------------------------------

#ifdef DILSEG_WITH_CUDA

std::tuple<Tensor, Tensor, Tensor> cross_entropy_cuda(const Tensor& input,
                                                      const Tensor& target,
                                                      const std::optional<Tensor>& weight,
                                                      std::string_view reduction,
                                                      int64_t ignore_index,
                                                      double label_smoothing) {
  check_problem(kForward, input, target, weight, label_smoothing);
  const Reduction how = check_reduction(kForward, reduction);
  const BackendScope scope;
  const c10::DeviceGuard guard(input.device());
  const auto [loss, logsumexp, total_weight] = empty_results(input, how);
  const DenseArguments dense(input, target, weight);
  const CrossEntropyProblem problem = to_problem(input, dense, how, ignore_index, label_smoothing);
  const Tensor partials = at::empty({2, cross_entropy_partials(dense.target.numel())},
                                    input.options().dtype(at::kDouble));
  check_status(kForward,
               cuda::launch_cross_entropy({.problem = problem,
                                           .loss = loss.mutable_data_ptr(),
                                           .logsumexp = logsumexp.mutable_data_ptr(),
                                           .total_weight = total_weight.mutable_data_ptr(),
                                           .partials = partials.mutable_data_ptr<double>()},
                                          current_stream(input.device())));
  return {loss, logsumexp, total_weight};
}

Tensor cross_entropy_backward_cuda(const Tensor& grad_output,
                                   const Tensor& input,
                                   const Tensor& target,
                                   const std::optional<Tensor>& weight,
                                   const Tensor& logsumexp,
                                   const Tensor& total_weight,
                                   std::string_view reduction,
                                   int64_t ignore_index,
                                   double label_smoothing) {
  const Reduction how = check_reduction(kBackward, reduction);
  check_backward(grad_output, input, target, weight, logsumexp, total_weight, how, label_smoothing);
  const BackendScope scope;
  const c10::DeviceGuard guard(input.device());
  const Tensor grad_input = empty_grad_input(input);
  const DenseArguments dense(input, target, weight);
  const Tensor dense_grad_output = grad_output.contiguous();
  const Tensor dense_logsumexp = logsumexp.contiguous();
  const CrossEntropyProblem problem = to_problem(input, dense, how, ignore_index, label_smoothing);
  check_status(
      kBackward,
      cuda::launch_cross_entropy_backward(
          backward_params(problem, dense_grad_output, dense_logsumexp, total_weight, grad_input),
          current_stream(input.device())));
  return grad_input;
}

#endif

}  // namespace

TORCH_LIBRARY_IMPL(dilseg, Meta, m) {
  m.impl(kForward, TORCH_FN(cross_entropy_meta));
  m.impl(kBackward, TORCH_FN(cross_entropy_backward_meta));
}

TORCH_LIBRARY_IMPL(dilseg, CPU, m) {
  m.impl(kForward, TORCH_FN(cross_entropy_cpu));
  m.impl(kBackward, TORCH_FN(cross_entropy_backward_cpu));
}

TORCH_LIBRARY_IMPL(dilseg, CUDA, m) {
#ifdef DILSEG_WITH_CUDA
  m.impl(kForward, TORCH_FN(cross_entropy_cuda));
  m.impl(kBackward, TORCH_FN(cross_entropy_backward_cuda));
#else
  for (const char* op : {kForward, kBackward}) {
    m.impl(op, torch::CppFunction::makeFromBoxedFunction<&cuda_unavailable>());
  }
#endif
}

}  // namespace dilseg::ops
