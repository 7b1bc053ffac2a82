// SPDX-License-Identifier: Apache-2.0
//
// The direct kernels, which run every problem, and their launch shapes: pure functions, without
// CUDA.
#pragma once

#include "cuda/common/gpu.h"
#include "cuda/dilated_conv2d/model.h"
#include "dilseg/dilated_conv2d.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace dilseg::cuda {

// Threads of a block in every direct kernel, and blocks an SM must be able to hold: 4 * 256 threads
// leave 64 of the SM's 64 K registers to each thread, which all direct kernels fit without
// spilling.
constexpr int kDirectThreads = 256;
constexpr int kDirectBlocks = 4;

// Lanes along the channels for the weight gradient in channels_last: one warp reads 32 neighbours.
constexpr int kWarpLanes = 32;

// The direct kernels keep coordinates in 32 bits (offsets in 64): every coordinate they form, also
// those in the padding, must lie below 2^31.
inline bool fits_dilated_conv2d(const DilatedConv2dShape& s) {
  constexpr int64_t kLimit = INT64_C(1) << 31;
  const int64_t reach_h = s.h_out * s.stride_h + s.k_h * s.dil_h + s.h_in + s.pad_top;
  const int64_t reach_w = s.w_out * s.stride_w + s.k_w * s.dil_w + s.w_in + s.pad_left;
  return std::max({reach_h, reach_w, s.c_in, s.c_out}) < kLimit;
}

// Layout of an output that is written by one thread per element: threads follow its memory order.
inline bool is_channels_last(const Strides4& strides, int64_t c) { return c > 1 && strides.c == 1; }

// Work split of a sum over pixels. The block owns `channel_lanes` neighbouring channels and cuts
// the pixels of each into kDirectThreads / channel_lanes slices, which it adds up in a fixed order.
struct PixelSumPlan {
  int channel_lanes;      // 1 or kWarpLanes
  int64_t channel_tiles;  // of channel_lanes channels each, per sum
};

// Neighbouring lanes must read neighbouring addresses: channels where they are innermost in memory
// and enough to fill a warp, pixels otherwise.
inline PixelSumPlan plan_pixel_sum(bool channels_last, int64_t channels) {
  const int lanes = channels_last && channels >= kWarpLanes ? kWarpLanes : 1;
  return {lanes, (channels + lanes - 1) / lanes};
}

// One block per (output channel, tap, tile of the group's input channels).
inline PixelSumPlan plan_grad_weight(const DilatedConv2dShape& s, const Strides4& input_strides) {
  return plan_pixel_sum(is_channels_last(input_strides, s.c_in), s.c_in / s.groups);
}

// One block per tile of output channels.
inline PixelSumPlan plan_grad_bias(const DilatedConv2dShape& s,
                                   const Strides4& grad_output_strides) {
  return plan_pixel_sum(is_channels_last(grad_output_strides, s.c_out), s.c_out);
}

// Modelled time. Both factors of every product come through the caches, and a thread forms its sum
// alone, product after product. No GPU has confirmed these rates.
template <class P>
double direct_microseconds(const P& params, const Gpu& gpu) {
  constexpr double kBytesPerProduct = 4;  // at the rate of a copy
  constexpr double kMicrosecondsPerLink = 0.02;
  const DilatedConv2dShape& s = params.shape;
  const auto taps = static_cast<double>(s.k_h * s.k_w);
  const auto group_in = static_cast<double>(s.c_in / s.groups);
  const auto pixels = static_cast<double>(s.n * s.h_out * s.w_out);
  const double products = pixels * static_cast<double>(s.c_out) * group_in * taps;
  double chain = group_in * taps;
  if constexpr (std::is_same_v<P, DilatedConv2dGradInputParams>) {
    chain = static_cast<double>(s.c_out / s.groups) * taps;
  } else if constexpr (std::is_same_v<P, DilatedConv2dGradWeightParams>) {
    chain = pixels / kDirectThreads;
  }
  return kLaunchMicroseconds +
         std::max(products * kBytesPerProduct / copy_bytes(gpu), chain * kMicrosecondsPerLink);
}

Status launch_direct(const DilatedConv2dParams& params, Stream stream);
Status launch_direct(const DilatedConv2dGradInputParams& params, Stream stream);
Status launch_direct(const DilatedConv2dGradWeightParams& params, Stream stream);

}  // namespace dilseg::cuda
