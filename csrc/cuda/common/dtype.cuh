// SPDX-License-Identifier: Apache-2.0
//
// Element types on the device: double computes in double, everything else in float. `load` widens
// without loss; `store` rounds once, to nearest even.
#pragma once

#include "dilseg/types.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace dilseg::cuda {

template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};

// The type in which values of T are added and multiplied.
template <class T>
using acc_t = typename AccumulateIn<T>::type;

__device__ __forceinline__ double load(const double* p) { return *p; }
__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }

__device__ __forceinline__ void store(double* p, double value) { *p = value; }
__device__ __forceinline__ void store(float* p, float value) { *p = value; }
__device__ __forceinline__ void store(__half* p, float value) { *p = __float2half_rn(value); }
__device__ __forceinline__ void store(__nv_bfloat16* p, float value) {
  *p = __float2bfloat16_rn(value);
}

// Calls fn.operator()<T>() with the C++ type of `dtype`; fn returns a cudaError_t.
template <class F>
cudaError_t dispatch_dtype(Dtype dtype, F&& fn) {
  switch (dtype) {
    case Dtype::kFloat64:
      return fn.template operator()<double>();
    case Dtype::kFloat32:
      return fn.template operator()<float>();
    case Dtype::kFloat16:
      return fn.template operator()<__half>();
    case Dtype::kBFloat16:
      return fn.template operator()<__nv_bfloat16>();
  }
  return cudaErrorInvalidValue;
}

}  // namespace dilseg::cuda
