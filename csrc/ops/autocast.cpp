// SPDX-License-Identifier: Apache-2.0
//
// What torch.autocast does to each op, on CUDA and on the CPU:
//   dilated_conv2d   input, weight and bias go to the autocast dtype, as for torch's convolutions;
//   upsample_add     input and skip go to the wider of their dtypes;
//   cross_entropy, upsample_cross_entropy and upsample_argmax run as they are: they take half
//   logits
//                    and compute in float32, so the cast to float32 that torch's loss gets would
//                    only cost memory. No rule is registered, and torch lets ops without one
//                    through.
// The casts are made above autograd, so gradients return to the dtypes of the arguments; the
// gradient ops then see tensors of one dtype and need no rules.
#include "ops/registered.h"

#include <optional>
#include <string_view>

#include <ATen/autocast_mode.h>
#include <c10/core/ScalarType.h>
#include <torch/library.h>

namespace dilseg::ops {
namespace {

using at::IntArrayRef;
using at::Tensor;
using at::autocast::cached_cast;

template <c10::DeviceType kDevice>
Tensor dilated_conv2d_autocast(const Tensor& input,
                               const Tensor& weight,
                               const std::optional<Tensor>& bias,
                               IntArrayRef stride,
                               IntArrayRef padding,
                               IntArrayRef dilation,
                               int64_t groups,
                               std::optional<std::string_view> activation) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType type = at::autocast::get_autocast_dtype(kDevice);
  return dilated_conv2d_op().call(cached_cast(type, input, kDevice),
                                  cached_cast(type, weight, kDevice),
                                  cached_cast(type, bias, kDevice),
                                  stride,
                                  padding,
                                  dilation,
                                  groups,
                                  activation);
}

template <c10::DeviceType kDevice>
Tensor upsample_add_autocast(const Tensor& input,
                             const std::optional<Tensor>& skip,
                             c10::SymIntArrayRef output_size,
                             std::optional<at::ArrayRef<double>> scale_factors,
                             bool align_corners,
                             std::string_view border,
                             c10::SymIntArrayRef offset,
                             c10::SymIntArrayRef origin) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType type = skip.has_value()
                                  ? c10::promoteTypes(input.scalar_type(), skip->scalar_type())
                                  : input.scalar_type();
  return upsample_add_op().call(cached_cast(type, input, kDevice),
                                cached_cast(type, skip, kDevice),
                                output_size,
                                scale_factors,
                                align_corners,
                                border,
                                offset,
                                origin);
}

}  // namespace

TORCH_LIBRARY_IMPL(dilseg, AutocastCUDA, m) {
  m.impl("dilated_conv2d", TORCH_FN(dilated_conv2d_autocast<c10::kCUDA>));
  m.impl("upsample_add", TORCH_FN(upsample_add_autocast<c10::kCUDA>));
}

TORCH_LIBRARY_IMPL(dilseg, AutocastCPU, m) {
  m.impl("dilated_conv2d", TORCH_FN(dilated_conv2d_autocast<c10::kCPU>));
  m.impl("upsample_add", TORCH_FN(upsample_add_autocast<c10::kCPU>));
}

}  // namespace dilseg::ops
