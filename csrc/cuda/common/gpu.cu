// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/gpu.h"

#include <cuda_runtime.h>

#include <array>
#include <mutex>

namespace dilseg::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

Gpu ask(int device) {
  return {10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
              attribute(cudaDevAttrComputeCapabilityMinor, device),
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
}

}  // namespace

Gpu current_gpu() {
  constexpr int kKnown = 64;
  static std::array<std::once_flag, kKnown> asked;
  static std::array<Gpu, kKnown> known;
  int device = 0;
  cudaGetDevice(&device);
  if (device < 0 || device >= kKnown) {
    return ask(device);
  }
  std::call_once(asked[device], [&] { known[device] = ask(device); });
  return known[device];
}

}  // namespace dilseg::cuda
