// SPDX-License-Identifier: Apache-2.0
//
// upsample_argmax has no gradient: its results do not require one, whatever the input does.
#include "ops/autograd.h"
#include "ops/registered.h"

#include <optional>
#include <string_view>
#include <tuple>

#include <torch/library.h>

namespace dilseg::ops {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> upsample_argmax_autograd(
    c10::DispatchKeySet keys,
    const Tensor& input,
    c10::SymIntArrayRef output_size,
    std::optional<at::ArrayRef<double>> scale_factors,
    bool align_corners,
    std::string_view border,
    c10::SymIntArrayRef origin,
    at::ScalarType dtype,
    bool confidence) {
  refuse_tangent("upsample_argmax", "input", input);
  return below_autograd(upsample_argmax_op(),
                        keys,
                        input,
                        output_size,
                        scale_factors,
                        align_corners,
                        border,
                        origin,
                        dtype,
                        confidence);
}

}  // namespace

TORCH_LIBRARY_IMPL(dilseg, Autograd, m) {
  m.impl("upsample_argmax", TORCH_FN(upsample_argmax_autograd));
}

}  // namespace dilseg::ops
