// SPDX-License-Identifier: Apache-2.0
//
// Gradients of cross_entropy, an op of its own, and of cross_entropy_backward, a formula of ATen
// ops.
#include "ops/autograd.h"
#include "ops/loss_autograd.h"
#include "ops/registered.h"

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include <torch/library.h>

namespace dilseg::ops {
namespace {

using at::Tensor;

constexpr const char* kForward = "cross_entropy";
constexpr const char* kBackward = "cross_entropy_backward";

using LossOptions = std::tuple<std::string,  // reduction
                               int64_t,      // ignore_index
                               double>;      // label_smoothing

// ---- cross_entropy ------------------------------------------------------------------------------

struct CrossEntropyRule {
  static constexpr const char* kName = "CrossEntropyBackward";
  static constexpr size_t kInputs = 1;  // input
  using Saved = std::array<Tensor, 5>;  // input, target, weight, logsumexp, total_weight
  using Options = LossOptions;

  static variable_list gradients(const variable_list& grads,
                                 const Needs<kInputs>& needs,
                                 const Saved& saved,
                                 const Options& options) {
    const auto& [input, target, weight, logsumexp, total_weight] = saved;
    const auto& [reduction, ignore_index, label_smoothing] = options;
    variable_list result(kInputs);
    if (grads[0].defined() && needs[0]) {
      result[0] = cross_entropy_backward_op().call(grads[0],
                                                   input,
                                                   target,
                                                   given(weight),
                                                   logsumexp,
                                                   total_weight,
                                                   reduction,
                                                   ignore_index,
                                                   label_smoothing);
    }
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> cross_entropy_autograd(c10::DispatchKeySet keys,
                                                          const Tensor& input,
                                                          const Tensor& target,
                                                          const std::optional<Tensor>& weight,
                                                          std::string_view reduction,
                                                          int64_t ignore_index,
                                                          double label_smoothing) {
  refuse_tangent(kForward, "input", input);
  refuse_tangent(kForward, "weight", weight);
  refuse_weight_gradient(kForward, weight);
  auto [loss, logsumexp, total_weight] = below_autograd(
      cross_entropy_op(), keys, input, target, weight, reduction, ignore_index, label_smoothing);
  if (compute_requires_grad(input)) {
    const auto node = make_node<CrossEntropyRule>(input);
    node->save(0, input);
    node->save(1, target);
    node->save(2, weight.value_or(Tensor()));
    node->save(3, logsumexp);
    node->save(4, total_weight);
    node->options = {std::string(reduction), ignore_index, label_smoothing};
    set_history(loss, node);
  }
  return {std::move(loss), std::move(logsumexp), std::move(total_weight)};
}

// ---- cross_entropy_backward ---------------------------------------------------------------------

struct CrossEntropyBackwardRule {
  static constexpr const char* kName = "CrossEntropyBackwardBackward";
  static constexpr size_t kInputs = 2;  // grad_output, input
  using Saved = std::array<Tensor, 5>;  // grad_output, input, target, weight, total_weight
  using Options = LossOptions;

  static variable_list gradients(const variable_list& grads,
                                 const Needs<kInputs>& needs,
                                 const Saved& saved,
                                 const Options& options) {
    const auto& [grad_output, input, target, weight, total_weight] = saved;
    const auto& [reduction, ignore_index, label_smoothing] = options;
    variable_list result(kInputs);
    if (!grads[0].defined()) {
      return result;
    }
    const auto [grad_grad_output, grad_input] = loss_second_order(grads[0],
                                                                  grad_output,
                                                                  input,
                                                                  target,
                                                                  weight,
                                                                  total_weight,
                                                                  reduction,
                                                                  ignore_index,
                                                                  label_smoothing);
    if (needs[0]) {
      result[0] = grad_grad_output;
    }
    if (needs[1]) {
      result[1] = grad_input.to(input.scalar_type());
    }
    return result;
  }
};

Tensor cross_entropy_backward_autograd(c10::DispatchKeySet keys,
                                       const Tensor& grad_output,
                                       const Tensor& input,
                                       const Tensor& target,
                                       const std::optional<Tensor>& weight,
                                       const Tensor& logsumexp,
                                       const Tensor& total_weight,
                                       std::string_view reduction,
                                       int64_t ignore_index,
                                       double label_smoothing) {
  refuse_tangent(kBackward, "grad_output", grad_output);
  refuse_tangent(kBackward, "input", input);
  Tensor grad_input = below_autograd(cross_entropy_backward_op(),
                                     keys,
                                     grad_output,
                                     input,
                                     target,
                                     weight,
                                     logsumexp,
                                     total_weight,
                                     reduction,
                                     ignore_index,
                                     label_smoothing);
  if (compute_requires_grad(grad_output, input)) {
    const auto node = make_node<CrossEntropyBackwardRule>(grad_output, input);
    node->save(0, grad_output);
    node->save(1, input);
    node->save(2, target);
    node->save(3, weight.value_or(Tensor()));
    node->save(4, total_weight);
    node->options = {std::string(reduction), ignore_index, label_smoothing};
    set_history(grad_input, node);
  }
  return grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(dilseg, Autograd, m) {
  m.impl(kForward, TORCH_FN(cross_entropy_autograd));
  m.impl(kBackward, TORCH_FN(cross_entropy_backward_autograd));
}

}  // namespace dilseg::ops
