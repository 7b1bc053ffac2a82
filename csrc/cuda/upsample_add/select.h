// SPDX-License-Identifier: Apache-2.0
//
// How an upsampling is cut into blocks: pure functions of the problem, without CUDA, so that the
// choice never changes between runs and can be tested on any machine.
#pragma once

#include "dilseg/upsample_add.h"

#include <algorithm>
#include <cstdint>

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

}  // namespace dilseg::cuda
