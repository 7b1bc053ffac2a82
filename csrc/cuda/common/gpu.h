// SPDX-License-Identifier: Apache-2.0
//
// What a plan needs to know of a GPU.
#pragma once

namespace dilseg::cuda {

struct Gpu {
  int arch;             // compute capability x 10: 80, 90
  int multiprocessors;  // SMs
  int shared_bytes;     // a block may have, opt-in
};

// The current device; asked once per device.
Gpu current_gpu();

}  // namespace dilseg::cuda
