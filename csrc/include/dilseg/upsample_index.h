// SPDX-License-Identifier: Apache-2.0
//
// The index rule of bilinear interpolation on one axis, the same code on host and device. It is
// torch's rule bit for bit (float for every dtype but double):
//   align_corners = false:  src = ratio * (dst + 0.5) - 0.5,  ratio = 1/scale, or in/out
//   align_corners = true:   src = ratio * dst,                ratio = (in - 1)/(full_out - 1)
// torch's AVX builds contract the first src into one fused multiply-add, and so does nvcc unless
// told otherwise; here that is written out, so no compiler flag can change which pixels are read or
// with what weight.
#pragma once

#include "dilseg/types.h"

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DILSEG_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DILSEG_HOST_DEVICE inline
#endif

namespace dilseg {

// How positions of an output window map into an input axis. T: float, or double for double tensors.
template <class T>
struct UpsampleAxis {
  T ratio;
  T centre;  // 0.5, or 0 with align_corners
  int32_t size_in;
  int32_t size_out;
  int64_t origin;  // position of the window in the full output
  Border border;
};

// The two input positions read by one output position, and their weights. -1: beyond a zero border,
// contributes nothing.
template <class T>
struct UpsampleTaps {
  int32_t i0, i1;
  T w0, w1;
};

// Half-open range of output positions.
struct UpsampleRange {
  int32_t begin, end;
};

// Length of the whole output on one axis, of which the window [origin, origin + size_out) is
// computed.
inline int64_t upsample_full_size(int64_t size_in, int64_t size_out, double scale) {
  if (scale > 0) {
    // Bounded so that the conversion is defined for any scale.
    return static_cast<int64_t>(
        std::fmin(std::floor(static_cast<double>(size_in) * scale), 0x1p62));
  }
  return size_out;
}

// `scale` = 0 derives the step from the sizes.
template <class T>
UpsampleAxis<T> make_upsample_axis(int64_t size_in,
                                   int64_t size_out,
                                   int64_t origin,
                                   double scale,
                                   bool align_corners,
                                   Border border) {
  const int64_t full = upsample_full_size(size_in, size_out, scale);
  T ratio;
  if (align_corners) {
    ratio = full > 1 ? static_cast<T>(size_in - 1) / static_cast<T>(full - 1) : T(0);
  } else if (full == size_in && border == Border::kClamp) {
    ratio = T(1);  // torch copies when the sizes agree, whatever the scale (1.05 on 10 pixels)
  } else {
    ratio =
        scale > 0 ? static_cast<T>(1.0 / scale) : static_cast<T>(size_in) / static_cast<T>(full);
  }
  return {ratio,
          align_corners ? T(0) : T(0.5),
          static_cast<int32_t>(size_in),
          static_cast<int32_t>(size_out),
          origin,
          border};
}

DILSEG_HOST_DEVICE float upsample_fma(float a, float b, float c) { return ::fmaf(a, b, c); }
DILSEG_HOST_DEVICE double upsample_fma(double a, double b, double c) { return ::fma(a, b, c); }

// With align_corners centre is 0 and the fused form rounds once, exactly as the plain product.
template <class T>
DILSEG_HOST_DEVICE T upsample_source(const UpsampleAxis<T>& axis, int32_t dst) {
  return upsample_fma(axis.ratio, static_cast<T>(dst + axis.origin) + axis.centre, -axis.centre);
}

// Index of the lower tap. Never decreases with dst, which is what lets `upsample_range` search.
// With a zero border it runs from -2 (both taps before the map) to size_in (both behind it).
template <class T>
DILSEG_HOST_DEVICE int32_t upsample_lower(const UpsampleAxis<T>& axis, T src) {
  if (axis.border == Border::kClamp) {
    const int32_t last = axis.size_in - 1;
    // Compared before the conversion, which is undefined out of range; src may be infinite.
    return src >= static_cast<T>(last) ? last : src > T(0) ? static_cast<int32_t>(src) : 0;
  }
  if (!(src >= T(-1))) {
    return -2;
  }
  if (src >= static_cast<T>(axis.size_in)) {
    return axis.size_in;
  }
  const int32_t truncated = static_cast<int32_t>(src);
  return truncated - (static_cast<T>(truncated) > src ? 1 : 0);
}

template <class T>
DILSEG_HOST_DEVICE UpsampleTaps<T> upsample_taps(const UpsampleAxis<T>& axis, int32_t dst) {
  const T src = upsample_source(axis, dst);
  const int32_t lower = upsample_lower(axis, src);
  const int32_t last = axis.size_in - 1;
  T w1 = src - static_cast<T>(lower);
  if (axis.border == Border::kClamp) {
    w1 = w1 > T(0) ? w1 : T(0);
    w1 = w1 < T(1) ? w1 : T(1);
    return {lower, lower < last ? lower + 1 : lower, T(1) - w1, w1};
  }
  if (lower < -1 || lower > last) {
    return {-1, -1, T(0), T(0)};
  }
  return {lower, lower < last ? lower + 1 : -1, T(1) - w1, w1};
}

// Weight with which output `dst` reads input `i`; both taps are `i` at a clamped edge.
template <class T>
DILSEG_HOST_DEVICE T upsample_weight(const UpsampleTaps<T>& taps, int32_t i) {
  return (taps.i0 == i ? taps.w0 : T(0)) + (taps.i1 == i ? taps.w1 : T(0));
}

// First output position whose lower tap is at least `lower`; size_out if there is none.
template <class T>
DILSEG_HOST_DEVICE int32_t upsample_first(const UpsampleAxis<T>& axis, int32_t lower) {
  int32_t begin = 0;
  int32_t end = axis.size_out;
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (upsample_lower(axis, upsample_source(axis, middle)) >= lower) {
      end = middle;
    } else {
      begin = middle + 1;
    }
  }
  return begin;
}

// Exactly the outputs that read input `i`: those whose lower tap is i - 1 or i. Found by bisection
// of the forward rule itself, since no inverse formula reproduces its rounding for every scale.
template <class T>
DILSEG_HOST_DEVICE UpsampleRange upsample_range(const UpsampleAxis<T>& axis, int32_t i) {
  return {upsample_first(axis, i - 1), upsample_first(axis, i + 1)};
}

}  // namespace dilseg
