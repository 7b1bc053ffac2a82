// SPDX-License-Identifier: Apache-2.0
//
// Which convolutions run in kernels of ours on the CPU, as pure functions of the problem; all
// others are ATen's. The thresholds are where float32 on two threads stopped being faster, with
// AVX2 unless said otherwise, see docs/kernels/dilated_conv2d.md.
#pragma once

#include "dilseg/cpu.h"
#include "dilseg/dilated_conv2d.h"

#include <algorithm>

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

// oneDNN's kernels for NCHW slow down where a window is this much wider than one column; those for
// channels_last do not, and gain more than two copies cost.
constexpr int64_t kWideWindow = 8;

// Whether channels_last inside, and back, is faster for a dense forward pass. With AVX-512 oneDNN
// blocks the channels of NCHW by 16, which leaves little to gain but where a block stays half empty
// and where there are many channels.
constexpr bool prefers_channels_last(const DilatedConv2dShape& s, InstructionSet set) {
  const bool wide = s.groups == 1 && s.stride_w == 1 && (s.k_w - 1) * s.dil_w >= kWideWindow &&
                    s.h_out * s.w_out >= 400;
  if (set != InstructionSet::kAvx512) {
    return wide && s.c_in >= 12 && s.c_in <= 512;
  }
  const bool half_empty = s.c_in > 16 && s.c_in < 24;
  const bool many = s.k_w <= 3 && std::min(s.c_in, s.c_out) >= 128 && s.c_in <= 512;
  return wide && (half_empty || many);
}

// Winograd's F(2x2, 3x3) against the direct convolution, in multiply-adds: 16 instead of 36 per
// tile of 2x2 results and pair of channels, but a tile costs as much again as kWinogradPasses
// products in each input and each output channel, and a pair of channels as much as 32 tiles. Where
// a phase of the dilation has an odd number of rows, tiles reach beyond it.
constexpr double kWinogradPasses = 61.0;

// How much faster Winograd is than ATen for a pass that writes maps of h x w pixels.
constexpr double winograd_gain(const DilatedConv2dShape& s, int64_t h, int64_t w) {
  if (s.groups != 1 || s.k_h != 3 || s.k_w != 3 || s.stride_h != 1 || s.stride_w != 1) {
    return 0.0;
  }
  const auto tiles = [](int64_t results, int64_t dilation) {
    const int64_t phase = (results + dilation - 1) / dilation;
    return static_cast<double>(std::min(dilation, results) * ((phase + 1) / 2));
  };
  const double c_in = static_cast<double>(s.c_in);
  const double c_out = static_cast<double>(s.c_out);
  const double pixels = static_cast<double>(s.n * h * w);
  const double all = static_cast<double>(s.n) * tiles(h, s.dil_h) * tiles(w, s.dil_w);
  const double ours =
      16.0 * (all * (c_in * c_out + kWinogradPasses * (c_in + c_out)) + 32.0 * c_in * c_out);
  return 9.0 * pixels * c_in * c_out / ours;
}

constexpr bool prefers_winograd(const DilatedConv2dShape& s, InstructionSet set) {
  return winograd_gain(s, s.h_out, s.w_out) >= (prefers_channels_last(s, set) ? 1.4 : 1.1);
}

constexpr bool prefers_winograd_grad_input(const DilatedConv2dShape& s) {
  return winograd_gain(s, s.h_in, s.w_in) >= 1.1;
}

}  // namespace dilseg::cpu
