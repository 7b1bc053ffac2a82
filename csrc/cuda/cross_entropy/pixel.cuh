// SPDX-License-Identifier: Apache-2.0
//
// What all cross-entropy kernels share: their arguments, where a pixel lies, its label, class
// weights, and the order in which losses are added.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/cross_entropy/select.h"

#include <cstdio>

namespace dilseg::cuda {

template <class T>
struct CrossEntropyInput {
  using A = acc_t<T>;

  int64_t pixels, c, h, w;
  int64_t rows, width;  // pixels count over [n, rows, width]
  int64_t ignore_index;
  A keep;       // 1 - label_smoothing
  A smoothing;  // label_smoothing / c
  IndexType target_type;
  const T* input;
  Strides4 strides;  // of input over [n, c, rows, width]
  const void* target;
  const A* weight;

  CrossEntropyInput(const CrossEntropyProblem& p, const CrossEntropyPlan& plan)
      : pixels(plan.pixels),
        c(p.c),
        h(p.h),
        w(p.w),
        rows(plan.rows),
        width(plan.width),
        ignore_index(p.ignore_index),
        keep(static_cast<A>(1.0 - p.label_smoothing)),
        smoothing(static_cast<A>(p.label_smoothing / static_cast<double>(p.c))),
        target_type(p.target_type),
        input(static_cast<const T*>(p.input)),
        strides(plan.input),
        target(p.target),
        weight(static_cast<const A*>(p.weight)) {}

  __device__ __forceinline__ A class_weight(int64_t k) const {
    return weight == nullptr ? A(1) : weight[k];
  }

  // Offset of a pixel in a tensor with strides s over [n, c, rows, width].
  __device__ __forceinline__ int64_t offset(int64_t pixel, const Strides4& s) const {
    int64_t line, x;
    divide(pixel, width, line, x);
    int64_t n = line, row = 0;
    if (rows > 1) {
      divide(line, rows, n, row);
    }
    return n * s.n + row * s.h + x * s.w;
  }

  // The label of a pixel; -1 where ignored, -2 where out of range.
  __device__ __forceinline__ int64_t checked_label(int64_t pixel) const {
    const int64_t t = raw_label(pixel);
    return t == ignore_index ? -1 : t < 0 || t >= c ? -2 : t;
  }

  // The same; a label out of range stops the program with a line that names it: a silent gradient
  // of a wrong class would be worse.
  __device__ __forceinline__ int64_t label(int64_t pixel) const {
    const int64_t t = checked_label(pixel);
    if (t == -2) {
      stop_at(pixel);
    }
    return t;
  }

  __device__ __forceinline__ void stop_at(int64_t pixel) const {
    const int64_t row = pixel / w;
    printf(
        "dilseg::cross_entropy: expected target labels in [0, %lld) for %lld classes, or "
        "ignore_index=%lld, but got label %lld at pixel n=%lld, h=%lld, w=%lld; did you forget "
        "ignore_index=255?\n",
        static_cast<long long>(c),
        static_cast<long long>(c),
        static_cast<long long>(ignore_index),
        static_cast<long long>(raw_label(pixel)),
        static_cast<long long>(row / h),
        static_cast<long long>(row % h),
        static_cast<long long>(pixel % w));
    __trap();
  }

 private:
  __device__ __forceinline__ int64_t raw_label(int64_t pixel) const {
    switch (target_type) {
      case IndexType::kInt64:
        return static_cast<const int64_t*>(target)[pixel];
      case IndexType::kInt32:
        return static_cast<const int32_t*>(target)[pixel];
      default:
        return static_cast<const uint8_t*>(target)[pixel];
    }
  }

  // A 64-bit division is a subroutine of about a hundred instructions, a 32-bit one of twenty.
  __device__ static __forceinline__ void divide(int64_t a,
                                                int64_t b,
                                                int64_t& quotient,
                                                int64_t& rest) {
    if (static_cast<uint64_t>(a | b) >> 32 == 0) {
      const auto a32 = static_cast<uint32_t>(a), b32 = static_cast<uint32_t>(b);
      quotient = a32 / b32;
      rest = a32 % b32;
    } else {
      quotient = a / b;
      rest = a % b;
    }
  }
};

// ---- sums over pixels ---------------------------------------------------------------------------
// The losses of a tile are added as a balanced binary tree over its 256 pixels: neighbours, then
// pairs of neighbours, and so on. Thread, warp and block each contribute some levels; how many
// pixels a thread owns changes who adds, not what is added to what.

struct LossSum {
  double loss = 0;
  double weight = 0;
};

__device__ __forceinline__ LossSum operator+(const LossSum& a, const LossSum& b) {
  return {a.loss + b.loss, a.weight + b.weight};
}

// The sum over the warp, of lanes 2i and 2i + 1 first, in every lane.
__device__ __forceinline__ LossSum add_warp(LossSum sum) {
  for (int stride = 1; stride < kWarp; stride *= 2) {
    const LossSum other{__shfl_xor_sync(0xffffffffu, sum.loss, stride),
                        __shfl_xor_sync(0xffffffffu, sum.weight, stride)};
    sum = sum + other;
  }
  return sum;
}

// One sum per group of pixels; kGroups is a power of two.
template <int kGroups>
struct GroupSums {
  LossSum group[kGroups];

  // The balanced tree over groups [kFirst, kFirst + kCount).
  template <int kFirst = 0, int kCount = kGroups>
  __device__ __forceinline__ LossSum add() const {
    if constexpr (kCount == 1) {
      return group[kFirst];
    } else {
      return add<kFirst, kCount / 2>() + add<kFirst + kCount / 2, kCount / 2>();
    }
  }
};

}  // namespace dilseg::cuda
