// SPDX-License-Identifier: Apache-2.0
//
// The pipeline of sm_80, right with kNone and wrong in one way with any other fault: cp.async into
// three stages, ldmatrix, mma.sync.
#include "entry.h"

namespace {

using dilseg::cuda::dynamic_shared;

enum Fault {
  kNone,
  kMissingWait,
  kMissingBarrier,
  kMissingFill,
  kReadPastRows,
  kEarlyRelease,
  kSwizzleMismatch,
  kStageOffByOne,
  kCopiesLeftOpen,
};

constexpr int kStages = 3;
constexpr int kRows = 32;
constexpr int kColumns = 8;
constexpr int kDepth = 32;  // of a stage: rows of 64 bytes, four chunks
constexpr uint32_t kRowBytes = kDepth * 2;
constexpr uint32_t kStageBytes = (kRows + kColumns) * kRowBytes;
constexpr int kThreads = 64;

// Where a chunk lies: no two of eight neighbouring rows have it in the same banks.
__device__ uint32_t chunk_at(int row, int chunk) {
  return static_cast<uint32_t>(row) * kRowBytes +
         static_cast<uint32_t>(chunk ^ (row >> 1 & 3)) * 16;
}

// One stage of A [rows][depth] and B [8][depth]; rows that do not exist are filled with zeros.
__device__ void copy_stage(uint32_t stage,
                           const uint16_t* a,
                           const uint16_t* b,
                           int rows,
                           int depth,
                           int step,
                           Fault fault) {
  for (int i = threadIdx.x; i < (kRows + kColumns) * 4; i += kThreads) {
    const int row = i / 4;
    const int chunk = i % 4;
    const int64_t k = step * kDepth + chunk * 8;
    if (row >= kRows) {
      ptx::cp_async_cg(stage + chunk_at(row, chunk),
                       b + static_cast<int64_t>(row - kRows) * depth + k);
      continue;
    }
    if (fault == kReadPastRows) {
      ptx::cp_async_cg(stage + chunk_at(row, chunk), a + static_cast<int64_t>(row) * depth + k);
    } else if (row < rows || fault != kMissingFill) {
      const bool exists = row < rows;
      ptx::cp_async_cg(stage + chunk_at(row, chunk),
                       exists ? a + static_cast<int64_t>(row) * depth + k : a,
                       exists ? 16 : 0);
    }
  }
}

// out [rows][8] = A [rows][depth] times B [8][depth] transposed, in bfloat16.
__global__ void __launch_bounds__(kThreads) gemm_kernel(
    const uint16_t* a, const uint16_t* b, float* out, int rows, int depth, Fault fault) {
  const uint32_t base = ptx::shared_address(dynamic_shared<unsigned char>());
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int steps = depth / kDepth;
  const auto stage_of = [&](int step) {
    return base + static_cast<uint32_t>(step % kStages) * kStageBytes;
  };
  const auto copy = [&](int step) {
    if (step < steps) {
      const int slot = fault == kStageOffByOne && step == 2 ? 3 : step % kStages;
      copy_stage(base + static_cast<uint32_t>(slot) * kStageBytes, a, b, rows, depth, step, fault);
    }
    ptx::cp_async_commit();  // also when empty: the count of groups is what the wait goes by
  };

  copy(0);
  copy(1);
  float d[4] = {};
  for (int step = 0; step < steps; ++step) {
    if (fault == kEarlyRelease) {
      copy(step + 2);  // other warps may still read the stage it goes to
      ptx::cp_async_wait<2>();
    } else if (fault == kMissingWait) {
      ptx::cp_async_wait<2>();
    } else {
      ptx::cp_async_wait<1>();
    }
    if (fault != kMissingBarrier) {
      __syncthreads();
    }
    if (fault != kEarlyRelease) {
      copy(step + 2);
    }
    const uint32_t stage = stage_of(step);
    for (int k = 0; k < kDepth / 16; ++k) {
      const int row = 16 * warp + lane % 16;
      const int chunk = 2 * k + lane / 16;
      uint32_t a_fragment[4], b_fragment[2];
      ptx::ldmatrix(a_fragment,
                    fault == kSwizzleMismatch ? stage + static_cast<uint32_t>(row) * kRowBytes +
                                                    static_cast<uint32_t>(chunk ^ (row & 3)) * 16
                                              : stage + chunk_at(row, chunk));
      ptx::ldmatrix(b_fragment, stage + chunk_at(kRows + lane % 8, 2 * k + (lane / 8 & 1)));
      ptx::mma_bf16(d, a_fragment, b_fragment);
    }
  }
  if (fault != kCopiesLeftOpen) {
    ptx::cp_async_wait_all();
  } else {
    copy(0);
  }
  for (int v = 0; v < 4; ++v) {
    const int row = 16 * warp + lane / 4 + 8 * (v >> 1);
    if (row < rows) {
      out[row * kColumns + 2 * (lane % 4) + (v & 1)] = d[v];
    }
  }
}

}  // namespace

EMU_ENTRY int gemm(
    const uint16_t* a, const uint16_t* b, float* out, int rows, int depth, int fault) {
  return launch_with(
      {}, &gemm_kernel, 1, kThreads, kStages * kStageBytes, a, b, out, rows, depth, Fault(fault));
}
