// SPDX-License-Identifier: Apache-2.0
//
// Warp-level matrices: ldmatrix, stmatrix, mma.sync.
#include "entry.h"

namespace {

using dilseg::cuda::dynamic_shared;
using dilseg::cuda::launch;

// rows: for each lane the byte offset of its row.
template <int kCount, bool kTrans>
__global__ void ldmatrix_kernel(const uint32_t* image, int words, const int* rows, uint32_t* out) {
  uint32_t* shared = dynamic_shared<uint32_t>();
  const unsigned t = threadIdx.x;
  for (int i = static_cast<int>(t); i < words; i += 32) {
    shared[i] = image[i];
  }
  __syncwarp();
  uint32_t r[kCount];
  ptx::ldmatrix<kCount, kTrans>(r, ptx::shared_address(shared) + static_cast<uint32_t>(rows[t]));
  for (int i = 0; i < kCount; ++i) {
    out[kCount * t + i] = r[i];
  }
}

template <int kCount, bool kTrans>
__global__ void stmatrix_kernel(const uint32_t* in, int words, const int* rows, uint32_t* image) {
  uint32_t* shared = dynamic_shared<uint32_t>();
  const unsigned t = threadIdx.x;
  for (int i = static_cast<int>(t); i < words; i += 32) {
    shared[i] = image[i];
  }
  __syncwarp();
  uint32_t r[kCount];
  for (int i = 0; i < kCount; ++i) {
    r[i] = in[kCount * t + i];
  }
  ptx::stmatrix<kCount, kTrans>(ptx::shared_address(shared) + static_cast<uint32_t>(rows[t]), r);
  __syncwarp();
  for (int i = static_cast<int>(t); i < words; i += 32) {
    image[i] = shared[i];
  }
}

template <int kCount>
int move(int store, int trans, uint32_t* image, int words, const int* rows, uint32_t* registers) {
  const size_t bytes = 4 * static_cast<size_t>(words);
  if (store != 0) {
    const auto kernel =
        trans != 0 ? &stmatrix_kernel<kCount, true> : &stmatrix_kernel<kCount, false>;
    return launch(kernel, 1, 32, bytes, nullptr, registers, words, rows, image);
  }
  const auto kernel = trans != 0 ? &ldmatrix_kernel<kCount, true> : &ldmatrix_kernel<kCount, false>;
  return launch(kernel, 1, 32, bytes, nullptr, image, words, rows, registers);
}

// Fragments as [step][lane][register]; d is [lane][4].
template <int kType>
__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, float* d, int steps) {
  const unsigned t = threadIdx.x;
  float sums[4];
  for (int v = 0; v < 4; ++v) {
    sums[v] = d[4 * t + v];
  }
  for (int i = 0; i < steps; ++i) {
    uint32_t x[4];
    uint32_t y[2];
    for (int r = 0; r < 4; ++r) {
      x[r] = a[4 * (32 * i + t) + r];
    }
    for (int r = 0; r < 2; ++r) {
      y[r] = b[2 * (32 * i + t) + r];
    }
    if constexpr (kType == 0) {
      ptx::mma_bf16(sums, x, y);
    } else if constexpr (kType == 1) {
      ptx::mma_f16(sums, x, y);
    } else {
      ptx::mma_tf32(sums, x, y);
    }
  }
  for (int v = 0; v < 4; ++v) {
    d[4 * t + v] = sums[v];
  }
}

}  // namespace

EMU_ENTRY int move_matrices(
    int count, int store, int trans, uint32_t* image, int words, const int* rows, uint32_t* r) {
  switch (count) {
    case 1:
      return move<1>(store, trans, image, words, rows, r);
    case 2:
      return move<2>(store, trans, image, words, rows, r);
    default:
      return move<4>(store, trans, image, words, rows, r);
  }
}

EMU_ENTRY int mma(int type, const uint32_t* a, const uint32_t* b, float* d, int steps) {
  const auto kernel = type == 0 ? &mma_kernel<0> : type == 1 ? &mma_kernel<1> : &mma_kernel<2>;
  return launch(kernel, 1, 32, 0, nullptr, a, b, d, steps);
}
