// SPDX-License-Identifier: Apache-2.0
//
// cross_entropy and its gradient for torch. One function per op checks the arguments, symbolically,
// for CPU, CUDA and Meta alike; csrc/cpu and csrc/cuda compute.
#include "dilseg/cross_entropy.h"

#include "ops/checks.h"
#include "ops/common.h"

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

constexpr const char* kForward = "cross_entropy";
constexpr const char* kBackward = "cross_entropy_backward";

// ---- arguments and sizes ------------------------------------------------------------------------

// Dtype of loss, logsumexp and total_weight, and of the arithmetic.
at::ScalarType loss_type(const Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_shape(const char* op,
                 const char* name,
                 const Tensor& tensor,
                 const char* layout,
                 SymIntArrayRef wanted,
                 const Tensor& input) {
  bool equal = tensor.dim() == static_cast<int64_t>(wanted.size());
  for (size_t axis = 0; equal && axis < wanted.size(); ++axis) {
    equal = holds(tensor.sym_size(static_cast<int64_t>(axis)).sym_eq(wanted[axis]));
  }
  DILSEG_CHECK_VALUE(op,
                     equal,
                     format("expected {} of shape {} = {}, but got shape {} for input of shape {}.",
                            name,
                            layout,
                            wanted,
                            tensor.sym_sizes(),
                            input.sym_sizes()));
}

void check_scalar(const char* op, const char* name, const Tensor& tensor) {
  DILSEG_CHECK_VALUE(
      op,
      tensor.dim() == 0,
      format("expected {} of shape [], a scalar, but got shape {}.", name, tensor.sym_sizes()));
}

void check_loss_type(const char* op, const char* name, const Tensor& tensor, const Tensor& input) {
  DILSEG_CHECK_TYPE(op,
                    tensor.scalar_type() == loss_type(input),
                    format("expected {} of dtype {} for input of dtype {}, but got {}. Pass what "
                           "the forward call returned, or its gradient.",
                           name,
                           dtype_name(loss_type(input)),
                           dtype_name(input.scalar_type()),
                           dtype_name(tensor.scalar_type())));
  check_same_device(op, "input", input, name, tensor);
}

Reduction check_reduction(const char* op, std::string_view reduction) {
  DILSEG_CHECK_VALUE(
      op,
      reduction == "none" || reduction == "mean" || reduction == "sum",
      format("expected reduction \"none\", \"mean\" or \"sum\", but got \"{}\".", reduction));
  return reduction == "none"   ? Reduction::kNone
         : reduction == "mean" ? Reduction::kMean
                               : Reduction::kSum;
}

std::array<SymInt, 3> pixel_sizes(const Tensor& input) {
  return {input.sym_size(0), input.sym_size(2), input.sym_size(3)};
}

void check_problem(const char* op,
                   const Tensor& input,
                   const Tensor& target,
                   const std::optional<Tensor>& weight,
                   double label_smoothing) {
  check_rank(op, "input", input, 4, "[n, c, h, w]");
  check_float(op, "input", input);
  DILSEG_CHECK_VALUE(op,
                     input.sym_size(1).sym_ge(1),
                     format("expected input [n, c, h, w] with at least 1 class, but got shape {}.",
                            input.sym_sizes()));
  const at::ScalarType type = target.scalar_type();
  DILSEG_CHECK_TYPE(
      op,
      type == at::kLong || type == at::kInt || type == at::kByte,
      format("expected target of dtype int64, int32 or uint8, but got {}. Convert class indices "
             "with .to(torch.int64); class probabilities are not supported.",
             dtype_name(type)));
  check_shape(op, "target", target, "[n, h, w]", pixel_sizes(input), input);
  check_same_device(op, "input", input, "target", target);
  if (weight.has_value()) {
    DILSEG_CHECK_TYPE(
        op,
        weight->scalar_type() == input.scalar_type() || weight->scalar_type() == loss_type(input),
        format("expected weight of the dtype of input, {}, or of the loss, {}, but got weight of "
               "dtype {}. Convert it with weight.to(input.dtype).",
               dtype_name(input.scalar_type()),
               dtype_name(loss_type(input)),
               dtype_name(weight->scalar_type())));
    const std::array<SymInt, 1> classes = {input.sym_size(1)};
    check_shape(op, "weight", *weight, "[c]", classes, input);
    check_same_device(op, "input", input, "weight", *weight);
  }
  DILSEG_CHECK_VALUE(op,
                     label_smoothing >= 0 && label_smoothing <= 1,
                     format("expected label_smoothing in [0, 1], but got {}.", label_smoothing));
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
  return {
      reduction == Reduction::kNone ? at::empty_symint(pixels, options) : at::empty({}, options),
      at::empty_symint(pixels, options),
      at::empty({}, options)};
}

Tensor empty_grad_input(const Tensor& input) {
  return at::empty_symint(input.sym_sizes(), input.options(), input.suggest_memory_format());
}

IndexType to_index_type(at::ScalarType type) {
  return type == at::kLong  ? IndexType::kInt64
         : type == at::kInt ? IndexType::kInt32
                            : IndexType::kUInt8;
}

// The dense copies that the kernels read must outlive the launch.
struct DenseArguments {
  Tensor target;
  Tensor weight;

  DenseArguments(const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight)
      : target(target.contiguous()),
        weight(weight.has_value() ? weight->to(loss_type(input)).contiguous() : Tensor()) {}
};

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

void check_labels(const char* op, const CrossEntropyProblem& p, const LabelError& error) {
  DILSEG_CHECK_VALUE(
      op,
      error.pixel < 0,
      format("expected target labels in [0, {}) for {} classes, or ignore_index={}, but got label "
             "{} at pixel n={}, h={}, w={}; did you forget ignore_index=255?",
             p.c,
             p.c,
             p.ignore_index,
             error.label,
             error.pixel / (p.h * p.w),
             error.pixel / p.w % p.h,
             error.pixel % p.w));
}

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
  check_labels(kForward, problem, error);
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
  check_labels(kBackward, problem, error);
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
