// SPDX-License-Identifier: Apache-2.0
//
// Launch shape of the cross-entropy kernels: pure functions of the problem, without CUDA.
#pragma once

#include "dilseg/cross_entropy.h"

#include <cstdint>

namespace dilseg::cuda {

// One thread per pixel, so a block's pixels are one partial sum.
constexpr int kCrossEntropyThreads = static_cast<int>(kCrossEntropyPixelsPerPartial);

// Blocks an SM must be able to hold: leaves 85 registers to a thread; with 64 the double gradient
// spills.
constexpr int kCrossEntropyBlocks = 3;

// Tiles of kCrossEntropyThreads pixels; also the number of partial sums.
struct CrossEntropyPlan {
  int64_t pixels;
  int64_t tiles;
};

inline CrossEntropyPlan plan_cross_entropy(const CrossEntropyProblem& p) {
  const int64_t pixels = p.n * p.h * p.w;
  return {pixels, cross_entropy_partials(pixels)};
}

}  // namespace dilseg::cuda
