// SPDX-License-Identifier: Apache-2.0
//
// The bias gradient from a packed grad_output (pack.h): how it is cut, without CUDA, and its
// launcher.
#pragma once

#include "cuda/dilated_conv2d/pack.h"
#include "dilseg/types.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace dilseg::cuda {

constexpr int kPackedBiasThreads = 256;

// A block owns the chunks of `lanes` neighbouring threads and a part of the pixels, of which each
// of its 256 / lanes slices takes every so many-th.
struct PackedBiasPlan {
  int lanes;               // a power of two, at most a warp
  int64_t channel_tiles;   // of `lanes` chunks
  int64_t parts;           // of the pixels
  size_t workspace_bytes;  // a float for every part and channel
};

// For a problem that is not empty. Threads add at most 64 pixels in a chain, and as few as 4 while
// blocks are too few to fill a GPU.
inline PackedBiasPlan plan_packed_bias(const Sizes4& s, Dtype dtype) {
  constexpr int64_t kLongest = 64;
  constexpr int64_t kShortest = 4;
  constexpr int64_t kManyBlocks = 528;
  const auto cut = [](int64_t work, int64_t by) { return (work + by - 1) / by; };
  const int64_t chunks = packed_pitch(s.c, dtype) * size_of(dtype) / 16;
  PackedBiasPlan plan{};
  plan.lanes = 1;
  while (plan.lanes < 32 && plan.lanes < chunks) {
    plan.lanes *= 2;
  }
  plan.channel_tiles = cut(chunks, plan.lanes);
  const int64_t slices = kPackedBiasThreads / plan.lanes;
  const int64_t pixels = s.n * s.h * s.w;
  plan.parts =
      std::max(cut(pixels, slices * kLongest),
               std::min(cut(pixels, slices * kShortest), cut(kManyBlocks, plan.channel_tiles)));
  plan.workspace_bytes = sizeof(float) * static_cast<size_t>(plan.parts * s.c);
  return plan;
}

// grad_bias: c values of `dtype`. partials: what the plan says.
Status launch_packed_bias(const void* grad_output,
                          const Strides4& strides,
                          const Sizes4& sizes,
                          Dtype dtype,
                          float* partials,
                          void* grad_bias,
                          Stream stream);

}  // namespace dilseg::cuda
