// SPDX-License-Identifier: Apache-2.0
//
// Rates from which plans model their time: pure functions, without CUDA. Per microsecond and for
// the whole GPU, as large problems reach them with mma.sync (not the peaks of the data sheets), and
// only as good as the choices that follow from them.
#pragma once

#include "cuda/common/gpu.h"
#include "dilseg/dilated_conv2d.h"

namespace dilseg::cuda {

// From one kernel's end to the next one's start, and its ramps.
constexpr double kLaunchMicroseconds = 3;

// Floating-point operations of the tensor cores that a product of values of `dtype` costs.
inline double mma_flops(const Gpu& gpu, Dtype dtype, Float32Precision precision) {
  const double halves = gpu.arch == 80        ? 270e6
                        : gpu.arch / 10 == 9  ? 450e6
                        : gpu.arch / 10 == 10 ? 600e6
                                              : 150e6;
  if (dtype != Dtype::kFloat32) {
    return halves;
  }
  switch (precision) {
    case Float32Precision::kTf32:
      return halves / 2;
    case Float32Precision::kBf16x3:
      return halves / 3;
    case Float32Precision::kIeee:
      break;
  }
  return halves / 6;
}

// Bytes that a copy reads and writes.
inline double copy_bytes(const Gpu& gpu) {
  return gpu.arch == 80 ? 1.6e6 : gpu.arch / 10 == 9 ? 3.0e6 : gpu.arch / 10 == 10 ? 6.0e6 : 0.8e6;
}

// Bytes that the SMs read from the L2 cache.
inline double cache_bytes(const Gpu& gpu) { return 2 * copy_bytes(gpu); }

}  // namespace dilseg::cuda
