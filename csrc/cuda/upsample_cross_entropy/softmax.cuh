// SPDX-License-Identifier: Apache-2.0
//
// The exponentials and logarithms of a softmax, in float by the ex2 instruction.
#pragma once

#include "cuda/common/ptx.cuh"

namespace dilseg::cuda {

// The softmax in powers of a base that the hardware has: with y_k = exponent(x_k, shift(max x)),
//   p_k = power(y_k) / s,   -log p_k = kUnit (log(s) - y_k),   s = sum_k power(y_k).
// In float the base is 2 and y_k = x_k log2(e) - shift is one fused operation. The rounding of the
// shift is in every y_k alike, so both formulas are free of it, at logits of 1e4 too.
template <class A>
struct Softmax;

template <>
struct Softmax<float> {
  static constexpr float kLog2E = 1.44269504088896340736f;
  static constexpr float kUnit = 0.69314718055994530942f;

  static __device__ __forceinline__ float shift(float max) { return max * kLog2E; }
  static __device__ __forceinline__ float exponent(float x, float shift) {
    return fmaf(x, kLog2E, -shift);
  }
  static __device__ __forceinline__ float power(float y) { return ptx::exp2_approx(y); }
  static __device__ __forceinline__ float log(float sum) { return log2f(sum); }
};

template <>
struct Softmax<double> {
  static constexpr double kUnit = 1;

  static __device__ __forceinline__ double shift(double max) { return max; }
  static __device__ __forceinline__ double exponent(double x, double shift) { return x - shift; }
  static __device__ __forceinline__ double power(double y) { return ::exp(y); }
  static __device__ __forceinline__ double log(double sum) { return ::log(sum); }
};

// nan is passed over; it comes back in the sum of the exponentials.
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

}  // namespace dilseg::cuda
