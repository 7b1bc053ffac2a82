// SPDX-License-Identifier: Apache-2.0
//
// Corners in which an earlier emulator was wrong: a fault that was none, or one that went unseen.
#include "entry.h"

namespace {

using dilseg::cuda::dynamic_shared;

// What a thread learns between the two halves of the cluster barrier, it still knows behind them.
__global__ void split_barrier_kernel(float* out) {
  auto* shared = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  ptx::cluster_arrive();
  shared[t] = static_cast<float>(t);
  __syncthreads();  // the writes, before a neighbour's read
  ptx::cluster_wait();
  out[blockIdx.x * blockDim.x + t] = shared[t ^ 1];
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// Thread 0's second write comes behind the barrier that thread 32 still waits for: a race.
__global__ void late_wait_kernel(float* out) {
  auto* shared = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  if (t == 0) {
    shared[0] = 1;
  }
  ptx::cluster_arrive();
  if (t == 32) {
    for (int i = 0; i < 64; ++i) {
      __nanosleep(100);
    }
  }
  ptx::cluster_wait();
  if (t == 0) {
    shared[0] = 2;
  }
  if (t != 32) {
    ptx::cluster_arrive();
  } else {
    out[blockIdx.x] = shared[0];
    ptx::cluster_arrive();
  }
  ptx::cluster_wait();
}

// Block 0 sends a value to its peer's mbarrier; `wait` first makes sure that it is initialised.
__global__ void remote_init_kernel(unsigned* out, bool wait) {
  auto* shared = dynamic_shared<unsigned>();
  const uint32_t value = ptx::shared_address(shared);
  const uint32_t bar = value + 16;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
  }
  ptx::cluster_arrive();
  if (wait) {
    ptx::cluster_wait();
  }
  if (threadIdx.x == 0 && ptx::cluster_rank() == 0) {
    ptx::store_async(ptx::map_shared(value, 1), 7, ptx::map_shared(bar, 1));
  }
  if (!wait) {
    ptx::cluster_wait();
  }
  if (ptx::cluster_rank() == 1) {
    if (threadIdx.x == 0) {
      ptx::mbarrier_arrive_expect_tx(bar, 4);
    }
    ptx::mbarrier_wait(bar, 0);
    out[threadIdx.x] = shared[0];
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// A lock taken by compare-and-swap, and a count polled by adding nothing.
__global__ void poll_kernel(int* lock, int* count, int* sum) {
  while (atomicCAS(lock, 0, 1) != 0) {
  }
  atomicAdd(sum, static_cast<int>(threadIdx.x));
  atomicExch(lock, 0);
  atomicAdd(count, 1);
  while (atomicAdd(count, 0) < static_cast<int>(blockDim.x)) {
  }
}

// Both wait_group and an mbarrier hear of the same copies.
__global__ void two_waits_kernel(const float4* in, float4* out) {
  auto* shared = dynamic_shared<float4>();
  const unsigned t = threadIdx.x;
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t bar = base + blockDim.x * 16;
  if (t == 0) {
    ptx::mbarrier_init(bar, blockDim.x);
  }
  __syncthreads();  // the mbarrier exists for every thread
  ptx::cp_async_cg(base + t * 16, in + t);
  ptx::cp_async_commit();
  ptx::cp_async_mbarrier_arrive(bar);
  ptx::cp_async_wait<0>();
  out[t] = shared[t];  // its own copy
  ptx::mbarrier_wait(bar, 0);
  out[blockDim.x + t] = shared[t ^ 1];  // a neighbour's
}

// Moves a known number of bytes: a vector load, cp.async of part of its size, a scalar load and
// store, and a bulk store; what goes through shared memory and local arrays counts for nothing.
__global__ void traffic_kernel(const float2* values, const int* indices, float* out) {
  auto* shared = dynamic_shared<float2>();
  const unsigned t = threadIdx.x;
  const unsigned thread = blockIdx.x * blockDim.x + t;
  const uint32_t base = ptx::shared_address(shared);
  ptx::cp_async_ca<8>(base + t * 8, values + thread);
  ptx::cp_async_commit();
  ptx::cp_async_wait_all();
  const float2 pair = values[thread];
  volatile float local[3] = {pair.x, pair.y, shared[t].x};
  out[indices[thread]] = local[0] + local[1] + local[2];
  ptx::fence_proxy_async();
  __syncthreads();  // every thread's copy, before it is stored again
  if (t == 0) {
    ptx::bulk_store(out + gridDim.x * blockDim.x + 16 * blockIdx.x, base, 64);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

enum class Edge { kFarShared, kWildCopy, kLaneExits, kInitTwice, kStaleProxy, kEarlyCopy };

__global__ void wrong_kernel(const float* in, float* out, Edge edge) {
  auto* shared = dynamic_shared<float>();
  const unsigned t = threadIdx.x;
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t bar = base + 512;
  if (edge == Edge::kFarShared) {
    shared[t + (1 << 20)] = 1;
    return;
  }
  if (edge == Edge::kLaneExits) {
    if (t == 31) {
      return;
    }
    float d[4] = {};
    const uint32_t a[4] = {};
    const uint32_t b[2] = {};
    ptx::mma_bf16(d, a, b);
    out[t] = d[0];
    return;
  }
  if (edge == Edge::kStaleProxy) {
    shared[t] = 1;  // then overwritten by the copy without a proxy fence
  }
  if (t == 0) {
    ptx::mbarrier_init(bar, 1);
    if (edge == Edge::kInitTwice) {
      ptx::mbarrier_init(bar, 1);
    }
  }
  __syncthreads();  // the mbarrier exists for every thread
  if (t == 0) {
    const float* from = edge == Edge::kWildCopy ? in + (int64_t{1} << 44) : in;
    ptx::mbarrier_arrive_expect_tx(bar, 128);
    ptx::bulk_load(base, from, 128, bar);
  }
  if (edge == Edge::kEarlyCopy) {
    ptx::grid_dependency_wait();
  }
  ptx::mbarrier_wait(bar, 0);
  out[t] = shared[t];
}

__global__ void produce_kernel(float* out) { out[threadIdx.x] = static_cast<float>(threadIdx.x); }

}  // namespace

EMU_ENTRY int split_barrier(float* out) {
  return launch_with({.cluster = 2}, &split_barrier_kernel, 2, 64, 256, out);
}
EMU_ENTRY int late_wait(float* out) {
  return launch_with({.cluster = 2}, &late_wait_kernel, 2, 64, 256, out);
}
EMU_ENTRY int remote_init(unsigned* out, int wait) {
  return launch_with({.cluster = 2}, &remote_init_kernel, 2, 32, 64, out, wait != 0);
}
EMU_ENTRY int poll(int* lock, int* count, int* sum) {
  return launch_with({}, &poll_kernel, 1, 64, 0, lock, count, sum);
}
EMU_ENTRY int two_waits(const float4* in, float4* out) {
  return launch_with({}, &two_waits_kernel, 1, 64, 64 * 16 + 8, in, out);
}
EMU_ENTRY int traffic(const float2* values, const int* indices, float* out, unsigned blocks) {
  return launch_with({}, &traffic_kernel, blocks, 32, 32 * 8, values, indices, out);
}
EMU_ENTRY int wrong(const float* in, float* out, int edge) {
  return launch_with({}, &wrong_kernel, 1, 32, 1024, in, out, static_cast<Edge>(edge));
}
EMU_ENTRY int early_copy(float* between, float* out) {
  const cudaError_t status = launch_with({}, &produce_kernel, 1, 32, 0, between);
  return status != cudaSuccess
             ? status
             : launch_with(
                   {.dependent = true}, &wrong_kernel, 1, 32, 1024, between, out, Edge::kEarlyCopy);
}
