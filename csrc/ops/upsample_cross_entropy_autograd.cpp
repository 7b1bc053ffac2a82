// SPDX-License-Identifier: Apache-2.0
//
// Gradients of upsample_cross_entropy and of upsample_cross_entropy_backward, a formula of
// upsample_add, its gradient and ATen ops.
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

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <c10/core/GradMode.h>
#include <c10/core/SymInt.h>
#include <torch/library.h>

namespace dilseg::ops {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

using ScaleFactors = std::optional<at::ArrayRef<double>>;

constexpr const char* kForward = "upsample_cross_entropy";
constexpr const char* kBackward = "upsample_cross_entropy_backward";

using LossOptions = std::tuple<Scales,       // scale_factors
                               bool,         // align_corners
                               std::string,  // border
                               SymInts,      // origin
                               std::string,  // reduction
                               int64_t,      // ignore_index
                               double>;      // label_smoothing

// ---- upsample_cross_entropy ---------------------------------------------------------------------

struct UpsampleCrossEntropyRule {
  static constexpr const char* kName = "UpsampleCrossEntropyBackward";
  static constexpr size_t kInputs = 1;  // input
  // input, target, weight, total_weight; sum_grad, where forward computed it
  using Saved = std::array<Tensor, 5>;
  using Options = LossOptions;

  static variable_list gradients(const variable_list& grads,
                                 const Needs<kInputs>& needs,
                                 const Saved& saved,
                                 const Options& options) {
    const auto& [input, target, weight, total_weight, sum_grad] = saved;
    const auto& [scales, align_corners, border, origin, reduction, ignore_index, label_smoothing] =
        options;
    variable_list result(kInputs);
    if (!grads[0].defined() || !needs[0]) {
      return result;
    }
    if (sum_grad.defined() && !c10::GradMode::is_enabled()) {
      Tensor factor = grads[0];
      if (reduction == "mean") {
        // Nothing labelled: the gradient is 0, not 0 * inf.
        factor = at::where(total_weight.eq(0), 0, factor / total_weight);
      }
      result[0] = (sum_grad * factor).to(input.scalar_type());
    } else {
      // With create_graph, and for losses of single pixels: an op that can be differentiated
      // again. It gives the same bits.
      result[0] = upsample_cross_entropy_backward_op().call(grads[0],
                                                            input,
                                                            target,
                                                            given(weight),
                                                            total_weight,
                                                            scales,
                                                            align_corners,
                                                            border,
                                                            origin,
                                                            reduction,
                                                            ignore_index,
                                                            label_smoothing);
    }
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> upsample_cross_entropy_autograd(
    c10::DispatchKeySet keys,
    const Tensor& input,
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
  refuse_tangent(kForward, "input", input);
  refuse_tangent(kForward, "weight", weight);
  refuse_weight_gradient(kForward, weight);
  auto [loss, total_weight, sum_grad] = below_autograd(upsample_cross_entropy_op(),
                                                       keys,
                                                       input,
                                                       target,
                                                       weight,
                                                       scale_factors,
                                                       align_corners,
                                                       border,
                                                       origin,
                                                       reduction,
                                                       ignore_index,
                                                       label_smoothing,
                                                       gradient);
  if (compute_requires_grad(input)) {
    const auto node = make_node<UpsampleCrossEntropyRule>(input);
    node->save(0, input);
    node->save(1, target);
    node->save(2, weight.value_or(Tensor()));
    node->save(3, total_weight);
    if (gradient && reduction != "none") {
      node->save(4, sum_grad);
    }
    node->options = {keep(scale_factors),
                     align_corners,
                     std::string(border),
                     origin.vec(),
                     std::string(reduction),
                     ignore_index,
                     label_smoothing};
    set_history(loss, node);
  }
  return {std::move(loss), std::move(total_weight), std::move(sum_grad)};
}

// ---- upsample_cross_entropy_backward ------------------------------------------------------------

// The op is U^T B(g, U x), U the upsampling, B the gradient of cross_entropy.
struct UpsampleCrossEntropyBackwardRule {
  static constexpr const char* kName = "UpsampleCrossEntropyBackwardBackward";
  static constexpr size_t kInputs = 2;  // grad_output, input
  using Saved = std::array<Tensor, 5>;  // grad_output, input, target, weight, total_weight
  using Options = LossOptions;

  static variable_list gradients(const variable_list& grads,
                                 const Needs<kInputs>& needs,
                                 const Saved& saved,
                                 const Options& options) {
    const auto& [grad_output, input, target, weight, total_weight] = saved;
    const auto& [scales, align_corners, border, origin, reduction, ignore_index, label_smoothing] =
        options;
    variable_list result(kInputs);
    if (!grads[0].defined()) {
      return result;
    }
    const std::array<SymInt, 2> fine_size = {target.sym_size(1), target.sym_size(2)};
    const std::array<SymInt, 2> no_offset = {0, 0};
    const auto upsample = [&](const Tensor& coarse) {
      return upsample_add_op().call(coarse.to(grad_output.scalar_type()),
                                    std::nullopt,
                                    fine_size,
                                    scales,
                                    align_corners,
                                    border,
                                    no_offset,
                                    origin);
    };
    const auto [grad_grad_output, grad_logits] = loss_second_order(upsample(grads[0]),
                                                                   grad_output,
                                                                   upsample(input),
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
      result[1] = upsample_add_backward_op()
                      .call(grad_logits, plane(input), scales, align_corners, border, origin)
                      .to(input.scalar_type());
    }
    return result;
  }
};

Tensor upsample_cross_entropy_backward_autograd(c10::DispatchKeySet keys,
                                                const Tensor& grad_output,
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
  refuse_tangent(kBackward, "grad_output", grad_output);
  refuse_tangent(kBackward, "input", input);
  Tensor grad_input = below_autograd(upsample_cross_entropy_backward_op(),
                                     keys,
                                     grad_output,
                                     input,
                                     target,
                                     weight,
                                     total_weight,
                                     scale_factors,
                                     align_corners,
                                     border,
                                     origin,
                                     reduction,
                                     ignore_index,
                                     label_smoothing);
  if (compute_requires_grad(grad_output, input)) {
    const auto node = make_node<UpsampleCrossEntropyBackwardRule>(grad_output, input);
    node->save(0, grad_output);
    node->save(1, input);
    node->save(2, target);
    node->save(3, weight.value_or(Tensor()));
    node->save(4, total_weight);
    node->options = {keep(scale_factors),
                     align_corners,
                     std::string(border),
                     origin.vec(),
                     std::string(reduction),
                     ignore_index,
                     label_smoothing};
    set_history(grad_input, node);
  }
  return grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(dilseg, Autograd, m) {
  m.impl(kForward, TORCH_FN(upsample_cross_entropy_autograd));
  m.impl(kBackward, TORCH_FN(upsample_cross_entropy_backward_autograd));
}

}  // namespace dilseg::ops
