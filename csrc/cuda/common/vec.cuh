// SPDX-License-Identifier: Apache-2.0
//
// Neighbouring elements that are loaded and stored by one instruction of up to 16 bytes. The
// address must be a multiple of the vector's size.
#pragma once

#include <cuda_runtime.h>

namespace dilseg::cuda {

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vec {
  static_assert(sizeof(T) * kCount <= 16);
  T v[kCount];
};

template <int kCount, class T>
__device__ __forceinline__ Vec<T, kCount> load_vec(const T* p) {
  return *reinterpret_cast<const Vec<T, kCount>*>(p);
}

template <int kCount, class T>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, kCount>& value) {
  *reinterpret_cast<Vec<T, kCount>*>(p) = value;
}

}  // namespace dilseg::cuda
