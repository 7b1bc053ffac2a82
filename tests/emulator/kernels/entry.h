// SPDX-License-Identifier: Apache-2.0
//
// What every file of test kernels needs: the device toolbox and exported entry points.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"

#define EMU_ENTRY extern "C" __attribute__((visibility("default")))

namespace ptx = dilseg::cuda::ptx;

// What a launch may ask for beside its size.
struct LaunchOptions {
  unsigned cluster = 1;  // blocks along x
  bool cooperative = false;
  bool dependent = false;  // may start before its predecessor in the stream has finished
};

template <class... Params, class... Args>
cudaError_t launch_with(const LaunchOptions& options,
                        void (*kernel)(Params...),
                        dim3 grid,
                        dim3 block,
                        size_t shared_bytes,
                        Args&&... args) {
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = attributes;
  if (options.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {options.cluster, 1, 1};
  }
  if (options.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (options.dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}
