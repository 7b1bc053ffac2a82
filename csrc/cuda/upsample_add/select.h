// SPDX-License-Identifier: Apache-2.0
//
// How an upsampling is cut into blocks: pure functions of the problem, without CUDA, so that the
// choice never changes between runs and can be tested on any machine.
#pragma once

#include "dilseg/upsample_add.h"
#include "dilseg/upsample_index.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>

namespace dilseg::cuda {

constexpr int kUpsampleThreads = 256;
// Blocks an SM must be able to hold: leaves 64 registers to a thread. Without the bound ptxas aims
// lower and spills in the double kernels.
constexpr int kUpsampleBlocks = 4;
// Output values per block in forward: 8 per thread pay for the row of taps computed first.
constexpr int kUpsampleForwardValues = 8 * kUpsampleThreads;
// Output rows whose weights backward holds in shared memory, and the terms of one chain of
// additions.
constexpr int kUpsampleChain = 32;

// A block computes `tile_c` channels of `tile_w` neighbouring pixels in one row of the tensor that
// is written; `channels_inner` says whether its threads follow channels or pixels first, as memory
// does.
struct UpsamplePlan {
  bool channels_inner;
  int tile_w, tile_c;
  int64_t tiles_w, tiles_c;
  int64_t tiles;  // n * rows * tiles_c * tiles_w
  int chunk_w;    // backward: columns of grad_output summed at a time
};

inline bool fits_upsample(const UpsampleGeometry& g) {
  return std::max({g.c, g.h_in, g.w_in, g.h_out, g.w_out}) <= kUpsampleMaxSize;
}

// The smallest equal tiles of at most `largest` that cover `size` in as many pieces.
constexpr int balanced_tile(int64_t size, int64_t largest) {
  const int64_t pieces = (size + largest - 1) / largest;
  return static_cast<int>((size + pieces - 1) / pieces);
}

inline UpsamplePlan finish_upsample_plan(
    UpsamplePlan plan, int64_t n, int64_t c, int64_t h, int64_t w) {
  plan.tiles_w = (w + plan.tile_w - 1) / plan.tile_w;
  plan.tiles_c = (c + plan.tile_c - 1) / plan.tile_c;
  plan.tiles = n * h * plan.tiles_c * plan.tiles_w;
  return plan;
}

// For a problem that is not empty.
inline UpsamplePlan plan_upsample_add(const UpsampleGeometry& g, const Strides4& output_strides) {
  UpsamplePlan plan{};
  plan.channels_inner = output_strides.c == 1 && g.c > 1;
  if (plan.channels_inner) {
    plan.tile_c = balanced_tile(g.c, kUpsampleThreads);
    plan.tile_w = balanced_tile(
        g.w_out, std::clamp(kUpsampleForwardValues / plan.tile_c, 1, kUpsampleThreads));
  } else {
    plan.tile_w = balanced_tile(g.w_out, kUpsampleThreads);
    plan.tile_c = balanced_tile(g.c, std::max(1, kUpsampleForwardValues / plan.tile_w));
  }
  return finish_upsample_plan(plan, g.n, g.c, g.h_out, g.w_out);
}

// A thread owns at most one (channel, input pixel) of the tile and one (channel, column) of the
// chunk, so tile_c * tile_w and tile_c * chunk_w stay within a block. Tiles span about two chunks:
// neighbouring tiles read their common columns twice, and wider tiles would leave too few blocks
// for a large scale.
inline UpsamplePlan plan_upsample_add_backward(const UpsampleGeometry& g,
                                               const Strides4& grad_input_strides) {
  constexpr int64_t kThreads = kUpsampleThreads;
  constexpr int64_t kChannelLanes = 32;
  const int64_t step = std::max<int64_t>(1, (g.w_out + g.w_in - 1) / g.w_in);
  UpsamplePlan plan{};
  plan.channels_inner = grad_input_strides.c == 1 && g.c > 1;
  if (plan.channels_inner) {
    plan.tile_c = balanced_tile(g.c, kChannelLanes);
    plan.chunk_w = static_cast<int>(kThreads / plan.tile_c);
    const int64_t widest = std::clamp<int64_t>(2 * plan.chunk_w / step, 1, plan.chunk_w);
    plan.tile_w = balanced_tile(g.w_in, widest);
  } else {
    plan.tile_w = balanced_tile(g.w_in, std::clamp<int64_t>(2 * kThreads / step, 1, kThreads));
    const int64_t columns = std::max<int64_t>(1, std::min(g.w_out, (plan.tile_w + 2) * step));
    plan.chunk_w = static_cast<int>(std::min(columns, kThreads));
    plan.tile_c = balanced_tile(g.c, kThreads / std::max(plan.chunk_w, plan.tile_w));
  }
  return finish_upsample_plan(plan, g.n, g.c, g.h_in, g.w_in);
}

// ---- the fast kernels ---------------------------------------------------------------------------
// They cover magnification of dense maps in float and the half types, and see both memory formats
// as planes of rows of w * channels neighbouring values: a channels_last map is n planes of c
// channels, a contiguous one n * c planes of one channel.

// Longest axis and farthest origin. Coordinates are floats: up to here src is off by less than
// 1/64, which the bounds below allow for.
constexpr int64_t kUpsampleFastSize = 1 << 16;
// Dynamic shared memory that every device grants without being asked.
constexpr int64_t kUpsampleSharedBytes = 44 * 1024;
// Blocks that fill a large device, and the fewest worth cutting a small problem for.
constexpr int64_t kUpsampleManyBlocks = 4 * 132;
constexpr int64_t kUpsampleFewBlocks = 132;

// Steps between planes and between rows, in elements; 0 where there is only one.
struct UpsampleRows {
  int64_t plane, row;
};

struct UpsampleSize {
  int64_t n, c, h, w;
};

// Whether a tensor of this size and these strides consists of such rows.
inline bool has_upsample_rows(const UpsampleSize& size, const Strides4& s, bool channels_inner) {
  if (channels_inner) {
    return s.c == 1 && (size.w == 1 || s.w == size.c);
  }
  return (size.w == 1 || s.w == 1) && (size.c == 1 || size.n == 1 || s.n == size.c * s.c);
}

// For a tensor that has them.
inline UpsampleRows upsample_rows(const UpsampleSize& size,
                                  const Strides4& s,
                                  bool channels_inner) {
  const int64_t row = size.h == 1 ? 0 : s.h;
  if (channels_inner || size.c == 1) {
    return {size.n == 1 ? 0 : s.n, row};
  }
  return {s.c, row};
}

// Whether every row begins at a multiple of `count` elements of `bytes` bytes.
inline bool rows_aligned(const void* p, const UpsampleRows& rows, int64_t bytes, int64_t count) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes * count) == 0 &&
         rows.plane % count == 0 && rows.row % count == 0;
}

// Whether the fast kernels' bounds hold for this axis and it is not shrunk.
inline bool is_fast_axis(const UpsampleAxis<float>& axis) {
  return axis.size_in <= kUpsampleFastSize && axis.size_out <= kUpsampleFastSize &&
         axis.origin >= -kUpsampleFastSize && axis.origin <= kUpsampleFastSize && axis.ratio > 0 &&
         axis.ratio <= 1;
}

inline UpsampleAxis<float> upsample_axis_h(const UpsampleGeometry& g) {
  return make_upsample_axis<float>(
      g.h_in, g.h_out, g.origin_h, g.scale_h, g.align_corners, g.border);
}
inline UpsampleAxis<float> upsample_axis_w(const UpsampleGeometry& g) {
  return make_upsample_axis<float>(
      g.w_in, g.w_out, g.origin_w, g.scale_w, g.align_corners, g.border);
}

// Most neighbouring inputs that `outputs` neighbouring outputs read.
inline int64_t most_upsample_inputs(const UpsampleAxis<float>& axis, int64_t outputs) {
  const auto steps = static_cast<double>(outputs - 1) * static_cast<double>(axis.ratio);
  return std::min<int64_t>(axis.size_in, static_cast<int64_t>(steps + 0.125) + 3);
}

// How the forward kernel cuts the output: a block computes tile_h rows of tile_w pixels of tile_c
// channels in one plane.
struct UpsampleTiledPlan {
  int vector;  // elements of an access; 0: the generic kernel
  int channels;
  int tile_c, tile_w, tile_h;
  int patch_w, patch_h;  // most input columns and rows that a tile reads
  int64_t tiles_c, tiles_w, tiles_h;
  int64_t tiles;
  int64_t shared_bytes;
  UpsampleAxis<float> axis_h, axis_w;
  UpsampleRows input, skip, output;
};

inline int64_t upsample_tiled_shared_bytes(const UpsampleTiledPlan& plan, int64_t tile_h) {
  const int64_t patch_h = most_upsample_inputs(plan.axis_h, tile_h);
  const int64_t line = static_cast<int64_t>(plan.tile_w) * plan.tile_c;
  const int64_t patch_line = static_cast<int64_t>(plan.patch_w) * plan.tile_c;
  return 4 * ((patch_h + 1) * line + patch_h * patch_line) +
         tile_h * static_cast<int64_t>(sizeof(UpsampleTaps<float>));
}

// For a problem that is not empty and elements of `bytes` bytes; `skip` is at the crop offset.
inline UpsampleTiledPlan plan_upsample_add_tiled(const UpsampleAddParams& p,
                                                 const void* skip,
                                                 int64_t bytes) {
  const UpsampleGeometry& g = p.geometry;
  UpsampleTiledPlan plan{};
  if (bytes > 4) {
    return plan;
  }
  plan.axis_h = upsample_axis_h(g);
  plan.axis_w = upsample_axis_w(g);
  const bool inner = g.c > 1 && p.output_strides.c == 1;
  const UpsampleSize size_in{g.n, g.c, g.h_in, g.w_in};
  const UpsampleSize size_out{g.n, g.c, g.h_out, g.w_out};
  if (!is_fast_axis(plan.axis_h) || !is_fast_axis(plan.axis_w) ||
      !has_upsample_rows(size_in, p.input_strides, inner) ||
      !has_upsample_rows(size_out, p.output_strides, inner) ||
      (skip != nullptr && !has_upsample_rows(size_out, p.skip_strides, inner))) {
    return plan;
  }
  plan.input = upsample_rows(size_in, p.input_strides, inner);
  plan.output = upsample_rows(size_out, p.output_strides, inner);
  plan.skip = skip == nullptr ? UpsampleRows{} : upsample_rows(size_out, p.skip_strides, inner);

  // A block needs whole channels of 32 bytes or so to use the sectors it reads, and many pixels to
  // share the border of its patch.
  constexpr int64_t kChannels = 32;
  constexpr int64_t kValues = 256;
  constexpr int64_t kRows = 64;
  constexpr int64_t kFewestRows = 16;
  const int64_t channels = inner ? g.c : 1;
  const int64_t wide = 16 / bytes;
  const bool whole = channels <= kChannels;
  const bool vectors = (whole ? g.w_out * channels : channels) % wide == 0 &&
                       rows_aligned(p.output, plan.output, bytes, wide) &&
                       rows_aligned(skip, plan.skip, bytes, wide);
  const int64_t vector = vectors ? wide : 1;
  plan.vector = static_cast<int>(vector);
  plan.channels = static_cast<int>(channels);
  plan.tile_c = static_cast<int>(
      whole ? channels : vector * balanced_tile(channels / vector, kChannels / vector));
  // Tiles begin at a vector.
  const int64_t step = whole ? vector / std::gcd(vector, channels) : 1;
  const int64_t widest = std::min(std::clamp<int64_t>(kValues / plan.tile_c, 16, 128),
                                  kUpsampleThreads * vector / plan.tile_c);
  plan.tile_w = static_cast<int>(
      step * balanced_tile((g.w_out + step - 1) / step, std::max<int64_t>(1, widest / step)));
  plan.patch_w = static_cast<int>(most_upsample_inputs(plan.axis_w, plan.tile_w));
  plan.tiles_c = (channels + plan.tile_c - 1) / plan.tile_c;
  plan.tiles_w = (g.w_out + plan.tile_w - 1) / plan.tile_w;
  const int64_t columns = (inner ? g.n : g.n * g.c) * plan.tiles_c * plan.tiles_w;
  int64_t rows = std::min(kRows, g.h_out);
  while (upsample_tiled_shared_bytes(plan, rows) > kUpsampleSharedBytes ||
         (rows > kFewestRows && columns * ((g.h_out + rows - 1) / rows) < kUpsampleManyBlocks)) {
    rows = (rows + 1) / 2;
  }
  plan.tile_h = balanced_tile(g.h_out, rows);
  plan.patch_h = static_cast<int>(most_upsample_inputs(plan.axis_h, plan.tile_h));
  plan.tiles_h = (g.h_out + plan.tile_h - 1) / plan.tile_h;
  plan.tiles = columns * plan.tiles_h;
  plan.shared_bytes = upsample_tiled_shared_bytes(plan, plan.tile_h);
  return plan;
}

}  // namespace dilseg::cuda
