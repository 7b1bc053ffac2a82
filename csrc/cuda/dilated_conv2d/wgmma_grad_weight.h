// SPDX-License-Identifier: Apache-2.0
//
// Which tiles run the weight gradient on the wgmma units of sm_90a: pure functions, without CUDA.
// The kernel is in wgmma_grad_weight.cu.
#pragma once

#include "cuda/dilated_conv2d/gemm_grad_weight.h"
#include "cuda/dilated_conv2d/meeting.h"
#include "cuda/dilated_conv2d/wgmma.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace dilseg::cuda {

// Every tap has two maps among the kernel's parameters, which may have 32764 bytes.
constexpr int kWgmmaMostTaps = 49;

// The corners of an im2col window along an axis: distances from its first and its last place.
struct WgmmaWindow {
  int lower, upper;
};

// The pixels of the output that meet the map at a tap, and the windows that hold exactly them and
// exactly what they read.
struct WgmmaTap {
  Range pixels;
  WgmmaWindow output, input;
};

inline WgmmaTap wgmma_tap(int tap, int dil, int pad, int in, int out) {
  const Range pixels = meeting(tap * dil, 1, pad, in, out);
  const int by = tap * dil - pad;
  return {pixels, {pixels.begin, pixels.end - out}, {pixels.begin + by, pixels.end + by - in}};
}

// Whether the windows of an axis's taps have corners that TMA takes, of 8 bits.
inline bool wgmma_windows_fit(int64_t taps, int64_t dil, int64_t pad, int64_t in, int64_t out) {
  for (int64_t i = 0; i < taps; ++i) {
    const WgmmaTap tap = wgmma_tap(static_cast<int>(i),
                                   static_cast<int>(dil),
                                   static_cast<int>(pad),
                                   static_cast<int>(in),
                                   static_cast<int>(out));
    // Windows lie within their maps: lower corners are not negative, upper ones not positive.
    if (tap.pixels.begin < tap.pixels.end && (std::max(tap.output.lower, tap.input.lower) > 127 ||
                                              std::min(tap.output.upper, tap.input.upper) < -128)) {
      return false;
    }
  }
  return true;
}

inline bool wgmma_grad_weight_fits(const DilatedConv2dGradWeightParams& p, const Gpu& gpu) {
  const DilatedConv2dShape& s = p.shape;
  return wgmma_fits(p, gpu) && wgmma_planes(p.dtype, p.precision) == 1 &&
         s.k_h * s.k_w <= kWgmmaMostTaps &&
         wgmma_windows_fit(s.k_h, s.dil_h, s.pad_top, s.h_in, s.h_out) &&
         wgmma_windows_fit(s.k_w, s.dil_w, s.pad_left, s.w_in, s.w_out);
}

// The workspace holds packed operands, partial sums where there are some, and those of the bias.
inline size_t wgmma_partial_bytes(const DilatedConv2dGradWeightParams& p, int splits) {
  return grad_weight_is_direct(p, splits)
             ? 0
             : workspace_step(sizeof(float) * static_cast<size_t>(splits) *
                              static_cast<size_t>(grad_weight_partials(p.shape).elements));
}

inline std::optional<WgmmaPlan> plan_wgmma(const DilatedConv2dGradWeightParams& p, const Gpu& gpu) {
  constexpr int kMostSplits = 1024;        // tried: 1 to 16, then in steps of about 1/16
  constexpr double kFewestSteps = 8;       // of a split
  constexpr double kMostPartials = 256e6;  // bytes that splits may cost
  const DilatedConv2dShape& s = p.shape;
  if (!wgmma_grad_weight_fits(p, gpu)) {
    return std::nullopt;
  }
  const Sizes4 in = input_sizes(s);
  const Sizes4 out = output_sizes(s);
  WgmmaPlan plan{.planes = 1};
  plan.pack_input = wgmma_packs(p.input, p.input_strides, in, p.dtype);
  plan.pack_grad_output = wgmma_packs(p.grad_output, p.grad_output_strides, out, p.dtype);

  const double copy = copy_bytes(gpu);
  const double input_bytes = bytes_of(in, p.dtype);
  const double output_bytes = bytes_of(out, p.dtype);
  const double written = bytes_of(weight_sizes(s), p.dtype);
  double around = 0;
  size_t bytes = 0;  // of the workspace, but for partial sums
  if (plan.pack_input) {
    around += 2 * input_bytes / copy + kLaunchMicroseconds;
    bytes += workspace_step(packed_bytes(in, p.dtype));
  }
  if (plan.pack_grad_output) {
    around += 2 * output_bytes / copy + kLaunchMicroseconds;
    bytes += workspace_step(packed_bytes(out, p.dtype));
  }
  if (p.grad_bias != nullptr) {
    around += output_bytes / copy + 2 * kLaunchMicroseconds;
    bytes += plan_packed_bias(out, p.dtype).workspace_bytes;
  }
  const double memory = (input_bytes + output_bytes + written) / copy;

  const Meetings rows = meetings(s.k_h, s.dil_h, 1, s.pad_top, s.h_in, s.h_out);
  const Meetings columns = meetings(s.k_w, s.dil_w, 1, s.pad_left, s.w_in, s.w_out);
  const double images = static_cast<double>(s.n) / kWgmmaStepK;
  const double steps = images * rows.mean * columns.mean;
  const double most = images * static_cast<double>(rows.most * columns.most);

  bool found = false;
  for (const WgmmaTile& tile : kWgmmaTiles) {
    const int64_t row_tiles = tiles_of(s.c_out, kWgmmaTileM);
    for (const int cluster : {2, 1}) {
      if (cluster == 2 && (tile.n == 64 || row_tiles < 2)) {
        continue;
      }
      const double step = wgmma_step_microseconds(tile, cluster);
      const double slots = std::max(1, gpu.multiprocessors / cluster);
      const int64_t tiles = s.k_h * s.k_w * tiles_of(row_tiles, cluster) * tiles_of(s.c_in, tile.n);
      for (int splits = 1; splits <= kMostSplits; splits += (splits + 15) / 16) {
        const auto partials = static_cast<double>(wgmma_partial_bytes(p, splits));
        if (splits > 1 && (most < splits * kFewestSteps || partials > kMostPartials)) {
          break;
        }
        const auto busy = [&](double of_tap) {
          return std::max(1., of_tap / splits) * step + kWgmmaTileMicroseconds;
        };
        const double waves = std::ceil(static_cast<double>(tiles * splits) / slots);
        double time = std::max({waves * busy(steps), busy(most), memory}) + around +
                      kWgmmaFillMicroseconds + kLaunchMicroseconds;
        if (partials > 0) {
          time += (2 * partials + written) / copy + kLaunchMicroseconds;
        }
        if (!found || time < plan.microseconds) {
          found = true;
          plan.tile_n = tile.n;
          plan.cluster = cluster;
          plan.splits = splits;
          plan.workspace_bytes = bytes + static_cast<size_t>(partials);
          plan.microseconds = time;
        }
      }
    }
  }
  return plan;
}

}  // namespace dilseg::cuda
