// SPDX-License-Identifier: Apache-2.0
//
// The one way kernels are launched and reach dynamic shared memory. `<<<>>>` and `extern
// __shared__` stay out of the kernel files so that a host compiler can build those files as they
// are.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace dilseg::cuda {

// Largest gridDim.x; a kernel with more work than this walks it with a grid-stride loop.
constexpr int64_t kMaxGrid = 2147483647;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of gridDim.x for `work` items of which one block takes `per_block` at a time.
constexpr unsigned grid_for(int64_t work, int64_t per_block) {
  return static_cast<unsigned>(std::min(ceil_div(work, per_block), kMaxGrid));
}

// What a block may have of dynamic shared memory without asking for more.
constexpr size_t kGrantedSharedBytes = 48 << 10;

// What the current device gives a block that asks.
inline int most_shared_bytes() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Launches kernel(args...) on `stream` with a one-dimensional grid and block, in clusters of
// `cluster` blocks that divide the grid. A kernel that takes much shared memory is granted all that
// the GPU has, always the same: the grant belongs to the kernel, and other threads may be launching
// it with another size.
template <class... Params, class... Args>
cudaError_t launch_clusters(void (*kernel)(Params...),
                            unsigned grid,
                            unsigned block,
                            unsigned cluster,
                            size_t shared_bytes,
                            cudaStream_t stream,
                            Args&&... args) {
  if (shared_bytes > kGrantedSharedBytes) {
    const cudaError_t status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_bytes());
    if (status != cudaSuccess) {
      return status;
    }
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  if (cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

// The same without clusters.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...),
                   unsigned grid,
                   unsigned block,
                   size_t shared_bytes,
                   cudaStream_t stream,
                   Args&&... args) {
  return launch_clusters(kernel, grid, block, 1, shared_bytes, stream, std::forward<Args>(args)...);
}

// Base of the block's dynamic shared memory, aligned to 1024 bytes, the period of TMA's swizzles.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(1024) unsigned char dilseg_dynamic_shared[];
  return reinterpret_cast<T*>(dilseg_dynamic_shared);
#else  // a host compiler: tests/emulator
  return reinterpret_cast<T*>(::emu::dynamic_shared());
#endif
}

// Position of this thread in the grid and number of threads, for grid-stride loops.
__device__ __forceinline__ int64_t grid_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t grid_threads() {
  return static_cast<int64_t>(gridDim.x) * blockDim.x;
}

}  // namespace dilseg::cuda
