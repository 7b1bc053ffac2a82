// SPDX-License-Identifier: Apache-2.0
//
// Starting a kernel: the checks of the driver, then all groups of blocks on the cores of this
// machine.
#pragma once

#include "emu/core.h"

#include <cstddef>
#include <functional>

namespace emu {

struct LaunchRequest {
  Index3 grid, block, cluster{1, 1, 1};
  size_t shared_bytes = 0;
  bool cooperative = false;
  bool dependent = false;
};

// Limits of one architecture, EMULATOR_ARCH.
struct Device {
  int arch;
  unsigned shared_per_block;  // bytes, with the opt-in
  unsigned shared_per_multiprocessor;
  unsigned threads_per_multiprocessor;
  bool clusters;
};
const Device& device();

// Returns a cudaError_t. After a failure report() says what was wrong.
int launch(const LaunchRequest& request,
           const void* kernel,
           size_t parameter_bytes,
           std::function<void()> body);

void set_max_shared(const void* kernel, size_t bytes);
void allow_large_clusters(const void* kernel);
int resident_blocks(unsigned threads, size_t shared_bytes);  // per multiprocessor
int resident_clusters(const LaunchRequest& request);

}  // namespace emu
