// SPDX-License-Identifier: Apache-2.0
//
// Pieces shared by the direct convolution kernels: the problem in 32-bit sizes, memory-order
// indexing and sums with short rounding chains.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/dilated_conv2d/direct.h"
#include "dilseg/dilated_conv2d.h"

namespace dilseg::cuda {

// DilatedConv2dShape in the width the kernels compute in; `fits_dilated_conv2d` makes it lossless.
struct DirectShape {
  int64_t n;
  int c_in, h_in, w_in;
  int c_out, h_out, w_out;
  int k_h, k_w;
  int stride_h, stride_w;
  int pad_top, pad_left;
  int dil_h, dil_w;
  int group_in, group_out;  // channels of one group
};

inline DirectShape direct_shape(const DilatedConv2dShape& s) {
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {s.n,
          narrow(s.c_in),
          narrow(s.h_in),
          narrow(s.w_in),
          narrow(s.c_out),
          narrow(s.h_out),
          narrow(s.w_out),
          narrow(s.k_h),
          narrow(s.k_w),
          narrow(s.stride_h),
          narrow(s.stride_w),
          narrow(s.pad_top),
          narrow(s.pad_left),
          narrow(s.dil_h),
          narrow(s.dil_w),
          narrow(s.c_in / s.groups),
          narrow(s.c_out / s.groups)};
}

struct Index4 {
  int64_t n;
  int c, h, w;
};

// Divides `i` by `extent` in place and returns the remainder, for one 64-bit division.
__device__ __forceinline__ int split(int64_t& i, int extent) {
  const int64_t quotient = i / extent;
  const int remainder = static_cast<int>(i - quotient * extent);
  i = quotient;
  return remainder;
}

// The element at position `i` of a [n, c, h, w] tensor in memory order: [n, h, w, c] if
// kChannelsLast.
template <bool kChannelsLast>
__device__ __forceinline__ Index4 unravel(int64_t i, int c, int h, int w) {
  Index4 at;
  if constexpr (kChannelsLast) {
    at.c = split(i, c);
    at.w = split(i, w);
    at.h = split(i, h);
  } else {
    at.w = split(i, w);
    at.h = split(i, h);
    at.c = split(i, c);
  }
  at.n = i;
  return at;
}

// Sum of products in blocks: at most kBlock products are chained before they join the total, so the
// rounding error grows like K/kBlock + kBlock instead of K, as in a blocked BLAS.
template <class Acc>
class BlockedSum {
 public:
  __device__ __forceinline__ void add_product(Acc a, Acc b) {
    block_ += a * b;
    if (++count_ == kBlock) {
      flush();
    }
  }
  __device__ __forceinline__ void add(Acc value) { add_product(value, Acc(1)); }
  __device__ __forceinline__ Acc total() {
    flush();
    return total_;
  }

 private:
  static constexpr int kBlock = 64;

  __device__ __forceinline__ void flush() {
    total_ += block_;
    block_ = 0;
    count_ = 0;
  }

  Acc total_ = 0;
  Acc block_ = 0;
  int count_ = 0;
};

}  // namespace dilseg::cuda
