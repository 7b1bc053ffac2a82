// SPDX-License-Identifier: Apache-2.0
//
// Two matrix products of the shape that convolution kernels have, to time the emulator with.
#include "entry.h"

#include <cuda_bf16.h>

namespace {

using dilseg::cuda::dynamic_shared;

// ---- mma.sync: 64 x 64 of D per block of four warps, K in steps of 32 through two stages
// ---------

constexpr int kTile = 64;
constexpr int kStep = 32;
constexpr int kPitch = 80;  // bytes of a row of 32 values; an odd multiple of 16 has no conflicts
constexpr int kOperand = kTile * kPitch;

__device__ void load_operand(uint32_t to, const __nv_bfloat16* from, int k, int at) {
  for (int i = threadIdx.x; i < kTile * kStep / 8; i += 128) {
    const int row = i / 4;
    const int chunk = i % 4;
    ptx::cp_async_cg(to + row * kPitch + chunk * 16, from + row * k + at + chunk * 8);
  }
}

// D[64 blocks, 64] = A[64 blocks, k] B[64, k]^T; each warp owns 32 x 32 of its block's tile.
__global__ void mma_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int k) {
  const uint32_t shared = ptx::shared_address(dynamic_shared<unsigned char>());
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int row0 = warp / 2 * 32;
  const int column0 = warp % 2 * 32;
  const __nv_bfloat16* a_block = a + static_cast<int64_t>(blockIdx.x) * kTile * k;
  const auto load = [&](int step) {
    const uint32_t stage = shared + step % 2 * 2 * kOperand;
    load_operand(stage, a_block, k, step * kStep);
    load_operand(stage + kOperand, b, k, step * kStep);
    ptx::cp_async_commit();
  };
  float sum[2][4][4] = {};
  const int steps = k / kStep;
  load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      load(step + 1);
      ptx::cp_async_wait<1>();
    } else {
      ptx::cp_async_wait<0>();
    }
    __syncthreads();  // the stage is complete for every thread
    const uint32_t stage = shared + step % 2 * 2 * kOperand;
    for (int kk = 0; kk < kStep; kk += 16) {
      uint32_t a_fragment[2][4];
      uint32_t b_fragment[2][4];
      for (int i = 0; i < 2; ++i) {
        ptx::ldmatrix(a_fragment[i],
                      stage + (row0 + 16 * i + lane % 16) * kPitch + kk * 2 + lane / 16 * 16);
        ptx::ldmatrix(b_fragment[i],
                      stage + kOperand + (column0 + 16 * i + lane / 16 * 8 + lane % 8) * kPitch +
                          kk * 2 + lane / 8 % 2 * 16);
      }
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 4; ++j) {
          const uint32_t columns[2] = {b_fragment[j / 2][j % 2 * 2],
                                       b_fragment[j / 2][j % 2 * 2 + 1]};
          ptx::mma_bf16(sum[i][j], a_fragment[i], columns);
        }
      }
    }
    __syncthreads();  // the stage is read before it is loaded again
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 4; ++j) {
      for (int v = 0; v < 4; ++v) {
        const int row = blockIdx.x * kTile + row0 + 16 * i + lane / 4 + v / 2 * 8;
        d[row * kTile + column0 + 8 * j + lane % 4 * 2 + v % 2] = sum[i][j][v];
      }
    }
  }
}

// ---- wgmma: 64 x 128 of D per warpgroup, K in steps of 64 through two mbarrier stages
// ------------

constexpr int kRows = 64;
constexpr int kColumns = 128;
constexpr int kDepth = 64;
constexpr int kBytesA = kRows * kDepth * 2;
constexpr int kBytesB = kColumns * kDepth * 2;

// Operands come as core matrices: [step][k / 8][row][8], so that one bulk copy brings a step's
// tile.
__global__ void wgmma_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int steps) {
  auto* memory = dynamic_shared<unsigned char>();
  const uint32_t shared = ptx::shared_address(memory);
  const uint32_t full = shared + 2 * (kBytesA + kBytesB);
  const __nv_bfloat16* a_block = a + static_cast<int64_t>(blockIdx.x) * steps * kRows * kDepth;
  const auto load = [&](int step) {
    const uint32_t stage = shared + step % 2 * (kBytesA + kBytesB);
    const uint32_t bar = full + step % 2 * 8;
    ptx::mbarrier_arrive_expect_tx(bar, kBytesA + kBytesB);
    ptx::bulk_load(stage, a_block + step * kRows * kDepth, kBytesA, bar);
    ptx::bulk_load(stage + kBytesA, b + step * kColumns * kDepth, kBytesB, bar);
  };
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init(full + 8, 1);
    ptx::fence_mbarrier_init();
    load(0);
  }
  __syncthreads();  // the barriers exist for every thread
  float sum[kColumns / 2];
  for (int step = 0; step < steps; ++step) {
    if (threadIdx.x == 0 && step + 1 < steps) {
      load(step + 1);
    }
    ptx::mbarrier_wait(full + step % 2 * 8, step / 2 % 2);
    const uint32_t stage = shared + step % 2 * (kBytesA + kBytesB);
    ptx::wgmma_fence();
    for (int kk = 0; kk < kDepth / 16; ++kk) {
      const uint64_t at = ptx::wgmma_descriptor(stage + kk * 2 * kRows * 16, kRows * 16, 128, 0);
      const uint64_t bt =
          ptx::wgmma_descriptor(stage + kBytesA + kk * 2 * kColumns * 16, kColumns * 16, 128, 0);
      ptx::wgmma_bf16<kColumns, 0, 0>(sum, at, bt, step + kk != 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    __syncthreads();  // the stage is read before thread 0 loads it again
  }
  const int lane = threadIdx.x % 32;
  for (int v = 0; v < kColumns / 2; ++v) {
    const int row = blockIdx.x * kRows + threadIdx.x / 32 * 16 + lane / 4 + v / 2 % 2 * 8;
    d[row * kColumns + v / 4 * 8 + lane % 4 * 2 + v % 2] = sum[v];
  }
}

}  // namespace

EMU_ENTRY int mma_product(
    const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int blocks, int k) {
  return dilseg::cuda::launch(&mma_kernel, blocks, 128, 4 * kOperand, nullptr, a, b, d, k);
}

EMU_ENTRY int wgmma_product(
    const __nv_bfloat16* a, const __nv_bfloat16* b, float* d, int blocks, int steps) {
  constexpr int kBytes = 2 * (kBytesA + kBytesB) + 16;
  cudaFuncSetAttribute(&wgmma_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  return dilseg::cuda::launch(&wgmma_kernel, blocks, 128, kBytes, nullptr, a, b, d, steps);
}
