// SPDX-License-Identifier: Apache-2.0
//
// What the cross-entropy kernels share: their arguments, where a pixel lies, its label, class
// weights.
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
  int64_t ignore_index;
  A keep;       // 1 - label_smoothing
  A smoothing;  // label_smoothing / c
  IndexType target_type;
  const T* input;
  Strides4 strides;
  const void* target;
  const A* weight;

  explicit CrossEntropyInput(const CrossEntropyProblem& p)
      : pixels(p.n * p.h * p.w),
        c(p.c),
        h(p.h),
        w(p.w),
        ignore_index(p.ignore_index),
        keep(static_cast<A>(1.0 - p.label_smoothing)),
        smoothing(static_cast<A>(p.label_smoothing / static_cast<double>(p.c))),
        target_type(p.target_type),
        input(static_cast<const T*>(p.input)),
        strides(p.input_strides),
        target(p.target),
        weight(static_cast<const A*>(p.weight)) {}

  __device__ __forceinline__ A class_weight(int64_t k) const {
    return weight == nullptr ? A(1) : weight[k];
  }

  // Offset of a pixel, counted over [n, h, w], in a tensor with strides s.
  __device__ __forceinline__ int64_t offset(int64_t pixel, const Strides4& s) const {
    const int64_t x = pixel % w;
    const int64_t row = pixel / w;
    return row / h * s.n + row % h * s.h + x * s.w;
  }

  // The label of a pixel, -1 where ignored. Any other label outside [0, c) stops the program with a
  // line that names it: a silent gradient of a wrong class would be worse.
  __device__ __forceinline__ int64_t label(int64_t pixel) const {
    int64_t t;
    switch (target_type) {
      case IndexType::kInt64:
        t = static_cast<const int64_t*>(target)[pixel];
        break;
      case IndexType::kInt32:
        t = static_cast<const int32_t*>(target)[pixel];
        break;
      default:
        t = static_cast<const uint8_t*>(target)[pixel];
    }
    if (t == ignore_index) {
      return -1;
    }
    if (t < 0 || t >= c) {
      const int64_t row = pixel / w;
      printf(
          "dilseg::cross_entropy: expected target labels in [0, %lld) for %lld classes, or "
          "ignore_index=%lld, but got label %lld at pixel n=%lld, h=%lld, w=%lld; did you forget "
          "ignore_index=255?\n",
          static_cast<long long>(c),
          static_cast<long long>(c),
          static_cast<long long>(ignore_index),
          static_cast<long long>(t),
          static_cast<long long>(row / h),
          static_cast<long long>(row % h),
          static_cast<long long>(pixel % w));
      __trap();
    }
    return t;
  }
};

}  // namespace dilseg::cuda
