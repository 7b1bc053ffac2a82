// SPDX-License-Identifier: Apache-2.0
//
// Where the gradient of an input goes: an input that one tile alone touches is written by that
// tile, any other is the sum of the tiles' partial gradients, in the order of the tiles.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/upsample_cross_entropy/select.h"
#include "dilseg/upsample_cross_entropy.h"

namespace dilseg::cuda {

// Half-open range of the tiles whose patch holds an input.
struct TileRange {
  int begin, end;

  __device__ __forceinline__ bool alone() const { return end - begin == 1; }
};

__device__ __forceinline__ TileRange tiles_of(const TileAxis& plan, int i) {
  const int64_t cell = int64_t{i} - plan.first;  // its outputs and those of the cell before read i
  if (cell < 0) {
    return {0, 0};
  }
  const int64_t begin = cell == 0 ? 0 : (cell - 1) / plan.cells * plan.pieces;
  const int64_t end = (cell / plan.cells + 1) * plan.pieces;
  return {static_cast<int>(min(begin, int64_t{plan.tiles})),
          static_cast<int>(min(end, int64_t{plan.tiles}))};
}

template <class A>
struct GradientOutput {
  Dtype dtype;
  void* data;  // [n, c, h_in, w_in]
  Strides4 strides;
  Reduction reduction;
  const A* grad_output;   // null: the gradient of the sum of the losses
  const A* total_weight;  // used for "mean"
};

// What the gradient of the sum of the losses is multiplied by, before its one rounding.
template <class A>
struct GradientScale {
  A factor;
  bool zero;  // "mean" over nothing

  __device__ __forceinline__ explicit GradientScale(const GradientOutput<A>& out)
      : factor(1), zero(false) {
    if (out.grad_output == nullptr || out.reduction == Reduction::kNone) {
      return;
    }
    factor = *out.grad_output;
    if (out.reduction == Reduction::kMean) {
      const A total = *out.total_weight;
      zero = total == A(0);
      factor = zero ? A(0) : factor / total;
    }
  }

  __device__ __forceinline__ GradientScale(A by, bool nothing) : factor(by), zero(nothing) {}

  __device__ __forceinline__ A operator()(A value) const { return zero ? A(0) : value * factor; }
};

template <class A>
__device__ __forceinline__ void store_gradient(const GradientOutput<A>& out,
                                               int64_t offset,
                                               A value) {
  if constexpr (sizeof(A) == 8) {
    store(static_cast<double*>(out.data) + offset, value);
  } else {
    switch (out.dtype) {
      case Dtype::kFloat16:
        store(static_cast<__half*>(out.data) + offset, value);
        break;
      case Dtype::kBFloat16:
        store(static_cast<__nv_bfloat16*>(out.data) + offset, value);
        break;
      default:
        store(static_cast<float*>(out.data) + offset, value);
    }
  }
}

}  // namespace dilseg::cuda
