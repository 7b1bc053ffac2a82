// SPDX-License-Identifier: Apache-2.0
//
// Pieces shared by the kernels for wgmma: a block of three warpgroups, of which one thread copies
// and two warpgroups multiply, and the ring of stages between them.
//
//   full[s]   the copies of stage s have landed          copier -> multipliers
//   empty[s]  stage s has been read, by every block       multipliers -> copiers of the cluster
//             that a copy to it serves
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/tensor_map.h"
#include "cuda/dilated_conv2d/wgmma.h"

#include <type_traits>

// Nothing but sm_90a assembles wgmma; the plan sends nothing else here.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DILSEG_HAS_WGMMA
#endif

namespace dilseg::cuda {

constexpr int kM = kWgmmaTileM;
constexpr int kStepK = kWgmmaStepK;
constexpr int kGroupThreads = 128;
constexpr int kMultipliers = 2 * kGroupThreads;
constexpr int kThreads = kGroupThreads + kMultipliers;
constexpr int kMultiplierWarps = kMultipliers / 32;
constexpr int kRowBytes = 128;  // of operands in shared memory: the width of the swizzle
constexpr int kEightRows = 8 * kRowBytes;
constexpr int kABytes = kM * 2 * kStepK;

// A stage holds each part of operand A, then each of B. As many as fit beside what else a kernel
// keeps.
template <int kN, int kPlanes = 1>
struct Stages {
  static constexpr int kBBytes = kN * 2 * kStepK;
  static constexpr int kBytes = kPlanes * (kABytes + kBBytes);
  static constexpr int kCount = (192 << 10) / kBytes;
};

// Where the ring of stages stands; runs on from tile to tile.
template <int kCount>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kCount) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Runs a block: `copy` on one thread, `multiply` on the two warpgroups from thread kGroupThreads
// on. What other threads wrote to the stages before is visible to both.
template <int kN, int kPlanes = 1, class Shared, class Copy, class Multiply>
__device__ __forceinline__ void run_roles(Shared& shared,
                                          int cluster,
                                          Copy&& copy,
                                          Multiply&& multiply) {
  constexpr int kCopierRegisters = 56;
  constexpr int kMultiplierRegisters = 224;
  if (threadIdx.x == 0) {
    for (int s = 0; s < Stages<kN, kPlanes>::kCount; ++s) {
      ptx::mbarrier_init(ptx::shared_address(&shared.full[s]), 1);
      ptx::mbarrier_init(ptx::shared_address(&shared.empty[s]),
                         static_cast<uint32_t>(kMultiplierWarps * cluster));
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();  // barriers and stages are ready
  if (cluster > 1) {
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
  if (threadIdx.x < kGroupThreads) {
    ptx::setmaxnreg_dec<kCopierRegisters>();
    if (threadIdx.x == 0) {
      copy();
    }
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<kMultiplierRegisters>();
    multiply();
  }
  if (cluster > 1) {
    // No block may leave while the other writes to its stages or arrives at its barriers.
    ptx::cluster_arrive();
    ptx::cluster_wait();
  }
}

// Calls multiply(address) for the next `steps` stages as they are full, one group of products in
// flight, and gives each back when its products are done. All products are done at the end.
template <int kN, int kPlanes = 1, class Shared, class Multiply>
__device__ __forceinline__ void multiply_stages(Shared& shared,
                                                Ring<Stages<kN, kPlanes>::kCount>& ring,
                                                int steps,
                                                int cluster,
                                                Multiply&& multiply) {
  const uint32_t full = ptx::shared_address(shared.full);
  const uint32_t empty = ptx::shared_address(shared.empty);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // Lanes 0 .. cluster - 1 tell the blocks of the cluster that their warp has read a stage.
  const auto release = [&](int stage) {
    if (lane < cluster) {
      const uint32_t bar = empty + 8 * stage;
      if (cluster == 1) {
        ptx::mbarrier_arrive(bar);
      } else {
        ptx::mbarrier_arrive_cluster(ptx::map_shared(bar, static_cast<uint32_t>(lane)));
      }
    }
  };
  int before = -1;  // the stage that is read by products in flight
  for (int step = 0; step < steps; ++step) {
    ptx::mbarrier_wait(full + 8 * ring.stage, ring.parity);
    ptx::wgmma_fence();
    multiply(ptx::shared_address(shared.stages[ring.stage]));
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (before >= 0) {
      release(before);
    }
    before = ring.stage;
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  if (before >= 0) {
    release(before);
  }
}

template <class T, int kN, int kTransA, int kTransB>
__device__ __forceinline__ void wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    ptx::wgmma_f16<kN, kTransA, kTransB>(d, a, b, true);
  } else {
    ptx::wgmma_bf16<kN, kTransA, kTransB>(d, a, b, true);
  }
}

__device__ __forceinline__ uint32_t pack2(__half, float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
__device__ __forceinline__ uint32_t pack2(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Strides of a packed tensor as a map wants them: an axis of size 1 has that of the next one
// outwards, so that all stay multiples of the ones inside.
inline TensorMapShape map_shape(const Strides4& s, const Sizes4& size) {
  const int64_t pitch = (size.c + 7) / 8 * 8;
  const int64_t n = size.n > 1 ? s.n : 0;
  const int64_t h = size.h > 1 ? s.h : n;
  const int64_t w = size.w > 1 ? s.w : h > 0 ? h : pitch;
  const int64_t rows = h > 0 ? h : w * size.w;
  return {{size.c, size.w, size.h, size.n}, {w, rows, n > 0 ? n : rows * size.h}};
}

}  // namespace dilseg::cuda
