// SPDX-License-Identifier: Apache-2.0
//
// Gradients of upsample_add, which is linear, and of upsample_add_backward, its transpose: the
// gradient of either is the other. No tensor is kept.
#include "ops/autograd.h"
#include "ops/registered.h"

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include <ATen/Functions.h>
#include <c10/core/SymInt.h>
#include <torch/library.h>

namespace dilseg::ops {
namespace {

using at::Tensor;
using c10::SymInt;
using c10::SymIntArrayRef;

using ScaleFactors = std::optional<at::ArrayRef<double>>;

// ---- upsample_add -------------------------------------------------------------------------------

// Surrounds the gradient by the zeros that the uncropped part of the skip receives.
Tensor pad_to_skip(const Tensor& grad, const SymInts& skip_size, const SymInts& offset) {
  const SymInt& top = offset[0];
  const SymInt& left = offset[1];
  const SymInt bottom = skip_size[0] - grad.sym_size(2) - top;
  const SymInt right = skip_size[1] - grad.sym_size(3) - left;
  if (top == 0 && left == 0 && bottom == 0 && right == 0) {
    return grad;
  }
  return at::constant_pad_nd_symint(grad, SymInts{left, right, top, bottom});
}

struct UpsampleAddRule {
  static constexpr const char* kName = "UpsampleAddBackward";
  static constexpr size_t kInputs = 2;  // input, skip
  using Saved = std::array<Tensor, 0>;
  using Options = std::tuple<SymInts,      // input_size
                             SymInts,      // skip_size; empty without a skip
                             Scales,       // scale_factors
                             bool,         // align_corners
                             std::string,  // border
                             SymInts,      // offset
                             SymInts>;     // origin

  static variable_list gradients(const variable_list& grads,
                                 const Needs<kInputs>& needs,
                                 const Saved&,
                                 const Options& options) {
    const auto& [input_size, skip_size, scales, align_corners, border, offset, origin] = options;
    const Tensor& grad = grads[0];
    variable_list result(kInputs);
    if (!grad.defined()) {
      return result;
    }
    if (needs[0]) {
      result[0] =
          upsample_add_backward_op().call(grad, input_size, scales, align_corners, border, origin);
    }
    if (needs[1]) {
      result[1] = pad_to_skip(grad, skip_size, offset);
    }
    return result;
  }
};

Tensor upsample_add_autograd(c10::DispatchKeySet keys,
                             const Tensor& input,
                             const std::optional<Tensor>& skip,
                             SymIntArrayRef output_size,
                             ScaleFactors scale_factors,
                             bool align_corners,
                             std::string_view border,
                             SymIntArrayRef offset,
                             SymIntArrayRef origin) {
  constexpr const char* op = "upsample_add";
  refuse_tangent(op, "input", input);
  refuse_tangent(op, "skip", skip);
  Tensor output = below_autograd(upsample_add_op(),
                                 keys,
                                 input,
                                 skip,
                                 output_size,
                                 scale_factors,
                                 align_corners,
                                 border,
                                 offset,
                                 origin);
  if (compute_requires_grad(input, skip)) {
    const auto node = make_node<UpsampleAddRule>(input, skip);
    node->options = {plane(input),
                     skip.has_value() ? plane(*skip) : SymInts(),
                     keep(scale_factors),
                     align_corners,
                     std::string(border),
                     offset.vec(),
                     origin.vec()};
    set_history(output, node);
  }
  return output;
}

// ---- upsample_add_backward ----------------------------------------------------------------------

struct UpsampleAddBackwardRule {
  static constexpr const char* kName = "UpsampleAddBackwardBackward";
  static constexpr size_t kInputs = 1;  // grad_output
  using Saved = std::array<Tensor, 0>;
  using Options = std::tuple<SymInts,      // output_size
                             Scales,       // scale_factors
                             bool,         // align_corners
                             std::string,  // border
                             SymInts>;     // origin

  static variable_list gradients(const variable_list& grads,
                                 const Needs<kInputs>& needs,
                                 const Saved&,
                                 const Options& options) {
    const auto& [output_size, scales, align_corners, border, origin] = options;
    variable_list result(kInputs);
    if (grads[0].defined() && needs[0]) {
      const std::array<SymInt, 2> no_offset = {0, 0};
      result[0] = upsample_add_op().call(
          grads[0], std::nullopt, output_size, scales, align_corners, border, no_offset, origin);
    }
    return result;
  }
};

Tensor upsample_add_backward_autograd(c10::DispatchKeySet keys,
                                      const Tensor& grad_output,
                                      SymIntArrayRef input_size,
                                      ScaleFactors scale_factors,
                                      bool align_corners,
                                      std::string_view border,
                                      SymIntArrayRef origin) {
  refuse_tangent("upsample_add_backward", "grad_output", grad_output);
  Tensor grad_input = below_autograd(upsample_add_backward_op(),
                                     keys,
                                     grad_output,
                                     input_size,
                                     scale_factors,
                                     align_corners,
                                     border,
                                     origin);
  if (compute_requires_grad(grad_output)) {
    const auto node = make_node<UpsampleAddBackwardRule>(grad_output);
    node->options = {
        plane(grad_output), keep(scale_factors), align_corners, std::string(border), origin.vec()};
    set_history(grad_input, node);
  }
  return grad_input;
}

}  // namespace

TORCH_LIBRARY_IMPL(dilseg, Autograd, m) {
  m.impl("upsample_add", TORCH_FN(upsample_add_autograd));
  m.impl("upsample_add_backward", TORCH_FN(upsample_add_backward_autograd));
}

}  // namespace dilseg::ops
