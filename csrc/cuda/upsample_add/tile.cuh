// SPDX-License-Identifier: Apache-2.0
//
// What the upsampling kernels share: the blend of two taps, which part of the written tensor a tile
// of the generic kernels is, and which element of it a thread takes; the fast launchers.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/upsample_add/select.h"
#include "dilseg/upsample_index.h"

namespace dilseg::cuda {

// w0 a + w1 b with the fused operation written out, so that every kernel makes the same bits.
template <class A>
__device__ __forceinline__ A upsample_blend(A w0, A a, A w1, A b) {
  return upsample_fma(w0, a, w1 * b);
}

// Launches the kernel of a plan whose `vector` is not 0; `skip` is at the crop offset.
cudaError_t launch_upsample_add_tiled(const UpsampleAddParams& p,
                                      const void* skip,
                                      const UpsampleTiledPlan& plan,
                                      Stream stream);

cudaError_t launch_upsample_backward_columns(const UpsampleAddBackwardParams& p,
                                             const UpsampleColumnsPlan& plan,
                                             Stream stream);
cudaError_t launch_upsample_backward_cells(const UpsampleAddBackwardParams& p,
                                           const UpsampleCellsPlan& plan,
                                           Stream stream);

// What an output gives to its lower tap and to the next pixel; at a clamped edge all to the lower.
struct UpsampleShares {
  float lower, upper;
};

__device__ __forceinline__ UpsampleShares upsample_shares(const UpsampleAxis<float>& axis,
                                                          int32_t dst) {
  const UpsampleTaps<float> taps = upsample_taps(axis, dst);
  return taps.i0 == taps.i1 ? UpsampleShares{taps.w0 + taps.w1, 0.0f}
                            : UpsampleShares{taps.w0, taps.w1};
}

// The tile covers channels [c, c + size_c) of pixels [x, x + size_w) in row y of image n.
struct UpsampleTile {
  int64_t n;
  int c, y, x;
  int size_c, size_w;
};

__device__ __forceinline__ UpsampleTile
upsample_tile(const UpsamplePlan& plan, int64_t index, int channels, int rows, int columns) {
  UpsampleTile tile;
  tile.x = static_cast<int>(index % plan.tiles_w) * plan.tile_w;
  index /= plan.tiles_w;
  tile.c = static_cast<int>(index % plan.tiles_c) * plan.tile_c;
  index /= plan.tiles_c;
  tile.y = static_cast<int>(index % rows);
  tile.n = index / rows;
  tile.size_c = min(plan.tile_c, channels - tile.c);
  tile.size_w = min(plan.tile_w, columns - tile.x);
  return tile;
}

struct UpsampleItem {
  int c, x;
};

// Element `item` of a [tile_c, width] tile in the order of memory.
template <bool kChannelsInner>
__device__ __forceinline__ UpsampleItem upsample_item(int item, int tile_c, int width) {
  if constexpr (kChannelsInner) {
    return {item % tile_c, item / tile_c};
  } else {
    return {item / width, item % width};
  }
}

}  // namespace dilseg::cuda
