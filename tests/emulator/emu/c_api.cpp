// SPDX-License-Identifier: Apache-2.0
//
// The handles that a test program turns, for ctypes.
#include "emu/memory.h"
#include "emu/report.h"

#include <cstdint>

#define EMU_API extern "C" __attribute__((visibility("default")))

EMU_API void emu_set_seed(uint64_t seed) { emu::settings().seed = seed; }
EMU_API void emu_set_threads(unsigned threads) { emu::settings().threads = threads; }
EMU_API void emu_set_arch(int arch) { emu::settings().arch = arch; }
EMU_API void emu_set_truncate(bool on) { emu::settings().truncate = on; }
EMU_API const char* emu_report() { return emu::report().c_str(); }
EMU_API void emu_reset_traffic() { emu::reset_traffic(); }
EMU_API uint64_t emu_bytes_read() { return emu::traffic().read; }
EMU_API uint64_t emu_bytes_written() { return emu::traffic().written; }
EMU_API void* emu_allocate(size_t bytes) { return emu::allocate(bytes); }
EMU_API void emu_release(void* p) { emu::release_memory(p); }
