// SPDX-License-Identifier: Apache-2.0
//
// Gradients of dilated_conv2d, dilated_conv2d_grad_input and dilated_conv2d_grad_weight: the three
// partial maps of one trilinear form, hence closed under differentiation. Each gradient is another
// of the three.
#include "ops/autograd.h"
#include "ops/registered.h"

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

#include <ATen/Functions.h>
#include <c10/core/SymIntArrayRef.h>
#include <torch/library.h>

namespace dilseg::ops {
namespace {

using at::IntArrayRef;
using at::Tensor;
using c10::SymIntArrayRef;

// ---- dilated_conv2d -----------------------------------------------------------------------------

struct ConvRule {
  static constexpr const char* kName = "DilatedConv2dBackward";
  static constexpr size_t kInputs = 3;  // input, weight, bias
  using Saved = std::array<Tensor, 3>;  // input, weight; output, with an activation
  using Options = std::tuple<SymInts,   // input_size
                             SymInts,   // kernel_size
                             Ints,      // stride
                             Ints,      // padding
                             Ints,      // dilation
                             int64_t>;  // groups

  static variable_list gradients(const variable_list& grads,
                                 const Needs<kInputs>& needs,
                                 const Saved& saved,
                                 const Options& options) {
    const auto& [input, weight, output] = saved;
    const auto& [input_size, kernel_size, stride, padding, dilation, groups] = options;
    const auto [needs_input, needs_weight, needs_bias] = needs;
    Tensor grad = grads[0];
    variable_list result(kInputs);
    if (!grad.defined()) {
      return result;
    }
    if (output.defined()) {
      // The ReLU's mask is piecewise constant: detached, it sends no zero gradients around the
      // graph again when this formula is itself differentiated.
      grad = at::threshold_backward(grad, output.detach(), 0);
    }
    if (needs_input) {
      result[0] = dilated_conv2d_grad_input_op().call(
          grad, weight, input_size, stride, padding, dilation, groups);
    }
    if (needs_weight) {
      Tensor grad_bias;
      std::tie(result[1], grad_bias) = dilated_conv2d_grad_weight_op().call(
          grad, input, kernel_size, stride, padding, dilation, groups, needs_bias);
      if (needs_bias) {
        result[2] = grad_bias;
      }
    } else if (needs_bias) {
      result[2] = grad.sum({0, 2, 3});
    }
    return result;
  }
};

Tensor dilated_conv2d_autograd(c10::DispatchKeySet keys,
                               const Tensor& input,
                               const Tensor& weight,
                               const std::optional<Tensor>& bias,
                               IntArrayRef stride,
                               IntArrayRef padding,
                               IntArrayRef dilation,
                               int64_t groups,
                               std::optional<std::string_view> activation) {
  constexpr const char* op = "dilated_conv2d";
  refuse_tangent(op, "input", input);
  refuse_tangent(op, "weight", weight);
  refuse_tangent(op, "bias", bias);
  Tensor output = below_autograd(dilated_conv2d_op(),
                                 keys,
                                 input,
                                 weight,
                                 bias,
                                 stride,
                                 padding,
                                 dilation,
                                 groups,
                                 activation);
  if (compute_requires_grad(input, weight, bias)) {
    const auto node = make_node<ConvRule>(input, weight, bias);
    if (node->should_compute_output(1)) {
      node->save(0, input);
    }
    if (node->should_compute_output(0)) {
      node->save(1, weight);
    }
    node->options = {
        plane(input), plane(weight), stride.vec(), padding.vec(), dilation.vec(), groups};
    set_history(output, node);
    if (activation.has_value()) {
      node->save_result(2, output);
    }
  }
  return output;
}

// ---- dilated_conv2d_grad_input ------------------------------------------------------------------

struct ConvGradInputRule {
  static constexpr const char* kName = "DilatedConv2dGradInputBackward";
  static constexpr size_t kInputs = 2;  // grad_output, weight
  using Saved = std::array<Tensor, 2>;  // grad_output, weight
  using Options = std::tuple<SymInts,   // kernel_size
                             Ints,      // stride
                             Ints,      // padding
                             Ints,      // dilation
                             int64_t>;  // groups

  static variable_list gradients(const variable_list& grads,
                                 const Needs<kInputs>& needs,
                                 const Saved& saved,
                                 const Options& options) {
    const auto& [grad_output, weight] = saved;
    const auto& [kernel_size, stride, padding, dilation, groups] = options;
    const Tensor& grad = grads[0];
    variable_list result(kInputs);
    if (!grad.defined()) {
      return result;
    }
    if (needs[0]) {
      result[0] = dilated_conv2d_op().call(
          grad, weight, std::nullopt, stride, padding, dilation, groups, std::nullopt);
    }
    if (needs[1]) {
      result[1] = std::get<0>(dilated_conv2d_grad_weight_op().call(
          grad_output, grad, kernel_size, stride, padding, dilation, groups, false));
    }
    return result;
  }
};

Tensor dilated_conv2d_grad_input_autograd(c10::DispatchKeySet keys,
                                          const Tensor& grad_output,
                                          const Tensor& weight,
                                          SymIntArrayRef input_size,
                                          IntArrayRef stride,
                                          IntArrayRef padding,
                                          IntArrayRef dilation,
                                          int64_t groups) {
  constexpr const char* op = "dilated_conv2d_grad_input";
  refuse_tangent(op, "grad_output", grad_output);
  refuse_tangent(op, "weight", weight);
  Tensor grad_input = below_autograd(dilated_conv2d_grad_input_op(),
                                     keys,
                                     grad_output,
                                     weight,
                                     input_size,
                                     stride,
                                     padding,
                                     dilation,
                                     groups);
  if (compute_requires_grad(grad_output, weight)) {
    const auto node = make_node<ConvGradInputRule>(grad_output, weight);
    if (node->should_compute_output(1)) {
      node->save(0, grad_output);
    }
    if (node->should_compute_output(0)) {
      node->save(1, weight);
    }
    node->options = {plane(weight), stride.vec(), padding.vec(), dilation.vec(), groups};
    set_history(grad_input, node);
  }
  return grad_input;
}

// ---- dilated_conv2d_grad_weight -----------------------------------------------------------------

struct ConvGradWeightRule {
  static constexpr const char* kName = "DilatedConv2dGradWeightBackward";
  static constexpr size_t kInputs = 2;  // grad_output, input
  using Saved = std::array<Tensor, 2>;  // grad_output, input
  using Options = std::tuple<SymInts,   // input_size
                             SymInts,   // shape of grad_output
                             Ints,      // stride
                             Ints,      // padding
                             Ints,      // dilation
                             int64_t>;  // groups

  static variable_list gradients(const variable_list& grads,
                                 const Needs<kInputs>& needs,
                                 const Saved& saved,
                                 const Options& options) {
    const auto& [grad_output, input] = saved;
    const auto& [input_size, output_shape, stride, padding, dilation, groups] = options;
    const Tensor& grad_weight = grads[0];
    const Tensor grad_bias = grads.size() > 1 ? grads[1] : Tensor();
    variable_list result(kInputs);
    if (needs[0]) {
      if (grad_weight.defined()) {
        result[0] = dilated_conv2d_op().call(
            input, grad_weight, given(grad_bias), stride, padding, dilation, groups, std::nullopt);
      } else if (grad_bias.defined()) {
        result[0] = grad_bias.view({1, -1, 1, 1}).expand_symint(output_shape);
      }
    }
    if (needs[1] && grad_weight.defined()) {
      result[1] = dilated_conv2d_grad_input_op().call(
          grad_output, grad_weight, input_size, stride, padding, dilation, groups);
    }
    return result;
  }
};

std::tuple<Tensor, Tensor> dilated_conv2d_grad_weight_autograd(c10::DispatchKeySet keys,
                                                               const Tensor& grad_output,
                                                               const Tensor& input,
                                                               SymIntArrayRef kernel_size,
                                                               IntArrayRef stride,
                                                               IntArrayRef padding,
                                                               IntArrayRef dilation,
                                                               int64_t groups,
                                                               bool bias) {
  constexpr const char* op = "dilated_conv2d_grad_weight";
  refuse_tangent(op, "grad_output", grad_output);
  refuse_tangent(op, "input", input);
  auto [grad_weight, grad_bias] = below_autograd(dilated_conv2d_grad_weight_op(),
                                                 keys,
                                                 grad_output,
                                                 input,
                                                 kernel_size,
                                                 stride,
                                                 padding,
                                                 dilation,
                                                 groups,
                                                 bias);
  if (compute_requires_grad(grad_output, input)) {
    const auto node = make_node<ConvGradWeightRule>(grad_output, input);
    if (node->should_compute_output(1)) {
      node->save(0, grad_output);
    }
    if (node->should_compute_output(0)) {
      node->save(1, input);
    }
    node->options = {plane(input),
                     grad_output.sym_sizes().vec(),
                     stride.vec(),
                     padding.vec(),
                     dilation.vec(),
                     groups};
    set_history(grad_weight, node);
    if (bias) {
      set_history(grad_bias, node);
    }
  }
  return {std::move(grad_weight), std::move(grad_bias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(dilseg, Autograd, m) {
  m.impl("dilated_conv2d", TORCH_FN(dilated_conv2d_autograd));
  m.impl("dilated_conv2d_grad_input", TORCH_FN(dilated_conv2d_grad_input_autograd));
  m.impl("dilated_conv2d_grad_weight", TORCH_FN(dilated_conv2d_grad_weight_autograd));
}

}  // namespace dilseg::ops
