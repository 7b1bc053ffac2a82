// SPDX-License-Identifier: Apache-2.0
//
// What the gradients of the per-pixel losses share.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/functions/utils.h>

namespace dilseg::ops {

inline void refuse_weight_gradient(const char* op, const std::optional<at::Tensor>& weight) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !torch::autograd::compute_requires_grad(weight),
      "dilseg::",
      op,
      ": expected weight without requires_grad, but got a weight that requires a gradient. The "
      "loss is not differentiable with respect to its class weights; pass weight.detach().");
}

// Gradients of a loss's gradient with respect to grad_output (g) and input, for an incoming
// gradient G [n, c, h, w].
//
// With class weights v, V = sum_c v_c, smoothing s over C classes, p = softmax(input) and label y,
// a valid pixel of the backward op holds
//
//     g * (a * p_c - b_c),  a = (1 - s) v_y + (s / C) V,  b_c = (1 - s) v_y [c = y] + (s / C) v_c
//
// so that
//
//     grad_g = sum_c G_c (a p_c - b_c)        grad_input_c = g a p_c (G_c - sum_k p_k G_k).
//
// p is recomputed from `input` rather than from the saved logsumexp, which carries no gradient:
// derivatives of any order are right. Both results have the dtype of grad_output.
inline std::tuple<at::Tensor, at::Tensor> loss_second_order(at::Tensor grad,
                                                            const at::Tensor& grad_output,
                                                            const at::Tensor& input,
                                                            const at::Tensor& target,
                                                            const at::Tensor& class_weight,
                                                            const at::Tensor& total_weight,
                                                            std::string_view reduction,
                                                            int64_t ignore_index,
                                                            double label_smoothing) {
  using at::Tensor;
  const at::ScalarType type = grad_output.scalar_type();
  const bool mean = reduction == "mean";
  const bool pixels = reduction == "none";

  // Widened before the comparison: an ignore_index of -100 would wrap around in uint8.
  const Tensor wide = target.to(at::kLong);
  const Tensor valid = wide.ne(ignore_index);
  const Tensor label = at::where(valid, wide, 0);
  const Tensor mask = valid.unsqueeze(1);
  // Ignored pixels may hold anything, nan included; zeros in their place keep every product below
  // finite.
  const Tensor prob = at::softmax(at::where(mask, input, 0).to(type), 1);
  grad = at::where(mask, grad, 0).to(type);
  const Tensor weight = class_weight.defined()
                            ? class_weight.to(type)
                            : at::ones_symint({input.sym_size(1)}, grad_output.options());

  const Tensor hard = at::index(weight, {label}).unsqueeze(1) * (1 - label_smoothing);
  const Tensor soft = (weight * label_smoothing / at::ones_like(weight).sum()).view({1, -1, 1, 1});
  const Tensor a = hard + soft.sum();

  const Tensor weighted = (grad * (a * prob - soft)).sum(1);
  const Tensor picked = (grad.gather(1, label.unsqueeze(1)) * hard).squeeze(1);
  Tensor grad_grad_output = at::where(valid, weighted - picked, 0);
  Tensor scale = pixels ? grad_output.unsqueeze(1) : grad_output;
  if (!pixels) {
    grad_grad_output = grad_grad_output.sum();
  }
  if (mean) {
    // Over no valid pixel the op's result is 0, and so are its derivatives.
    const Tensor total = at::where(total_weight.eq(0), 1, total_weight);
    grad_grad_output = grad_grad_output / total;
    scale = scale / total;
  }
  const Tensor centred = grad - (prob * grad).sum(1, /*keepdim=*/true);
  return {grad_grad_output, at::where(mask, scale * a * prob * centred, 0)};
}

}  // namespace dilseg::ops
