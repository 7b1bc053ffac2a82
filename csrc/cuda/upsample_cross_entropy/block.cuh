// SPDX-License-Identifier: Apache-2.0
//
// What a block does with the pixels of its tile, whichever way it computed them: sums of losses in
// a fixed order, and the transposed interpolation that takes column sums of gradients to inputs.
#pragma once

#include "cuda/upsample_cross_entropy/gradient.cuh"
#include "cuda/upsample_cross_entropy/pixel.cuh"
#include "cuda/upsample_cross_entropy/tile.cuh"

namespace dilseg::cuda {

// Losses and class weights of a block's threads, in shared memory: there they take no registers
// from the pixels.
struct BlockSums {
  double* loss;  // [threads]
  double* weight;

  __device__ __forceinline__ explicit BlockSums(double* memory)
      : loss(memory), weight(memory + blockDim.x) {}

  __device__ __forceinline__ void set(double new_loss, double new_weight) const {
    loss[threadIdx.x] = new_loss;
    weight[threadIdx.x] = new_weight;
  }
  __device__ __forceinline__ void add(double more_loss, double more_weight) const {
    loss[threadIdx.x] += more_loss;
    weight[threadIdx.x] += more_weight;
  }

  // Leaves the sums over the block in element 0. The tree is fixed: half the threads, ..., 2, 1.
  __device__ __forceinline__ void reduce() const {
    const int thread = static_cast<int>(threadIdx.x);
    for (int stride = static_cast<int>(blockDim.x) / 2; stride > 0; stride /= 2) {
      __syncthreads();  // the writes of the level above, before they are read
      if (thread < stride) {
        loss[thread] += loss[thread + stride];
        weight[thread] += weight[thread + stride];
      }
    }
  }
};

template <class A>
struct TileOutput {
  const A* upstream;  // [n, h_out, w_out] gradients of the losses; null: all 1
  A* losses;          // [n, h_out, w_out]; null unless "none"
  double* sums;       // [2, tiles] losses, then weights; null: no loss is wanted
  A* partials;        // [tiles, patch, c] of the gradient
  GradientOutput<A> grad;
};

// Once per block, before its first tile: the scale waits in shared memory, where it takes no
// registers from the pixels.
template <class A>
__device__ __forceinline__ void share_scale(const TileShared<A>& shared,
                                            const GradientOutput<A>& out) {
  if (threadIdx.x == 0) {
    const GradientScale<A> scale(out);
    shared.scale[0] = scale.factor;
    shared.scale[1] = scale.zero ? A(1) : A(0);
  }
}

// The weights that the columns of a round have in the gradient, for add_columns. At the clamped end
// both taps are the last input.
template <class A>
__device__ __forceinline__ void share_column_weights(const TileInput<A>& in,
                                                     const Tile& tile,
                                                     const TileShared<A>& shared,
                                                     const Segment& at,
                                                     A w0,
                                                     A w1) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kTileColumns && at.count > 0) {
    const bool clamped = is_last(in.axis_w, tile.cell_w + at.slot_w);
    shared.column_w0[thread] = clamped ? w0 + w1 : w0;
    shared.column_w1[thread] = clamped ? A(0) : w1;
  }
}

// The segments of a round that read an input row: in [top, split) as their lower row, in
// [split, bottom) as their upper one.
struct RowSegments {
  int top, split, bottom;

  template <class A>
  __device__ __forceinline__ RowSegments(const TileShared<A>& shared,
                                         const Round<A>& round,
                                         int slot_h)
      : top(max(shared.segment_begin[max(slot_h - 1, 0)] - round.segment, 0)),
        split(shared.segment_begin[slot_h] - round.segment),
        bottom(min(shared.segment_begin[min(slot_h + 1, round.plan.h.cells)] - round.segment,
                   round.plan.segments)) {}

  // Row of the column sums, [segments, 2].
  __device__ __forceinline__ int row(int segment) const {
    return segment * 2 + (segment < split ? 1 : 0);
  }
};

// What the columns of each cell give to their left and right input, into shared.cells. Every
// (class, cell, input row) has one thread, which adds from left to right.
template <class A>
__device__ __forceinline__ void fold_columns(const TileShared<A>& shared,
                                             const Round<A>& round,
                                             int classes) {
  const TilePlan& plan = round.plan;
  const int items = classes * plan.w.cells * (plan.h.cells + 1);
  for (int i = static_cast<int>(threadIdx.x); i < items; i += static_cast<int>(blockDim.x)) {
    const int k = i % classes;
    const int cell = i / classes % plan.w.cells;
    const int slot_h = i / classes / plan.w.cells;
    const int begin = max(shared.column_begin[cell] - round.x, 0);
    const int end = min(shared.column_begin[cell + 1] - round.x, kTileColumns);
    const RowSegments rows(shared, round, slot_h);
    A left = 0;
    A right = 0;
    for (int segment = rows.top; segment < rows.bottom; ++segment) {
      const A* sums = shared.sums + (rows.row(segment) * plan.group + k) * kTilePitch;
      for (int column = begin; column < end; ++column) {
        left += shared.column_w0[column] * sums[column];
        right += shared.column_w1[column] * sums[column];
      }
    }
    A* fold = shared.cells + (slot_h * plan.w.cells + cell) * 2 * plan.group + k;
    fold[0] = left;
    fold[plan.group] = right;
  }
}

// The gradient of one input from what its two cells were folded to.
template <class A>
__device__ __forceinline__ A
folded(const TileShared<A>& shared, const TilePlan& plan, int k, int slot_h, int slot_w) {
  const A* fold = shared.cells + (slot_h * plan.w.cells + slot_w) * 2 * plan.group + k;
  const A right = slot_w > 0 ? fold[-plan.group] : A(0);
  const A left = slot_w < plan.w.cells ? fold[0] : A(0);
  return right + left;
}

// The same from the columns themselves, where cells are too small for folding to pay.
template <class A>
__device__ __forceinline__ A
sum_columns(const TileShared<A>& shared, const Round<A>& round, int k, int slot_h, int slot_w) {
  const TilePlan& plan = round.plan;
  // Columns of the cell before read the input as their right tap, those of its own as their left.
  const int begin = max(shared.column_begin[max(slot_w - 1, 0)] - round.x, 0);
  const int middle = shared.column_begin[slot_w] - round.x;
  const int end = min(shared.column_begin[min(slot_w + 1, plan.w.cells)] - round.x, kTileColumns);
  const RowSegments rows(shared, round, slot_h);
  A total = 0;
  for (int segment = rows.top; segment < rows.bottom; ++segment) {
    const A* sums = shared.sums + (rows.row(segment) * plan.group + k) * kTilePitch;
    for (int column = begin; column < end; ++column) {
      const A* weights = column < middle ? shared.column_w1 : shared.column_w0;
      total += weights[column] * sums[column];
    }
  }
  return total;
}

// From the column sums of classes [begin, begin + classes) to the tile's inputs; every
// (class, input) has one thread. Behind a barrier; the block must synchronise before sums change.
template <class A>
__device__ __forceinline__ void add_columns(const TileInput<A>& in,
                                            const Tile& tile,
                                            int64_t index,
                                            const TileShared<A>& shared,
                                            const Round<A>& round,
                                            int begin,
                                            int classes,
                                            const TileOutput<A>& out) {
  const TilePlan& plan = in.plan;
  if (plan.folds) {
    fold_columns(shared, round, classes);
    __syncthreads();
  }
  const int width = plan.w.cells + 1;
  for (int i = static_cast<int>(threadIdx.x); i < classes * plan.patch;
       i += static_cast<int>(blockDim.x)) {
    const int k = i % classes;
    const int slot = i / classes;
    const int slot_h = slot / width;
    const int slot_w = slot % width;
    const int y = tile.cell_h + slot_h;
    const int x = tile.cell_w + slot_w;
    if (y < 0 || y >= in.axis_h.size_in || x < 0 || x >= in.axis_w.size_in) {
      continue;
    }
    A total = plan.folds ? folded(shared, plan, k, slot_h, slot_w)
                         : sum_columns(shared, round, k, slot_h, slot_w);
    A* partial = out.partials + (index * plan.patch + slot) * in.c + begin + k;
    if (!round.first()) {
      total += *partial;
    }
    if (round.last() && tiles_of(plan.h, y).alone() && tiles_of(plan.w, x).alone()) {
      store_gradient(out.grad,
                     tile.n * out.grad.strides.n + (begin + k) * out.grad.strides.c +
                         y * out.grad.strides.h + x * out.grad.strides.w,
                     GradientScale<A>(shared.scale[0], shared.scale[1] != A(0))(total));
    } else {
      *partial = total;
    }
  }
}

// Behind the last round: the block's sums of losses and of class weights.
template <class A>
__device__ __forceinline__ void finish_tile(const TilePlan& plan,
                                            const BlockSums& sums,
                                            int64_t index,
                                            const TileOutput<A>& out) {
  if (out.sums == nullptr) {
    return;
  }
  sums.reduce();
  if (threadIdx.x == 0) {
    out.sums[index] = sums.loss[0];
    out.sums[plan.tiles + index] = sums.weight[0];
  }
}

}  // namespace dilseg::cuda
