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

// The build says whether it compiles for sm_90a; a host compiler compiles for the emulator.
#if defined(DILSEG_WITH_SM90A) || !defined(__CUDACC__)
constexpr bool kWithSm90a = true;
#else
constexpr bool kWithSm90a = false;
#endif

Gpu ask(int device) {
  const int arch = 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
                   attribute(cudaDevAttrComputeCapabilityMinor, device);
  return {arch,
          attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          kWithSm90a && arch == 90};
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
