// SPDX-License-Identifier: Apache-2.0
//
// Convolution as implicit GEMM on the wgmma units of sm_90a, fed by TMA: which tiles run a problem,
// as pure functions without CUDA. Half types, and floats as sums of bfloat16 parts (grad_weight:
// half types only); one group, stride 1. Forward and grad_input are one problem: an output pixel y
// reads the map `a` at y - pad + i * dil; grad_input has pad = (k - 1) * dil - padding and its taps
// in reverse. grad_weight: wgmma_grad_weight.h.
#pragma once

#include "cuda/common/gpu.h"
#include "cuda/dilated_conv2d/gemm.h"
#include "cuda/dilated_conv2d/model.h"
#include "cuda/dilated_conv2d/pack.h"
#include "dilseg/dilated_conv2d.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>

namespace dilseg::cuda {

constexpr int kWgmmaTileM = 128;  // pixels of a block's tile; grad_weight: output channels
constexpr int kWgmmaStepK = 64;   // channels of a step, 128 bytes; grad_weight: pixels

struct WgmmaPlan {
  int planes;  // parts of a float, 2 or 3; 1 for half types
  int tile_n;  // channels of a block's tile: 256 (half types), 128 or 64; grad_weight: of the input
  // Blocks with neighbouring tiles of kWgmmaTileM, which share what they multiply them with.
  int cluster;
  // Parts of the sum over k, each with tiles of its own; more than one go through the workspace.
  int splits;
  // Pixels of a tile as a box of the map; 0 x 0 for runs in memory order, across rows and images.
  int box_h, box_w;
  bool pack_input;        // or grad_output, in grad_input; floats are split instead
  bool pack_weight;       // forward and grad_input
  bool pack_grad_output;  // grad_weight
  size_t workspace_bytes;
  double microseconds;  // modelled
};

struct WgmmaTile {
  int n;
  double efficiency;  // of the peak: 256 columns balance shared memory and products
};
constexpr WgmmaTile kWgmmaTiles[] = {{256, 0.88}, {128, 0.70}, {64, 0.45}};

// Until the first product of a block, and from a tile's last product to the next one's first.
constexpr double kWgmmaFillMicroseconds = 1.0;
constexpr double kWgmmaTileMicroseconds = 0.6;

// Parts of a number of that dtype; 0 where the products would be of another kind.
constexpr int wgmma_planes(Dtype dtype, Float32Precision precision) {
  if (dtype != Dtype::kFloat32) {
    return dtype == Dtype::kFloat64 ? 0 : 1;
  }
  return precision == Float32Precision::kIeee ? 3 : precision == Float32Precision::kBf16x3 ? 2 : 0;
}

// Products of the parts i and j of two numbers with i + j < planes.
constexpr int part_products(int planes) { return planes * (planes + 1) / 2; }

// Modelled time of a step: its products, or its bytes from L2.
inline double wgmma_step_microseconds(const WgmmaTile& tile, int cluster, int planes = 1) {
  // Of one SM, per microsecond.
  constexpr double kPeakFlops = 800e6 / 132;
  constexpr double kCacheBytes = 6e6 / 132;
  const double flops = part_products(planes) * 2.0 * kWgmmaTileM * kWgmmaStepK * tile.n;
  return std::max(flops / (kPeakFlops * tile.efficiency),
                  planes * 2.0 * kWgmmaStepK * (kWgmmaTileM + tile.n / cluster) / kCacheBytes);
}

struct WgmmaProblem {
  GemmAxis y, x;
  Dtype dtype;
  int planes;
  int64_t n, k_channels, columns;
  Sizes4 a, b, out;
  bool pack_a, pack_b;
};

// Floats from pixel to pixel of the partial sums.
inline int64_t wgmma_partial_pitch(int64_t columns) { return (columns + 7) / 8 * 8; }

inline int64_t wgmma_row_tiles(const WgmmaProblem& p, int box_h, int box_w) {
  return box_h == 0 ? tiles_of(p.n * p.y.size * p.x.size, kWgmmaTileM)
                    : p.n * tiles_of(p.y.size, box_h) * tiles_of(p.x.size, box_w);
}

// Whether TMA surely takes the strides of a packed tensor, as its manual derives them: each a
// multiple of the one inside it. Strides of axes of size 1 do not count.
inline bool tma_strides_fit(const Strides4& s, const Sizes4& size) {
  int64_t inner = 1;
  for (const auto& [count, stride] :
       {std::pair(size.w, s.w), std::pair(size.h, s.h), std::pair(size.n, s.n)}) {
    if (count > 1) {
      if (stride <= 0 || stride % inner != 0 || stride >= (int64_t{1} << 38)) {
        return false;
      }
      inner = stride;
    }
  }
  return true;
}

// Whether TMA's im2col mode can walk the map: corners and offsets have 8 bits.
inline bool im2col_fits(const GemmAxis& axis) {
  const int64_t lower = -axis.pad;
  const int64_t upper = axis.size - axis.size_a - axis.pad;
  return std::min(lower, upper) >= -128 && std::max(lower, upper) <= 127 &&
         (axis.k - 1) * axis.dil <= 255;
}

// One axis of a problem; `out` is the size that is written, `a` the one that is read.
inline GemmAxis wgmma_axis(
    bool grad_input, int64_t out, int64_t a, int64_t k, int64_t dil, int64_t pad) {
  return {false, out, a, k, dil, grad_input ? (k - 1) * dil - pad : pad, 1, 1};
}

// P: any of the three parameter structs.
template <class P>
bool wgmma_fits(const P& p, const Gpu& gpu) {
  const DilatedConv2dShape& s = p.shape;
  return gpu.wgmma && wgmma_planes(p.dtype, p.precision) > 0 && s.groups == 1 && s.stride_h == 1 &&
         s.stride_w == 1 && s.n < (int64_t{1} << 31) &&  // TMA's coordinates
         gemm_fits(s, p.dtype, gpu);
}

inline bool wgmma_packs(const void* data,
                        const Strides4& strides,
                        const Sizes4& size,
                        Dtype dtype) {
  return !is_packed(data, strides, size, dtype) || !tma_strides_fit(strides, size);
}

inline WgmmaProblem wgmma_problem(const DilatedConv2dParams& p) {
  const DilatedConv2dShape& s = p.shape;
  return {wgmma_axis(false, s.h_out, s.h_in, s.k_h, s.dil_h, s.pad_top),
          wgmma_axis(false, s.w_out, s.w_in, s.k_w, s.dil_w, s.pad_left),
          p.dtype,
          wgmma_planes(p.dtype, p.precision),
          s.n,
          s.c_in,
          s.c_out,
          input_sizes(s),
          weight_sizes(s),
          output_sizes(s),
          wgmma_packs(p.input, p.input_strides, input_sizes(s), p.dtype),
          wgmma_packs(p.weight, p.weight_strides, weight_sizes(s), p.dtype)};
}

inline WgmmaProblem wgmma_problem(const DilatedConv2dGradInputParams& p) {
  const DilatedConv2dShape& s = p.shape;
  return {wgmma_axis(true, s.h_in, s.h_out, s.k_h, s.dil_h, s.pad_top),
          wgmma_axis(true, s.w_in, s.w_out, s.k_w, s.dil_w, s.pad_left),
          p.dtype,
          wgmma_planes(p.dtype, p.precision),
          s.n,
          s.c_out,
          s.c_in,
          output_sizes(s),
          weight_sizes(s),
          input_sizes(s),
          wgmma_packs(p.grad_output, p.grad_output_strides, output_sizes(s), p.dtype),
          wgmma_packs(p.weight, p.weight_strides, weight_sizes(s), p.dtype)};
}

inline std::optional<WgmmaPlan> plan_wgmma_tiles(const WgmmaProblem& p, const Gpu& gpu) {
  struct Box {
    int h, w;
  };
  constexpr Box kBoxes[] = {{0, 0},
                            {8, 16},
                            {16, 8},
                            {11, 11},
                            {4, 32},
                            {32, 4},
                            {2, 64},
                            {1, 128},
                            {7, 17},
                            {6, 17},
                            {6, 21}};

  const bool runs_fit = im2col_fits(p.y) && im2col_fits(p.x);
  const double copy = copy_bytes(gpu);
  const double per_tap =
      std::ceil(static_cast<double>(p.k_channels) / static_cast<double>(kWgmmaStepK));
  double before = 0;
  double memory = bytes_of(p.out, p.dtype) / copy;
  size_t packed = 0;
  for (const auto& [wanted, sizes] : {std::pair(p.pack_a, p.a), std::pair(p.pack_b, p.b)}) {
    const double parts = p.planes * bytes_of(sizes, p.planes > 1 ? Dtype::kBFloat16 : p.dtype);
    memory += parts / copy;
    if (p.planes > 1) {
      before += (bytes_of(sizes, p.dtype) + parts) / copy + kLaunchMicroseconds;
      packed += static_cast<size_t>(p.planes) * plane_bytes(sizes);
    } else if (wanted) {
      before += 2 * parts / copy + kLaunchMicroseconds;
      packed += workspace_step(packed_bytes(sizes, p.dtype));
    }
  }
  const double partial =
      static_cast<double>(p.n * p.y.size * p.x.size * wgmma_partial_pitch(p.columns)) *
      sizeof(float);

  std::optional<WgmmaPlan> best;
  for (const WgmmaTile& tile : kWgmmaTiles) {
    if (p.planes > 1 && tile.n == 256) {
      continue;  // no registers for a second set of sums
    }
    const int64_t column_tiles = tiles_of(p.columns, tile.n);
    for (const Box& box : kBoxes) {
      if (box.h == 0 && !runs_fit) {
        continue;
      }
      const int64_t row_tiles = wgmma_row_tiles(p, box.h, box.w);
      const double steps = gemm_pairs(p.y, p.x, kWgmmaTileM, box.h, box.w) *
                           static_cast<double>(p.n) * per_tap / static_cast<double>(row_tiles);
      for (const int cluster : {2, 1}) {
        if (cluster == 2 && (tile.n == 64 || row_tiles < 2)) {
          continue;
        }
        const double step = wgmma_step_microseconds(tile, cluster, p.planes);
        const double slots = std::max(1, gpu.multiprocessors / cluster);
        for (int splits = 1; splits <= 64; splits = next_splits(splits)) {
          if (splits > 1 && steps / splits < 8) {
            break;
          }
          const double tiles =
              static_cast<double>(tiles_of(row_tiles, cluster) * column_tiles * splits);
          double time =
              std::max(std::ceil(tiles / slots) * (steps / splits * step + kWgmmaTileMicroseconds),
                       memory) +
              kWgmmaFillMicroseconds + before + kLaunchMicroseconds;
          if (splits > 1) {
            time += 2 * splits * partial / copy + kLaunchMicroseconds;
          }
          if (!best.has_value() || time < best->microseconds) {
            const size_t sums = splits > 1 ? static_cast<size_t>(splits * partial) : 0;
            best = {.planes = p.planes,
                    .tile_n = tile.n,
                    .cluster = cluster,
                    .splits = splits,
                    .box_h = box.h,
                    .box_w = box.w,
                    .pack_input = p.planes == 1 && p.pack_a,
                    .pack_weight = p.planes == 1 && p.pack_b,
                    .pack_grad_output = false,
                    .workspace_bytes = packed + sums,
                    .microseconds = time};
          }
        }
      }
    }
  }
  return best;
}

template <class P>
std::optional<WgmmaPlan> plan_wgmma(const P& params, const Gpu& gpu) {
  if (!wgmma_fits(params, gpu)) {
    return std::nullopt;
  }
  return plan_wgmma_tiles(wgmma_problem(params), gpu);
}
std::optional<WgmmaPlan> plan_wgmma(const DilatedConv2dGradWeightParams& params, const Gpu& gpu);

Status launch_wgmma(const DilatedConv2dParams& params, const WgmmaPlan& plan, Stream stream);
Status launch_wgmma(const DilatedConv2dGradInputParams& params,
                    const WgmmaPlan& plan,
                    Stream stream);
Status launch_wgmma(const DilatedConv2dGradWeightParams& params,
                    const WgmmaPlan& plan,
                    Stream stream);

}  // namespace dilseg::cuda
