// SPDX-License-Identifier: Apache-2.0
//
// Tensor maps from lists of numbers that a test writes down.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

// Where a copy starts, innermost dimension first, and its im2col offsets.
struct Position {
  int at[5];
  uint16_t offsets[3];
};

// rank coordinates, then rank - 2 offsets if the copy has them.
inline Position read_position(const int* numbers, int rank, bool im2col) {
  Position p = {};
  for (int d = 0; d < rank; ++d) {
    p.at[d] = numbers[d];
  }
  for (int s = 0; im2col && s < rank - 2; ++s) {
    p.offsets[s] = static_cast<uint16_t>(numbers[rank + s]);
  }
  return p;
}

template <class Encode>
Encode driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found);
  return status == cudaSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

// spec: data type, rank, swizzle, then per dimension the extents, the strides in bytes (all but the
// first), the element strides, and the box; for im2col instead of the box the lower corner, the
// upper corner, channels per pixel and pixels per column.
inline bool make_map(CUtensorMap* map, void* address, const int* spec, bool im2col) {
  const auto type = static_cast<CUtensorMapDataType>(spec[0]);
  const int rank = spec[1];
  const auto swizzle = static_cast<CUtensorMapSwizzle>(spec[2]);
  const int* next = spec + 3;
  cuuint64_t dims[5] = {};
  cuuint64_t strides[5] = {};
  cuuint32_t steps[5] = {};
  cuuint32_t box[5] = {};
  int lower[3] = {};
  int upper[3] = {};
  for (int d = 0; d < rank; ++d) {
    dims[d] = static_cast<cuuint64_t>(*next++);
  }
  for (int d = 1; d < rank; ++d) {
    strides[d - 1] = static_cast<cuuint64_t>(*next++);
  }
  for (int d = 0; d < rank; ++d) {
    steps[d] = static_cast<cuuint32_t>(*next++);
  }
  if (!im2col) {
    for (int d = 0; d < rank; ++d) {
      box[d] = static_cast<cuuint32_t>(*next++);
    }
    const auto encode =
        driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    return encode != nullptr && encode(map,
                                       type,
                                       static_cast<cuuint32_t>(rank),
                                       address,
                                       dims,
                                       strides,
                                       box,
                                       steps,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE,
                                       swizzle,
                                       CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  }
  for (int s = 0; s < rank - 2; ++s) {
    lower[s] = *next++;
  }
  for (int s = 0; s < rank - 2; ++s) {
    upper[s] = *next++;
  }
  const auto channels = static_cast<cuuint32_t>(next[0]);
  const auto pixels = static_cast<cuuint32_t>(next[1]);
  const auto encode =
      driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  return encode != nullptr && encode(map,
                                     type,
                                     static_cast<cuuint32_t>(rank),
                                     address,
                                     dims,
                                     strides,
                                     lower,
                                     upper,
                                     channels,
                                     pixels,
                                     steps,
                                     CU_TENSOR_MAP_INTERLEAVE_NONE,
                                     swizzle,
                                     CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
