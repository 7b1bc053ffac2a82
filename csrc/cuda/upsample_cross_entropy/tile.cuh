// SPDX-License-Identifier: Apache-2.0
//
// What the kernels over upsampled logits share: which outputs and inputs a tile has, the patch of
// inputs in shared memory, and the interpolation of a thread's pixels from it.
//
// A tile is cut into rounds of plan.segments segments by kTileColumns columns; in a round a thread
// owns one column of one segment, up to kRows pixels that share their four inputs.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/upsample_cross_entropy/select.h"
#include "dilseg/upsample_index.h"

namespace dilseg::cuda {

// Calls fn.operator()<A>() with the type that `dtype` is computed in.
template <class F>
auto dispatch_accumulator(Dtype dtype, F&& fn) {
  return dtype == Dtype::kFloat64 ? fn.template operator()<double>()
                                  : fn.template operator()<float>();
}

// The low-resolution logits and how they are cut. A: float or double, what is computed in.
template <class A>
struct TileInput {
  TilePlan plan;
  UpsampleAxis<A> axis_h, axis_w;
  int c;
  Dtype dtype;
  const void* input;
  Strides4 strides;

  TileInput(const UpsampleGeometry& g,
            Dtype input_dtype,
            const void* logits,
            const Strides4& logit_strides,
            TileUse use)
      : plan{},
        axis_h(make_upsample_axis<A>(
            g.h_in, g.h_out, g.origin_h, g.scale_h, g.align_corners, g.border)),
        axis_w(make_upsample_axis<A>(
            g.w_in, g.w_out, g.origin_w, g.scale_w, g.align_corners, g.border)),
        c(static_cast<int>(g.c)),
        dtype(input_dtype),
        input(logits),
        strides(logit_strides) {
    if (g.n > 0) {
      plan = plan_tiles(g, axis_h, axis_w, use);
    }
  }
};

// The block's dynamic shared memory.
template <class A>
struct TileShared {
  double* block;       // [2, threads] sums of the threads
  A* sums;             // [segments, 2, group, kTilePitch] sums of the columns
  A* column_w0;        // [kTileColumns] weights of the round's columns
  A* column_w1;        // [kTileColumns]
  A* scale;            // [2] of the gradient
  A* class_weights;    // [1] their sum, with smoothing
  A* cells;            // [h.cells + 1, w.cells, 2, group] if plan.folds
  int* column_begin;   // [w.cells + 1] first output of each cell; the last entry ends the tile
  int* row_begin;      // [h.cells + 1]
  int* segment_begin;  // [h.cells + 1] first segment of each cell; the last entry is their number
  A* patch;            // [staged, pitch], a class is [h.cells + 1, w.cells + 1]

  __device__ __forceinline__ explicit TileShared(const TilePlan& plan) {
    char* base = dynamic_shared<char>();
    block = reinterpret_cast<double*>(base);
    sums = reinterpret_cast<A*>(base + plan.block_bytes());
    column_w0 = reinterpret_cast<A*>(base + plan.block_bytes() + plan.sums_bytes);
    column_w1 = column_w0 + kTileColumns;
    scale = column_w1 + kTileColumns;
    class_weights = scale + 2;
    cells = scale + 3;
    column_begin = reinterpret_cast<int*>(cells + plan.folded_values());
    row_begin = column_begin + plan.w.cells + 1;
    segment_begin = row_begin + plan.h.cells + 1;
    patch = reinterpret_cast<A*>(
        base + (plan.shared_bytes - static_cast<size_t>(plan.staged) * plan.pitch * sizeof(A)));
  }
};

struct Tile {
  int64_t n;
  int index_h, index_w;  // in the image
  int cell_h, cell_w;    // lower taps of its first cells, and so the first inputs of its patch
};

__device__ __forceinline__ Tile tile_at(const TilePlan& plan, int64_t index) {
  Tile tile;
  tile.index_w = static_cast<int>(index % plan.w.tiles);
  index /= plan.w.tiles;
  tile.index_h = static_cast<int>(index % plan.h.tiles);
  tile.n = index / plan.h.tiles;
  tile.cell_h = plan.h.first + tile.index_h / plan.h.pieces * plan.h.cells;
  tile.cell_w = plan.w.first + tile.index_w / plan.w.pieces * plan.w.cells;
  return tile;
}

// First output of the tile's cell number i, or with i = cells the end of the tile.
template <class A>
__device__ __forceinline__ int tile_begin(
    const UpsampleAxis<A>& axis, const TileAxis& plan, int index, int cell, int i) {
  if (plan.pieces == 1) {
    return upsample_first(axis, cell + i);
  }
  const int begin = upsample_first(axis, cell);
  const int end = upsample_first(axis, cell + 1);
  const int64_t piece = index % plan.pieces + i;
  return piece == plan.pieces
             ? end
             : static_cast<int>(min(int64_t{begin} + piece * plan.piece, int64_t{end}));
}

// Fills the tables of cells and segments, behind and before barriers of its own.
template <class A>
__device__ __forceinline__ void begin_tile(const TileInput<A>& in,
                                           const Tile& tile,
                                           int rows,
                                           const TileShared<A>& shared) {
  const TilePlan& plan = in.plan;
  const int thread = static_cast<int>(threadIdx.x);
  const int cells_w = plan.w.cells + 1;
  __syncthreads();  // every read of what the previous tile left in shared memory
  for (int i = thread; i < cells_w + plan.h.cells + 1; i += static_cast<int>(blockDim.x)) {
    if (i < cells_w) {
      shared.column_begin[i] = tile_begin(in.axis_w, plan.w, tile.index_w, tile.cell_w, i);
    } else {
      shared.row_begin[i - cells_w] =
          tile_begin(in.axis_h, plan.h, tile.index_h, tile.cell_h, i - cells_w);
    }
  }
  __syncthreads();
  if (thread == 0) {
    int segments = 0;
    for (int i = 0; i < plan.h.cells; ++i) {
      shared.segment_begin[i] = segments;
      segments += (shared.row_begin[i + 1] - shared.row_begin[i] + rows - 1) / rows;
    }
    shared.segment_begin[plan.h.cells] = segments;
  }
  __syncthreads();
}

template <class T, class A>
__device__ __forceinline__ void stage_as(
    const TileInput<A>& in, const Tile& tile, int class_begin, int classes, A* patch) {
  const T* input =
      static_cast<const T*>(in.input) + tile.n * in.strides.n + class_begin * in.strides.c;
  const int width = in.plan.w.cells + 1;
  const int size = in.plan.patch;
  const bool channels_inner = in.strides.c == 1;
  for (int i = static_cast<int>(threadIdx.x); i < classes * size;
       i += static_cast<int>(blockDim.x)) {
    const int k = channels_inner ? i % classes : i / size;
    const int at = channels_inner ? i / classes : i % size;
    int y = tile.cell_h + at / width;
    int x = tile.cell_w + at % width;
    const bool inside = y >= 0 && y < in.axis_h.size_in && x >= 0 && x < in.axis_w.size_in;
    A value = 0;
    if (inside || in.axis_h.border == Border::kClamp) {
      y = min(max(y, 0), in.axis_h.size_in - 1);
      x = min(max(x, 0), in.axis_w.size_in - 1);
      value = load(input + k * in.strides.c + y * in.strides.h + x * in.strides.w);
    }
    patch[k * in.plan.pitch + at] = value;
  }
}

// Copies classes [begin, begin + count) of the tile's inputs to shared memory; what lies beyond the
// map repeats its edge, or is 0. The block must synchronise before and after.
template <class A>
__device__ __forceinline__ void stage(
    const TileInput<A>& in, const Tile& tile, int begin, int count, A* patch) {
  if constexpr (sizeof(A) == 8) {
    stage_as<double>(in, tile, begin, count, patch);
  } else {
    switch (in.dtype) {
      case Dtype::kFloat16:
        stage_as<__half>(in, tile, begin, count, patch);
        break;
      case Dtype::kBFloat16:
        stage_as<__nv_bfloat16>(in, tile, begin, count, patch);
        break;
      default:
        stage_as<float>(in, tile, begin, count, patch);
    }
  }
}

// Walks the classes of a tile through the patch in shared memory. The whole block must call it.
template <class A>
struct StagedClasses {
  const TileInput<A>& in;
  const Tile& tile;
  const TileShared<A>& shared;
  int staged;  // first class in shared memory, -1 if there is none

  __device__ __forceinline__ StagedClasses(const TileInput<A>& input,
                                           const Tile& of,
                                           const TileShared<A>& memory)
      : in(input), tile(of), shared(memory), staged(-1) {}

  // Calls fn(begin, count) for all classes in order, each time with those classes in the patch.
  template <class F>
  __device__ __forceinline__ void for_each(F&& fn) {
    for (int begin = 0; begin < in.c; begin += in.plan.staged) {
      const int count = min(in.plan.staged, in.c - begin);
      if (staged != begin) {
        __syncthreads();  // every read of the classes before
        stage(in, tile, begin, count, shared.patch);
        __syncthreads();
        staged = begin;
      }
      fn(begin, count);
    }
  }
};

// The part of a tile that the block takes at a time. There is one even if the tile has no pixels:
// its inputs have a gradient, 0.
template <class A>
struct Round {
  const TilePlan& plan;
  const TileShared<A>& shared;
  int segment, x;  // the first

  __device__ __forceinline__ Round(const TilePlan& of, const TileShared<A>& memory)
      : plan(of), shared(memory), segment(0), x(memory.column_begin[0]) {}

  __device__ __forceinline__ bool more() const {
    return segment < max(shared.segment_begin[plan.h.cells], 1);
  }
  __device__ __forceinline__ bool first() const {
    return segment == 0 && x == shared.column_begin[0];
  }
  __device__ __forceinline__ bool last() const {
    return segment + plan.segments >= shared.segment_begin[plan.h.cells] &&
           x + kTileColumns >= shared.column_begin[plan.w.cells];
  }
  __device__ __forceinline__ void next() {
    x += kTileColumns;
    if (x >= shared.column_begin[plan.w.cells]) {
      x = shared.column_begin[0];
      segment += plan.segments;
    }
  }
};

// Whether both taps of the cell `lower` are the clamped last input.
template <class A>
__device__ __forceinline__ bool is_last(const UpsampleAxis<A>& axis, int lower) {
  return axis.border == Border::kClamp && lower == axis.size_in - 1;
}

// What a thread owns in a round: `count` pixels of column x from row y on, 0 if nothing.
struct Segment {
  int count;
  int y, x;
  int slot_h, slot_w;  // of (lower row, lower column) in the patch
  int slot;
};

template <class A>
__device__ __forceinline__ Segment segment_of(const TileInput<A>& in,
                                              const Tile& tile,
                                              const TileShared<A>& shared,
                                              int rows,
                                              const Round<A>& round) {
  Segment own{0, 0, 0, 0, 0, 0};
  const TilePlan& plan = in.plan;
  const int index = round.segment + static_cast<int>(threadIdx.x) / kTileColumns;
  const int x = round.x + static_cast<int>(threadIdx.x) % kTileColumns;
  if (index >= shared.segment_begin[plan.h.cells] || x >= shared.column_begin[plan.w.cells]) {
    return own;
  }
  while (shared.segment_begin[own.slot_h + 1] <= index) {
    ++own.slot_h;
  }
  own.x = x;
  own.y = shared.row_begin[own.slot_h] + (index - shared.segment_begin[own.slot_h]) * rows;
  own.count = min(rows, shared.row_begin[own.slot_h + 1] - own.y);
  own.slot_w = upsample_lower(in.axis_w, upsample_source(in.axis_w, x)) - tile.cell_w;
  own.slot = own.slot_h * (plan.w.cells + 1) + own.slot_w;
  return own;
}

// The two sums along x that all pixels of a segment share; a pixel is w0 upper + w1 lower. Fused
// operations are written out, so a logit has the same bits wherever it is computed.
template <class A>
struct ColumnLogit {
  A upper, lower;

  __device__ __forceinline__ ColumnLogit(const A* at, int width, A w0, A w1)
      : upper(upsample_fma(w1, at[1], w0 * at[0])),
        lower(upsample_fma(w1, at[width + 1], w0 * at[width])) {}

  __device__ __forceinline__ A pixel(A w0, A w1) const { return pixel(upper, lower, w0, w1); }

  static __device__ __forceinline__ A pixel(A upper, A lower, A w0, A w1) {
    return upsample_fma(w1, lower, w0 * upper);
  }
};

}  // namespace dilseg::cuda
