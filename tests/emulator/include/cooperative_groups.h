// SPDX-License-Identifier: Apache-2.0
//
// Stand-in for the toolkit's header of this name: the block, the cluster and the grid as groups.
#pragma once

#include "cuda_runtime.h"
#include "emu/instructions.h"

namespace cooperative_groups {

class thread_block {
 public:
  static void sync() { ::emu::sync_threads(); }
  static unsigned thread_rank() { return ::emu::current->linear; }
  static unsigned size() { return blockDim.x * blockDim.y * blockDim.z; }
  static unsigned num_threads() { return size(); }
};
inline thread_block this_thread_block() { return {}; }

class cluster_group {
 public:
  static void sync() {
    ::emu::cluster_barrier_arrive();
    ::emu::cluster_barrier_wait();
  }
  static unsigned block_rank() { return ::emu::cluster_rank(); }
  static unsigned num_blocks() { return ::emu::cluster_size(); }
};
inline cluster_group this_cluster() { return {}; }

class grid_group {
 public:
  static void sync() { ::emu::grid_sync(); }
  static bool is_valid() { return ::emu::current->cta->group->launch->cooperative; }
  static unsigned long long num_blocks() { return 1ull * gridDim.x * gridDim.y * gridDim.z; }
  static unsigned long long block_rank() {
    return blockIdx.x + 1ull * gridDim.x * (blockIdx.y + 1ull * gridDim.y * blockIdx.z);
  }
  static unsigned long long size() { return num_blocks() * thread_block::size(); }
  static unsigned long long thread_rank() {
    return block_rank() * thread_block::size() + thread_block::thread_rank();
  }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
