// SPDX-License-Identifier: Apache-2.0
//
// What blocks of a whole grid, and grids that follow each other, wait for.
#include "entry.h"

#include <cooperative_groups.h>

namespace {

namespace cg = cooperative_groups;

constexpr LaunchOptions kCooperative = {.cooperative = true};

// Passes when every block has arrived `round` times.
__device__ void flag_barrier(int* arrived, int round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    ptx::add_acq_rel(arrived, 1);
    while (ptx::load_acquire(arrived) < round * static_cast<int>(gridDim.x)) {
    }
  }
  __syncthreads();
}

// Each round adds to a word the word of the next block; two buffers in turn.
__global__ void grid_barrier_kernel(uint32_t* words, int* arrived, int rounds, bool groups) {
  const unsigned n = gridDim.x * blockDim.x;
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  for (int round = 0; round < rounds; ++round) {
    uint32_t* from = words + round % 2 * n;
    uint32_t* to = words + (round + 1) % 2 * n;
    to[i] = from[i] + 3 * from[(i + blockDim.x) % n];
    if (groups) {
      cg::this_grid().sync();
    } else {
      flag_barrier(arrived, round + 1);
    }
  }
}

// One block hands on a flag to the next.
__global__ void release_kernel(int* flags, int* values, int* out) {
  const int b = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0) {
    int sum = b + 1;
    if (b != 0) {
      while (ptx::load_acquire(flags + b - 1) == 0) {
      }
      sum += values[b - 1];
    }
    values[b] = sum;
    ptx::store_release(flags + b, 1);
    out[b] = sum;
  }
}

__global__ void block_group_kernel(const int* in, int* out) {
  int* shared = dilseg::cuda::dynamic_shared<int>();
  const cg::thread_block block = cg::this_thread_block();
  shared[block.thread_rank()] = in[block.thread_rank()];
  block.sync();
  out[block.thread_rank()] = shared[block.size() - 1 - block.thread_rank()];
}

__global__ void first_kernel(const int* in, int* between) {
  ptx::grid_dependency_launch();
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  between[i] = 2 * in[i] + 1;
}

__global__ void second_kernel(const int* between, int* out, bool wait) {
  if (wait) {
    ptx::grid_dependency_wait();
  }
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = between[gridDim.x * blockDim.x - 1 - i];
}

}  // namespace

EMU_ENTRY int grid_barrier(int blocks, uint32_t* words, int* arrived, int rounds, int groups) {
  const auto n = static_cast<unsigned>(blocks);
  return launch_with(
      kCooperative, &grid_barrier_kernel, n, 64, 0, words, arrived, rounds, groups != 0);
}

EMU_ENTRY int release_chain(int blocks, int* flags, int* values, int* out) {
  const auto n = static_cast<unsigned>(blocks);
  return launch_with(kCooperative, &release_kernel, n, 32, 0, flags, values, out);
}

EMU_ENTRY int block_group(const int* in, int* out) {
  return dilseg::cuda::launch(&block_group_kernel, 1, 96, 4 * 96, nullptr, in, out);
}

EMU_ENTRY int dependent(const int* in, int* between, int* out, int wait) {
  const cudaError_t status = dilseg::cuda::launch(&first_kernel, 3, 64, 0, nullptr, in, between);
  if (status != cudaSuccess) {
    return status;
  }
  return launch_with({.dependent = true}, &second_kernel, 3, 64, 0, between, out, wait != 0);
}
