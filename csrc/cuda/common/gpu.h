// SPDX-License-Identifier: Apache-2.0
//
// What a plan needs to know of a GPU.
#pragma once

namespace dilseg::cuda {

struct Gpu {
  int arch;             // compute capability x 10: 80, 90
  int multiprocessors;  // SMs
  int shared_bytes;     // a block may have, opt-in
  bool wgmma;           // compute capability 9.0 and a binary with code for sm_90a
};

// What a block may have on each compute capability from 8.0 on.
constexpr int shared_bytes_of(int arch) {
  constexpr int kKilobyte = 1024;
  const int kilobytes = arch < 80                           ? 48
                        : arch == 80 || arch == 87          ? 163
                        : arch / 10 == 8 || arch / 10 == 12 ? 99
                                                            : 227;
  return kilobytes * kKilobyte;
}

// The current device; asked once per device.
Gpu current_gpu();

}  // namespace dilseg::cuda
