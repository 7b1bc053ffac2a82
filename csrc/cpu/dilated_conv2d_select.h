// SPDX-License-Identifier: Apache-2.0
//
// Which convolutions run in kernels of ours on the CPU, as pure functions of the problem; all
// others are ATen's. The thresholds are where float32 on two threads of an AVX2 machine stopped
// being faster, see docs/kernels/dilated_conv2d.md.
#pragma once

#include "dilseg/dilated_conv2d.h"

namespace dilseg::cpu {

// Maps of up to a vector's width are left to ATen, where it is fast at all.
constexpr int64_t kNarrowMap = 8;

// ATen has something fast for one output channel per group only, and nothing in double.
constexpr bool prefers_depthwise(const DilatedConv2dShape& s, Dtype dtype) {
  const bool plain = s.stride_h == 1 && s.stride_w == 1 && s.k_h * s.k_w <= 9;
  return fits_dilated_conv2d_depthwise(s) &&
         (s.c_out > s.c_in || dtype == Dtype::kFloat64 || (plain && s.w_out > kNarrowMap));
}

constexpr bool prefers_depthwise_grad_input(const DilatedConv2dShape& s) {
  return fits_dilated_conv2d_depthwise(s);
}

// ATen has something fast for 3x3 without dilation only.
constexpr bool prefers_depthwise_grad_weight(const DilatedConv2dShape& s, Dtype dtype) {
  const bool fast = s.k_h == 3 && s.k_w == 3 && s.dil_h == 1 && s.dil_w == 1;
  const bool plain = s.stride_h == 1 && s.stride_w == 1;
  return fits_dilated_conv2d_depthwise(s) &&
         (s.c_out > s.c_in || dtype == Dtype::kFloat64 || !fast || (plain && s.w_out > kNarrowMap));
}

}  // namespace dilseg::cpu
