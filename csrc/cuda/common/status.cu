// SPDX-License-Identifier: Apache-2.0
//
// Turns the status of a launch into a sentence that says what to do.
#include "dilseg/types.h"

#include <cuda_runtime.h>

#include <string>

#define DILSEG_STRINGIZE_(...) #__VA_ARGS__
#define DILSEG_STRINGIZE(...) DILSEG_STRINGIZE_(__VA_ARGS__)

namespace dilseg::cuda {
namespace {

// nvcc's own list of the architectures in this binary: "800,900".
#ifdef __CUDA_ARCH_LIST__
constexpr const char* kArchList = DILSEG_STRINGIZE(__CUDA_ARCH_LIST__);
#else
constexpr const char* kArchList = "unknown";
#endif

std::string describe(cudaError_t error) {
  std::string text = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorUnsupportedPtxVersion) {
    return text;
  }
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  const std::string capability = std::to_string(major) + "." + std::to_string(minor);
  return text + ". The GPU has compute capability " + capability +
         ", but this binary was built for (capability x 100) " + kArchList +
         ". Rebuild with: DILSEG_BUILD=cuda DILSEG_CUDA_ARCH_LIST=" + capability + " pip install .";
}

}  // namespace

const char* status_message(Status status) {
  thread_local std::string text;
  text = describe(static_cast<cudaError_t>(status));
  return text.c_str();
}

}  // namespace dilseg::cuda
