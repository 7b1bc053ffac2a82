// SPDX-License-Identifier: Apache-2.0
//
// Blocks of a cluster and their shared memories.
#include "entry.h"
#include "maps.h"

#include <cooperative_groups.h>

namespace {

using dilseg::cuda::dynamic_shared;

constexpr unsigned kThreads = 64;

__device__ void cluster_barrier() {
  ptx::cluster_arrive();
  ptx::cluster_wait();
}

// Per thread: rank, size, the same from cooperative groups, what it read from the next block, and
// what the block two before wrote here.
__global__ void remote_kernel(const uint32_t* in, uint32_t* out) {
  uint32_t* shared = dynamic_shared<uint32_t>();
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t rank = ptx::cluster_rank();
  const uint32_t size = ptx::cluster_size();
  const unsigned t = threadIdx.x;
  const unsigned i = blockIdx.x * kThreads + t;
  const uint32_t mirror = kThreads - 1 - t;
  shared[t] = in[i];
  cluster_barrier();
  const uint32_t pulled =
      ptx::load_shared_cluster(ptx::map_shared(base + 4 * t, (rank + 1) % size));
  ptx::store_shared_cluster(ptx::map_shared(base + 4 * (kThreads + mirror), (rank + 2) % size),
                            in[i] ^ 0x55555555u);
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  uint32_t* mine = out + 6 * i;
  mine[0] = rank;
  mine[1] = size;
  mine[2] = cluster.block_rank();
  mine[3] = cluster.num_blocks();
  mine[4] = pulled;
  mine[5] = shared[kThreads + t];
}

// Thread t sends a word to thread t of the next block, which waits for all of them.
__global__ void store_async_kernel(const uint32_t* in, uint32_t* out) {
  uint32_t* shared = dynamic_shared<uint32_t>();
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t bar = base + 4 * kThreads;
  const unsigned t = threadIdx.x;
  const unsigned i = blockIdx.x * kThreads + t;
  if (t == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(bar, 4 * kThreads);
  }
  cluster_barrier();
  const uint32_t next = (ptx::cluster_rank() + 1) % ptx::cluster_size();
  ptx::store_async(ptx::map_shared(base + 4 * t, next), in[i], ptx::map_shared(bar, next));
  ptx::mbarrier_wait(bar, 0);
  out[i] = shared[t];
  cluster_barrier();
}

// Every thread arrives at the barriers of all blocks, its own included, in every round; out counts
// the rounds.
__global__ void remote_arrive_kernel(int* out, int rounds) {
  const uint32_t bar = ptx::shared_address(dynamic_shared<uint32_t>());
  const uint32_t size = ptx::cluster_size();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, kThreads * size);
    ptx::fence_mbarrier_init();
  }
  cluster_barrier();
  for (int i = 0; i < rounds; ++i) {
    for (uint32_t rank = 0; rank < size; ++rank) {
      ptx::mbarrier_arrive_cluster(ptx::map_shared(bar, rank));
    }
    ptx::mbarrier_wait(bar, static_cast<uint32_t>(i % 2));
    ++out[blockIdx.x * kThreads + threadIdx.x];
  }
  cluster_barrier();
}

// A block's 16 words per thread go to the block before it.
__global__ void bulk_copy_kernel(const uint32_t* in, uint32_t* out) {
  constexpr uint32_t kBytes = 64 * kThreads;
  uint32_t* shared = dynamic_shared<uint32_t>();
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t bar = base + 2 * kBytes;
  const uint32_t size = ptx::cluster_size();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(bar, kBytes);
  }
  for (unsigned i = threadIdx.x; i < kBytes / 4; i += kThreads) {
    shared[i] = in[blockIdx.x * (kBytes / 4) + i];
  }
  ptx::fence_proxy_async();
  cluster_barrier();
  if (threadIdx.x == 0) {
    const uint32_t to = (ptx::cluster_rank() + size - 1) % size;
    ptx::bulk_copy_cluster(
        ptx::map_shared(base + kBytes, to), base, kBytes, ptx::map_shared(bar, to));
  }
  ptx::mbarrier_wait(bar, 0);
  for (unsigned i = threadIdx.x; i < kBytes / 4; i += kThreads) {
    out[blockIdx.x * (kBytes / 4) + i] = shared[kBytes / 4 + i];
  }
  cluster_barrier();
}

enum { kBulk, kTiled, kIm2col };

// The first block of each cluster loads for the blocks of the mask. Cluster c starts c further in
// dimension 1 (of rank 2, of rank 3 with im2col), or `bytes` further in a bulk copy.
template <int kMode>
__global__ void multicast_kernel(const __grid_constant__ CUtensorMap map,
                                 const unsigned char* in,
                                 Position p,
                                 int bytes,
                                 int mask,
                                 uint32_t* out) {
  constexpr int kWhere = 1024;
  uint32_t* shared = dynamic_shared<uint32_t>();
  const uint32_t bar = ptx::shared_address(shared);
  const uint32_t rank = ptx::cluster_rank();
  const int cluster = static_cast<int>(blockIdx.x / ptx::cluster_size());
  const bool receives = (mask >> rank & 1) != 0;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
  }
  cluster_barrier();
  if (threadIdx.x == 0 && receives) {
    ptx::mbarrier_arrive_expect_tx(bar, static_cast<uint32_t>(bytes));
  }
  if (threadIdx.x == 0 && rank == 0) {
    const auto blocks = static_cast<uint16_t>(mask);
    if constexpr (kMode == kBulk) {
      ptx::bulk_load_multicast(
          bar + kWhere, in + cluster * bytes, static_cast<uint32_t>(bytes), bar, blocks);
    } else if constexpr (kMode == kTiled) {
      const int at[2] = {p.at[0], p.at[1] + cluster};
      ptx::tma_load_multicast(bar + kWhere, &map, bar, at, blocks);
    } else {
      const int at[3] = {p.at[0], p.at[1] + cluster, p.at[2]};
      const uint16_t offsets[1] = {p.offsets[0]};
      ptx::tma_load_im2col_multicast(bar + kWhere, &map, bar, at, offsets, blocks);
    }
  }
  if (receives) {
    ptx::mbarrier_wait(bar, 0);
    for (int i = static_cast<int>(threadIdx.x); i < bytes / 4; i += static_cast<int>(kThreads)) {
      out[static_cast<int>(blockIdx.x) * (bytes / 4) + i] = shared[kWhere / 4 + i];
    }
  }
  cluster_barrier();
}

template <class... Params, class... Args>
int launch_clusters(
    void (*kernel)(Params...), int blocks, int cluster, size_t shared_bytes, Args... args) {
  return launch_with({.cluster = static_cast<unsigned>(cluster)},
                     kernel,
                     static_cast<unsigned>(blocks),
                     kThreads,
                     shared_bytes,
                     args...);
}

}  // namespace

EMU_ENTRY int remote(int blocks, int cluster, const uint32_t* in, uint32_t* out) {
  return launch_clusters(&remote_kernel, blocks, cluster, 8 * kThreads, in, out);
}

EMU_ENTRY int store_async(int blocks, int cluster, const uint32_t* in, uint32_t* out) {
  return launch_clusters(&store_async_kernel, blocks, cluster, 4 * kThreads + 8, in, out);
}

EMU_ENTRY int remote_arrive(int blocks, int cluster, int* out, int rounds) {
  return launch_clusters(&remote_arrive_kernel, blocks, cluster, 8, out, rounds);
}

EMU_ENTRY int bulk_copy(int blocks, int cluster, const uint32_t* in, uint32_t* out) {
  return launch_clusters(&bulk_copy_kernel, blocks, cluster, 128 * kThreads + 8, in, out);
}

EMU_ENTRY int multicast(int mode,
                        int blocks,
                        int cluster,
                        unsigned char* tensor,
                        const int* spec,
                        const int* at,
                        int bytes,
                        int mask,
                        uint32_t* out) {
  CUtensorMap map = {};
  Position p = {};
  if (mode != kBulk) {
    if (!make_map(&map, tensor, spec, mode == kIm2col)) {
      return cudaErrorInvalidValue;
    }
    p = read_position(at, spec[1], mode == kIm2col);
  }
  const auto kernel = mode == kBulk    ? &multicast_kernel<kBulk>
                      : mode == kTiled ? &multicast_kernel<kTiled>
                                       : &multicast_kernel<kIm2col>;
  return launch_clusters(
      kernel, blocks, cluster, 1024 + static_cast<size_t>(bytes), map, tensor, p, bytes, mask, out);
}
