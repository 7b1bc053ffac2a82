// SPDX-License-Identifier: Apache-2.0
//
// What a pixel needs besides its logits: its label and class weights.
#pragma once

#include "cuda/common/dtype.cuh"
#include "dilseg/upsample_cross_entropy.h"

#include <cstdio>

namespace dilseg::cuda {

constexpr int kIgnored = -1;
constexpr int kBad = -2;

template <class A>
struct LabelInput {
  int64_t c, h, w;  // of the labels
  int64_t ignore_index;
  A keep;       // 1 - label_smoothing
  A smoothing;  // label_smoothing / c
  IndexType target_type;
  const void* target;
  const A* weight;

  explicit LabelInput(const UpsampleCrossEntropyProblem& p)
      : c(p.geometry.c),
        h(p.geometry.h_out),
        w(p.geometry.w_out),
        ignore_index(p.ignore_index),
        keep(static_cast<A>(1.0 - p.label_smoothing)),
        smoothing(static_cast<A>(p.label_smoothing / static_cast<double>(p.geometry.c))),
        target_type(p.target_type),
        target(p.target),
        weight(static_cast<const A*>(p.weight)) {}

  __device__ __forceinline__ A class_weight(int k) const {
    return weight == nullptr ? A(1) : weight[k];
  }

  // A pixel is counted over [n, h, w].
  __device__ __forceinline__ int64_t value(int64_t pixel) const {
    switch (target_type) {
      case IndexType::kInt64:
        return static_cast<const int64_t*>(target)[pixel];
      case IndexType::kInt32:
        return static_cast<const int32_t*>(target)[pixel];
      default:
        return static_cast<const uint8_t*>(target)[pixel];
    }
  }

  // The label of a pixel: kIgnored, kBad, or in [0, c).
  __device__ __forceinline__ int label(int64_t pixel) const {
    const int64_t t = value(pixel);
    return t == ignore_index ? kIgnored : t < 0 || t >= c ? kBad : static_cast<int>(t);
  }

  // Stops the program with a line that names the label: a silent gradient of a wrong class would be
  // worse.
  __device__ __forceinline__ void stop(int64_t pixel) const {
    const int64_t row = pixel / w;
    printf(
        "dilseg::upsample_cross_entropy: expected target labels in [0, %lld) for %lld classes, or "
        "ignore_index=%lld, but got label %lld at pixel n=%lld, h=%lld, w=%lld; did you forget "
        "ignore_index=255?\n",
        static_cast<long long>(c),
        static_cast<long long>(c),
        static_cast<long long>(ignore_index),
        static_cast<long long>(value(pixel)),
        static_cast<long long>(row / h),
        static_cast<long long>(row % h),
        static_cast<long long>(pixel % w));
    __trap();
  }
};

}  // namespace dilseg::cuda
