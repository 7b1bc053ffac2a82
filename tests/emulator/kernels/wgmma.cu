// SPDX-License-Identifier: Apache-2.0
//
// wgmma on operands whose bytes the test has laid out.
#include "entry.h"

namespace {

using dilseg::cuda::dynamic_shared;
using dilseg::cuda::launch;

enum Type { kBf16, kF16, kTf32 };

// An operand in shared memory; starts[i] is the offset of step i.
struct Operand {
  const int* starts;
  int leading, stride, layout;

  __device__ uint64_t at(uint32_t base, int step) const {
    return ptx::wgmma_descriptor(base + static_cast<uint32_t>(starts[step]),
                                 static_cast<uint32_t>(leading),
                                 static_cast<uint32_t>(stride),
                                 layout);
  }
};

struct Job {
  const uint4* image;
  int bytes;
  const uint32_t* registers;  // of A, [step][thread][4]
  Operand a, b;
  int steps;
  bool scale_d;  // of the first step
  float* d;      // [thread][N / 2]
};

template <Type kType, int kN, int kTransA, int kTransB, bool kRegisters>
__global__ void __launch_bounds__(128) wgmma_kernel(Job job) {
  uint4* shared = dynamic_shared<uint4>();
  const uint32_t base = ptx::shared_address(shared);
  const unsigned t = threadIdx.x;
  for (int i = static_cast<int>(t); i < job.bytes / 16; i += 128) {
    shared[i] = job.image[i];
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float d[kN / 2];
#pragma unroll
  for (int v = 0; v < kN / 2; ++v) {
    d[v] = job.d[t * (kN / 2) + v];
  }
  if constexpr (kRegisters) {
    for (int i = 0; i < job.steps; ++i) {
      uint32_t a[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        a[r] = job.registers[4 * (128 * i + t) + r];
      }
      const uint64_t b = job.b.at(base, i);
      ptx::wgmma_fence();
      if constexpr (kType == kBf16) {
        ptx::wgmma_bf16<kN, kTransB>(d, a, b, job.scale_d || i != 0);
      } else if constexpr (kType == kF16) {
        ptx::wgmma_f16<kN, kTransB>(d, a, b, job.scale_d || i != 0);
      } else {
        ptx::wgmma_tf32<kN>(d, a, b, job.scale_d || i != 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
    }
  } else {
    ptx::wgmma_fence();
    for (int i = 0; i < job.steps; ++i) {
      const uint64_t a = job.a.at(base, i);
      const uint64_t b = job.b.at(base, i);
      if constexpr (kType == kBf16) {
        ptx::wgmma_bf16<kN, kTransA, kTransB>(d, a, b, job.scale_d || i != 0);
      } else if constexpr (kType == kF16) {
        ptx::wgmma_f16<kN, kTransA, kTransB>(d, a, b, job.scale_d || i != 0);
      } else {
        ptx::wgmma_tf32<kN>(d, a, b, job.scale_d || i != 0);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
#pragma unroll
  for (int v = 0; v < kN / 2; ++v) {
    job.d[t * (kN / 2) + v] = d[v];
  }
}

using Kernel = void (*)(Job);
struct Entry {
  int type, n, trans_a, trans_b, registers;
  Kernel kernel;
};
template <Type kType, int kN, int kTransA, int kTransB, bool kRegisters>
constexpr Entry entry() {
  return {kType,
          kN,
          kTransA,
          kTransB,
          kRegisters,
          &wgmma_kernel<kType, kN, kTransA, kTransB, kRegisters>};
}
const Entry kEntries[] = {
    entry<kBf16, 8, 0, 0, false>(),   entry<kBf16, 24, 0, 0, false>(),
    entry<kBf16, 64, 0, 0, false>(),  entry<kBf16, 128, 0, 0, false>(),
    entry<kBf16, 256, 0, 0, false>(), entry<kBf16, 24, 0, 1, false>(),
    entry<kBf16, 64, 1, 0, false>(),  entry<kBf16, 64, 0, 1, false>(),
    entry<kBf16, 64, 1, 1, false>(),  entry<kBf16, 256, 1, 1, false>(),
    entry<kF16, 8, 0, 0, false>(),    entry<kF16, 128, 0, 0, false>(),
    entry<kF16, 64, 1, 1, false>(),   entry<kTf32, 8, 0, 0, false>(),
    entry<kTf32, 24, 0, 0, false>(),  entry<kTf32, 64, 0, 0, false>(),
    entry<kTf32, 256, 0, 0, false>(), entry<kBf16, 64, 0, 0, true>(),
    entry<kBf16, 64, 0, 1, true>(),   entry<kF16, 24, 0, 0, true>(),
    entry<kF16, 64, 0, 1, true>(),    entry<kTf32, 64, 0, 0, true>(),
};

}  // namespace

// a and b: leading bytes, stride bytes, layout. starts: of A for each step, then of B.
EMU_ENTRY int wgmma(int type,
                    int n,
                    int trans_a,
                    int trans_b,
                    const uint4* image,
                    int bytes,
                    const uint32_t* registers,
                    const int* a,
                    const int* b,
                    const int* starts,
                    int steps,
                    int scale_d,
                    float* d,
                    int from_registers) {
  for (const Entry& e : kEntries) {
    if (e.type == type && e.n == n && e.trans_a == trans_a && e.trans_b == trans_b &&
        e.registers == from_registers) {
      const Job job = {image,
                       bytes,
                       registers,
                       {starts, a[0], a[1], a[2]},
                       {starts + steps, b[0], b[1], b[2]},
                       steps,
                       scale_d != 0,
                       d};
      const cudaError_t status =
          cudaFuncSetAttribute(e.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      return status != cudaSuccess
                 ? status
                 : launch(e.kernel, 1, 128, static_cast<size_t>(bytes), nullptr, job);
    }
  }
  return cudaErrorInvalidDeviceFunction;
}
