// SPDX-License-Identifier: Apache-2.0
//
// The sentence of the last failed launch, and the settings that a run is replayed with.
#pragma once

#include <cstdint>
#include <string>

namespace emu {

struct Settings {
  uint64_t seed;             // EMULATOR_SEED
  unsigned threads;          // EMULATOR_THREADS: of the operating system; 1 makes a replay exact
  int arch;                  // EMULATOR_ARCH: 80, 86, 89, 90, 100 or 120
  unsigned multiprocessors;  // EMULATOR_SMS
  bool truncate;             // EMULATOR_TRUNCATE: tensor-core sums truncate
  bool uninitialised;        // EMULATOR_UNINITIALISED: reading unwritten shared memory is a fault
};

Settings& settings();

void set_report(const std::string& text);
const std::string& report();  // of the calling thread

}  // namespace emu
