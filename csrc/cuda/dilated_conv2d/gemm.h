// SPDX-License-Identifier: Apache-2.0
//
// Convolution as implicit GEMM on the tensor cores of sm_80 and newer: which tiles run a problem,
// as pure functions without CUDA. Every group is a GEMM of its own,
//   forward      pixels of the output x c_out,  k = taps x c_in
//   grad_input   pixels of the input  x c_in,   k = taps x c_out
//   grad_weight  c_out x c_in for every tap,    k = pixels of the output
// over tensors packed as pack.h says.
#pragma once

#include "cuda/common/gpu.h"
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

enum class GemmTile { kLarge, kSmall };

// Rows and columns of a block's tile.
constexpr int gemm_tile_size(GemmTile tile) { return tile == GemmTile::kLarge ? 128 : 64; }

struct GemmPlan {
  GemmTile tile;
  // Parts of the sum over k, each a block of its own; more than one go through the workspace.
  int splits;
  // Pixels of a tile as a box of the map; 0 x 0 for runs in memory order.
  int box_h, box_w;
  bool pack_input;        // or grad_output, in grad_input
  bool pack_weight;       // forward and grad_input
  bool pack_grad_output;  // grad_weight
  size_t workspace_bytes;
  double microseconds;  // modelled
};

// ---- sizes --------------------------------------------------------------------------------------

inline Sizes4 input_sizes(const DilatedConv2dShape& s) { return {s.n, s.c_in, s.h_in, s.w_in}; }
inline Sizes4 output_sizes(const DilatedConv2dShape& s) { return {s.n, s.c_out, s.h_out, s.w_out}; }
inline Sizes4 weight_sizes(const DilatedConv2dShape& s) {
  return {s.c_out, s.c_in / s.groups, s.k_h, s.k_w};
}

constexpr int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Bytes from one part of the workspace to the next.
constexpr size_t workspace_step(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Row tiles of one phase, the first, which is the largest; column tiles of one group.
struct GemmGrid {
  int64_t row_tiles, column_tiles;
};
inline GemmGrid gemm_grid(const GemmPlan& plan,
                          int64_t n,
                          int64_t h,
                          int64_t w,
                          int64_t phases_h,
                          int64_t phases_w,
                          int64_t columns) {
  const int64_t size = gemm_tile_size(plan.tile);
  const int64_t phase_h = tiles_of(h, phases_h);
  const int64_t phase_w = tiles_of(w, phases_w);
  return {plan.box_h == 0 ? tiles_of(n * phase_h * phase_w, size)
                          : n * tiles_of(phase_h, plan.box_h) * tiles_of(phase_w, plan.box_w),
          tiles_of(columns, size)};
}

// ---- what tiles meet ----------------------------------------------------------------------------

// One axis of the map that is written: a pixel of a phase reads step * pixel + by at a tap, with
// by = tap * dil - pad forward and (phase + pad - tap * dil) / phases, where whole, in grad_input.
struct GemmAxis {
  bool grad_input;
  int64_t size, size_a;  // written, read
  int64_t k, dil, pad;
  int64_t step, phases;

  int64_t phase_size(int64_t phase) const { return tiles_of(size - phase, phases); }

  // Phases beyond the map have no pixels.
  int64_t filled_phases() const { return std::min(phases, size); }

  // (tile, tap) pairs that meet, for tiles of `extent` pixels: the pixels of a phase that read the
  // map at a tap are a range.
  int64_t pairs(int64_t phase, int64_t extent) const {
    int64_t count = 0;
    for (int64_t tap = 0; tap < k; ++tap) {
      int64_t by = tap * dil - pad;
      if (grad_input) {
        by = phase + pad - tap * dil;
        if (by % phases != 0) {
          continue;
        }
        by /= phases;
      }
      const int64_t first = by >= 0 ? 0 : tiles_of(-by, step);
      const int64_t end = by >= size_a ? 0 : tiles_of(size_a - by, step);
      const int64_t last = std::min(end, phase_size(phase)) - 1;
      count += first <= last ? last / extent - first / extent + 1 : 0;
    }
    return count;
  }
};

// Modelled (tile, tap) pairs of all phases of one image.
inline double gemm_pairs(const GemmAxis& y, const GemmAxis& x, int64_t tile, int box_h, int box_w) {
  const auto sum = [](const GemmAxis& axis, auto&& value) {
    double total = 0;
    for (int64_t phase = 0; phase < axis.filled_phases(); ++phase) {
      total += value(phase);
    }
    return total;
  };
  if (box_h > 0) {
    return sum(y, [&](int64_t p) { return static_cast<double>(y.pairs(p, box_h)); }) *
           sum(x, [&](int64_t q) { return static_cast<double>(x.pairs(q, box_w)); });
  }
  // Runs, by the width of their phase, of which there are two at most.
  double pairs = 0;
  const int64_t widest = x.phase_size(0);
  for (int64_t w = std::max<int64_t>(widest - 1, 1); w <= widest; ++w) {
    // A run of several rows meets every column.
    const int64_t rows = std::max<int64_t>(tile / w, 1);
    const int64_t across = std::min(tile, w);
    const double columns = sum(x, [&](int64_t q) {
      return x.phase_size(q) == w ? static_cast<double>(x.pairs(q, across)) : 0.0;
    });
    // Of a phase: pairs of a tile on average, times tiles.
    const double by_rows = sum(y, [&](int64_t p) {
      const int64_t h = y.phase_size(p);
      return static_cast<double>(y.pairs(p, rows)) * static_cast<double>(h * w) /
             static_cast<double>(tiles_of(h, rows) * tiles_of(w, across) * tile);
    });
    pairs += columns * by_rows;
  }
  return pairs;
}

// ---- plans --------------------------------------------------------------------------------------

// Splits that are tried: 1 to 16, then in steps of about a sixteenth.
constexpr int next_splits(int splits) { return splits + (splits + 15) / 16; }

struct GemmProblem {
  GemmAxis y, x;
  Dtype dtype;
  Float32Precision precision;
  int64_t n, groups;
  int64_t k_channels, columns;  // of a group
  Sizes4 a, b, out;
  bool pack_a, pack_b;
};

// Whether the kernels' 32-bit coordinates and offsets within an image, and their list of taps, hold
// the problem. (With several groups each must begin at a chunk.)
inline bool gemm_fits(const DilatedConv2dShape& s, Dtype dtype, const Gpu& gpu) {
  constexpr int64_t kReach = int64_t{1} << 29;
  constexpr int64_t kOffsets = (int64_t{1} << 31) - 1;
  if (dtype == Dtype::kFloat64 || gpu.arch < 80 || s.k_h > 32 || s.k_w > 32) {
    return false;
  }
  const int64_t chunk = 16 / size_of(dtype);
  const int64_t group_in = s.c_in / s.groups;
  const int64_t group_out = s.c_out / s.groups;
  const auto image = [&](const Sizes4& t) { return t.h * t.w * packed_pitch(t.c, dtype); };
  return s.n > 0 && group_in > 0 && group_out > 0 && s.h_in > 0 && s.w_in > 0 && s.h_out > 0 &&
         s.w_out > 0 && (s.groups == 1 || (group_in % chunk == 0 && group_out % chunk == 0)) &&
         std::max(s.h_out * s.stride_h + s.k_h * s.dil_h + s.h_in + s.pad_top,
                  s.w_out * s.stride_w + s.k_w * s.dil_w + s.w_in + s.pad_left) < kReach &&
         std::max({image(input_sizes(s)), image(output_sizes(s)), image(weight_sizes(s))}) <=
             kOffsets;
}

// Of strides that are used as they are, those within an image.
inline bool gemm_strides_fit(const Strides4& strides, const Sizes4& s) {
  return (s.h - 1) * strides.h + (s.w - 1) * strides.w + s.c < (int64_t{1} << 31);
}

inline double bytes_of(const Sizes4& s, Dtype dtype) {
  return static_cast<double>(s.n * s.c * s.h * s.w * size_of(dtype));
}

inline std::optional<GemmPlan> plan_tiles(const GemmProblem& p, const Gpu& gpu) {
  struct Box {
    int h, w;
  };
  // Those that fill a tile, and those whose edges or number suit maps that powers of two do not.
  constexpr Box kLargeBoxes[] = {{0, 0},
                                 {8, 16},
                                 {16, 8},
                                 {4, 32},
                                 {32, 4},
                                 {2, 64},
                                 {11, 11},
                                 {7, 17},
                                 {6, 17},
                                 {8, 14},
                                 {10, 12}};
  constexpr Box kSmallBoxes[] = {{0, 0},
                                 {8, 8},
                                 {4, 16},
                                 {16, 4},
                                 {2, 32},
                                 {2, 30},
                                 {7, 9},
                                 {9, 7},
                                 {5, 12},
                                 {4, 14},
                                 {3, 20}};
  const double multiprocessors = gpu.multiprocessors;
  const double copy = copy_bytes(gpu);
  const double stage_k = 64.0 / static_cast<double>(size_of(p.dtype));
  const double per_tap = std::ceil(static_cast<double>(p.k_channels) / stage_k);
  const double phases = static_cast<double>(p.y.phases * p.x.phases);

  double before = 0;  // the packing passes
  size_t packed = 0;
  for (const auto& [wanted, sizes] : {std::pair(p.pack_a, p.a), std::pair(p.pack_b, p.b)}) {
    if (wanted) {
      before += 2 * bytes_of(sizes, p.dtype) / copy + kLaunchMicroseconds;
      packed += workspace_step(packed_bytes(sizes, p.dtype));
    }
  }
  const double memory =
      (bytes_of(p.a, p.dtype) + bytes_of(p.b, p.dtype) + bytes_of(p.out, p.dtype)) / copy;

  std::optional<GemmPlan> best;
  for (const GemmTile tile : {GemmTile::kLarge, GemmTile::kSmall}) {
    const bool large = tile == GemmTile::kLarge;
    const int size = gemm_tile_size(tile);
    // The small tile reads twice as much shared memory per product.
    const double efficiency = large ? 0.85 : 0.55;
    const double step = 2.0 * size * size * stage_k /
                        (mma_flops(gpu, p.dtype, p.precision) / multiprocessors * efficiency);
    for (const Box& box : large ? kLargeBoxes : kSmallBoxes) {
      GemmPlan plan = {.tile = tile,
                       .splits = 1,
                       .box_h = box.h,
                       .box_w = box.w,
                       .pack_input = p.pack_a,
                       .pack_weight = p.pack_b,
                       .pack_grad_output = false,
                       .workspace_bytes = packed,
                       .microseconds = 0};
      const GemmGrid grid =
          gemm_grid(plan, p.n, p.y.size, p.x.size, p.y.phases, p.x.phases, p.columns);
      const double tiles =
          static_cast<double>(grid.row_tiles * grid.column_tiles * p.groups) * phases;
      const double steps = gemm_pairs(p.y, p.x, size, box.h, box.w) * static_cast<double>(p.n) *
                           per_tap * static_cast<double>(grid.column_tiles * p.groups) / tiles;
      for (int splits = 1; splits <= 64; splits = next_splits(splits)) {
        constexpr double kPipeline = 6;  // steps that a block spends on filling and emptying it
        if (splits > 1 && steps / splits < kPipeline) {
          break;
        }
        if (tiles * splits > 2147483647.0) {
          break;
        }
        const double waves = std::ceil(tiles * splits / multiprocessors);
        double time = std::max(waves * (steps / splits + kPipeline) * step, memory) + before +
                      kLaunchMicroseconds;
        const double partials = splits > 1 ? tiles * splits * size * size * sizeof(float) : 0;
        if (splits > 1) {
          time += 2 * partials / copy + kLaunchMicroseconds;
        }
        if (!best.has_value() || time < best->microseconds) {
          plan.splits = splits;
          plan.workspace_bytes = packed + static_cast<size_t>(partials);
          plan.microseconds = time;
          best = plan;
        }
      }
    }
  }
  return best;
}

inline std::optional<GemmPlan> plan_gemm(const DilatedConv2dParams& params, const Gpu& gpu) {
  const DilatedConv2dShape& s = params.shape;
  if (!gemm_fits(s, params.dtype, gpu)) {
    return std::nullopt;
  }
  const auto pack = [&](const void* data, const Strides4& strides, const Sizes4& sizes) {
    return !is_packed(data, strides, sizes, params.dtype) || !gemm_strides_fit(strides, sizes);
  };
  return plan_tiles({.y = {false, s.h_out, s.h_in, s.k_h, s.dil_h, s.pad_top, s.stride_h, 1},
                     .x = {false, s.w_out, s.w_in, s.k_w, s.dil_w, s.pad_left, s.stride_w, 1},
                     .dtype = params.dtype,
                     .precision = params.precision,
                     .n = s.n,
                     .groups = s.groups,
                     .k_channels = s.c_in / s.groups,
                     .columns = s.c_out / s.groups,
                     .a = input_sizes(s),
                     .b = weight_sizes(s),
                     .out = output_sizes(s),
                     .pack_a = pack(params.input, params.input_strides, input_sizes(s)),
                     .pack_b = pack(params.weight, params.weight_strides, weight_sizes(s))},
                    gpu);
}

inline std::optional<GemmPlan> plan_gemm(const DilatedConv2dGradInputParams& params,
                                         const Gpu& gpu) {
  const DilatedConv2dShape& s = params.shape;
  constexpr int64_t kMostPhases = 256;  // of an axis: the plan visits each
  if (!gemm_fits(s, params.dtype, gpu) || std::max(s.stride_h, s.stride_w) > kMostPhases) {
    return std::nullopt;
  }
  const auto pack = [&](const void* data, const Strides4& strides, const Sizes4& sizes) {
    return !is_packed(data, strides, sizes, params.dtype) || !gemm_strides_fit(strides, sizes);
  };
  return plan_tiles(
      {.y = {true, s.h_in, s.h_out, s.k_h, s.dil_h, s.pad_top, 1, s.stride_h},
       .x = {true, s.w_in, s.w_out, s.k_w, s.dil_w, s.pad_left, 1, s.stride_w},
       .dtype = params.dtype,
       .precision = params.precision,
       .n = s.n,
       .groups = s.groups,
       .k_channels = s.c_out / s.groups,
       .columns = s.c_in / s.groups,
       .a = output_sizes(s),
       .b = weight_sizes(s),
       .out = input_sizes(s),
       .pack_a = pack(params.grad_output, params.grad_output_strides, output_sizes(s)),
       .pack_b = pack(params.weight, params.weight_strides, weight_sizes(s))},
      gpu);
}

std::optional<GemmPlan> plan_gemm(const DilatedConv2dGradWeightParams& params, const Gpu& gpu);

Status launch_gemm(const DilatedConv2dParams& params, const GemmPlan& plan, Stream stream);
Status launch_gemm(const DilatedConv2dGradInputParams& params, const GemmPlan& plan, Stream stream);
Status launch_gemm(const DilatedConv2dGradWeightParams& params,
                   const GemmPlan& plan,
                   Stream stream);

}  // namespace dilseg::cuda
