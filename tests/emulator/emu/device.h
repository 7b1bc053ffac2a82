// SPDX-License-Identifier: Apache-2.0
//
// What CUDA's device intrinsics call: the indices of the running thread, warp operations, atomics.
// Everything here is out of line, so that the return address is the kernel's.
#pragma once

#include "emu/core.h"

#include <cstdint>
#include <cstring>

// CUDA's built-in variables, set whenever a thread of a kernel goes on.
extern thread_local emu::Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

void sync_threads();
unsigned sync_threads_votes(bool predicate);  // how many threads of the block said true
void sync_warp(uint32_t mask);

enum class Shuffle { kIndex, kUp, kDown, kXor };
uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width);
uint32_t ballot(uint32_t mask, bool predicate);
uint32_t match_any(uint32_t mask, uint64_t value);
enum class Reduce { kAdd, kMin, kMax, kAnd, kOr, kXor };
int64_t reduce(Reduce kind, uint32_t mask, int64_t value);

enum class Atomic { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompareAndSwap, kLoad, kStore };
// Returns the old value of the `bytes` (4 or 8) at p; acquires and releases.
uint64_t atomic(Atomic kind, void* p, unsigned bytes, bool is_signed, uint64_t v, uint64_t compare);

[[noreturn]] void trap();
int device_printf(const char* pattern, ...) __attribute__((format(__printf__, 1, 2)));
long long clock_cycles();

void nanosleep();  // lets others run, as a poll that failed

std::byte* dynamic_shared();  // of the running thread's block

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= 8);
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emu
