// SPDX-License-Identifier: Apache-2.0
//
// Small kernels, each right with kNone and wrong in one way with a fault that it knows: blocks,
// warps, clusters and launches. tests/emulator/test_faults.py reads the names of the faults here.
#include "entry.h"

namespace {

using dilseg::cuda::dynamic_shared;

enum Fault {
  kNone,
  // sum
  kMissingBarrier,
  kMissingLaterBarrier,
  kUnbalancedBarrier,
  kReadPastBuffer,
  kWritePastBuffer,
  kUninitialised,
  // vectors
  kMisalignedGlobal,
  kMisalignedShared,
  // gather
  kOffsetOverflow,
  // blur
  kTileReadOffByOne,
  kTileWriteOffByOne,
  kMissingHalo,
  // warp_sum
  kShuffleFromInactive,
  kShuffleOutsideMask,
  // handoff
  kBarrierCounts,
  kBarrierTooMany,
  kFlagNeverSet,
  // ring
  kClusterExit,
  kClusterReadBeforeBarrier,
  kClusterWaitOnly,
  kClusterRank,
  // scale_twice
  kMissingDependencyWait,
};

// Each block adds up its share of n values.
__global__ void sum_kernel(const int* in, int* out, int n, Fault fault) {
  int* partial = dynamic_shared<int>();
  const int t = threadIdx.x;
  const int end = fault == kReadPastBuffer ? n + 1 : n;
  int total = 0;
  for (int i = static_cast<int>(dilseg::cuda::grid_thread()); i < end;
       i += static_cast<int>(dilseg::cuda::grid_threads())) {
    total += in[i];
  }
  if (fault == kUnbalancedBarrier && t >= 251) {
    return;
  }
  if (fault != kUninitialised || t != 200) {
    partial[t] = total;
  }
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (fault != kMissingBarrier && (fault != kMissingLaterBarrier || half >= 64)) {
      __syncthreads();
    }
    if (t < half) {
      partial[t] += partial[t + half];
    }
  }
  if (t == 0) {
    out[blockIdx.x + (fault == kWritePastBuffer ? gridDim.x : 0)] = partial[0];
  }
}

// Reverses groups of four values, through shared memory.
__global__ void vectors_kernel(const int* in, int* out, Fault fault) {
  int* tile = dynamic_shared<int>();
  const int t = threadIdx.x;
  const int* from = in + (fault == kMisalignedGlobal ? 1 : 0);
  int* to = tile + (fault == kMisalignedShared ? 2 : 0);
  reinterpret_cast<int4*>(to)[t] = reinterpret_cast<const int4*>(from)[t];
  __syncthreads();
  reinterpret_cast<int4*>(out)[t] = reinterpret_cast<const int4*>(to)[blockDim.x - 1 - t];
}

// Copies rows of a slice of a tensor; row 0 of the slice is row `first` of the tensor.
__global__ void gather_kernel(const int* slice, int* out, int first, int pitch, Fault fault) {
  const int row = first + static_cast<int>(blockIdx.x);
  const int64_t wide = static_cast<int64_t>(row) * pitch;
  const int64_t start = static_cast<int64_t>(first) * pitch;
  const int64_t at = fault == kOffsetOverflow ? static_cast<int>(wide) : wide;
  out[blockIdx.x * blockDim.x + threadIdx.x] = slice[at - start + threadIdx.x];
}

// Sums of three neighbours; in has one value more on either side than out.
__global__ void blur_kernel(const int* in, int* out, Fault fault) {
  int* tile = dynamic_shared<int>();
  const int t = threadIdx.x;
  const int threads = blockDim.x;
  const int first = static_cast<int>(blockIdx.x) * threads;
  tile[t] = in[first + t];
  if (t < 2 && fault != kMissingHalo) {
    const int halo = threads + t + (fault == kTileWriteOffByOne ? 1 : 0);
    tile[halo] = in[first + threads + t];
  }
  __syncthreads();
  const int shift = fault == kTileReadOffByOne ? 1 : 0;
  out[first + t] = tile[t + shift] + tile[t + shift + 1] + tile[t + shift + 2];
}

__global__ void warp_sum_kernel(const int* in, int* out, Fault fault) {
  const int t = threadIdx.x;
  int total = in[t];
  unsigned mask = 0xffffffffu;
  if (fault == kShuffleFromInactive) {
    mask = 0xffffu;
    if (t >= 16) {
      return;
    }
  }
  if (fault == kShuffleOutsideMask) {
    mask = 0xfffeffffu;
  }
  for (int step = 16; step > 0; step /= 2) {
    total += __shfl_xor_sync(mask, total, step);
  }
  if (t == 0) {
    *out = total;
  }
}

__global__ void count_kernel(const int* labels, int* out, int n, int classes) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const int label = labels[i];
    if (label < 0 || label >= classes) {
      printf("label %d of pixel %d is not in 0 .. %d", label, i, classes - 1);
      __trap();
    }
    atomicAdd(&out[label], 1);
  }
}

// Warp 0 hands a value to warp 1 through a named barrier, and warp 1 one to warp 0 through a flag.
__global__ void handoff_kernel(int* flag, int* out, Fault fault) {
  int* value = dynamic_shared<int>();
  const int t = threadIdx.x;
  if (t < 32) {
    value[t] = 3 * t;
    ptx::barrier_arrive(1, fault == kBarrierTooMany ? 96 : 64);
    if (t == 0) {
      while (ptx::load_acquire(flag) == 0) {
      }
      out[32] = 1;
    }
  } else {
    ptx::barrier_sync(1, fault == kBarrierCounts || fault == kBarrierTooMany ? 96 : 64);
    out[t - 32] = value[t - 32];
    if (t == 32 && fault != kFlagNeverSet) {
      ptx::store_release(flag, 1);
    }
  }
}

// Every block of a cluster writes into the next one; what the first one gets is not needed.
__global__ void ring_kernel(const int* in, int* out, Fault fault) {
  uint32_t* mailbox = dynamic_shared<uint32_t>();
  const uint32_t t = threadIdx.x;
  const uint32_t rank = ptx::cluster_rank();
  const uint32_t next = (rank + 1) % ptx::cluster_size() + (fault == kClusterRank ? 1 : 0);
  ptx::cluster_arrive();
  ptx::cluster_wait();  // all blocks are there
  ptx::store_shared_cluster(ptx::map_shared(ptx::shared_address(mailbox + t), next),
                            static_cast<uint32_t>(in[blockIdx.x * blockDim.x + t]));
  if (fault == kClusterExit && rank == 0) {
    return;
  }
  if (fault == kClusterReadBeforeBarrier && rank == 1) {
    out[blockIdx.x * blockDim.x + t] = static_cast<int>(mailbox[t]);
  }
  if (fault != kClusterWaitOnly) {
    ptx::cluster_arrive();
  }
  ptx::cluster_wait();
  out[blockIdx.x * blockDim.x + t] = rank == 0 ? -1 : static_cast<int>(mailbox[t]);
}

__global__ void scale_kernel(const int* in, int* out, Fault fault) {
  if (fault != kMissingDependencyWait) {
    ptx::grid_dependency_wait();
  }
  const int64_t i = dilseg::cuda::grid_thread();
  out[i] = 3 * in[i];
}

__global__ void empty_kernel() {}
__global__ void limited_kernel() {}  // never raises its limits

}  // namespace

EMU_ENTRY int sum(const int* in, int* out, int n, int fault) {
  return launch_with({}, &sum_kernel, 4, 256, 256 * sizeof(int), in, out, n, Fault(fault));
}

EMU_ENTRY int vectors(const int* in, int* out, int fault) {
  return launch_with({}, &vectors_kernel, 1, 64, 65 * sizeof(int4), in, out, Fault(fault));
}

EMU_ENTRY int gather(const int* slice, int* out, int first, int pitch, int fault) {
  return launch_with({}, &gather_kernel, 4, 32, 0, slice, out, first, pitch, Fault(fault));
}

EMU_ENTRY int blur(const int* in, int* out, int fault) {
  return launch_with({}, &blur_kernel, 3, 64, 66 * sizeof(int), in, out, Fault(fault));
}

EMU_ENTRY int warp_sum(const int* in, int* out, int fault) {
  return launch_with({}, &warp_sum_kernel, 1, 32, 0, in, out, Fault(fault));
}

EMU_ENTRY int count(const int* labels, int* out, int n, int classes) {
  return launch_with({}, &count_kernel, 1, 64, 0, labels, out, n, classes);
}

EMU_ENTRY int handoff(int* flag, int* out, int fault) {
  return launch_with({}, &handoff_kernel, 1, 64, 32 * sizeof(int), flag, out, Fault(fault));
}

EMU_ENTRY int ring(const int* in, int* out, int fault) {
  return launch_with(
      {.cluster = 4}, &ring_kernel, 8, 32, 32 * sizeof(uint32_t), in, out, Fault(fault));
}

EMU_ENTRY int scale_twice(const int* in, int* middle, int* out, int fault) {
  const cudaError_t status = launch_with({}, &scale_kernel, 2, 32, 0, in, middle, kNone);
  return status != cudaSuccess
             ? status
             : launch_with({.dependent = true}, &scale_kernel, 2, 32, 0, middle, out, Fault(fault));
}

// Launches a kernel that does nothing; opt_in: shared memory and clusters up to the device's limit.
EMU_ENTRY int launch_empty(
    int grid_x, int grid_y, int block, int shared_bytes, int cluster, int cooperative, int opt_in) {
  const LaunchOptions options = {.cluster = static_cast<unsigned>(cluster),
                                 .cooperative = cooperative != 0};
  const dim3 grid(grid_x, grid_y);
  if (opt_in == 0) {
    return launch_with(options, &limited_kernel, grid, block, shared_bytes);
  }
  cudaFuncSetAttribute(&empty_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  const cudaError_t status = cudaFuncSetAttribute(
      &empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  return status != cudaSuccess ? status
                               : launch_with(options, &empty_kernel, grid, block, shared_bytes);
}
