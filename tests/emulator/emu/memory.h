// SPDX-License-Identifier: Apache-2.0
//
// Global memory: allocations between guard zones filled with nan. What a kernel reads there shows
// in its results; what it writes there is found after the launch, and at once in checked runs.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace emu {

constexpr size_t kGuardBytes = 1024;  // before and behind
constexpr size_t kAllocationAlignment = 512;

struct Allocation {
  std::byte* begin;
  size_t bytes;
  // The last launches that wrote and read it: a dependent launch may run beside its predecessor.
  std::atomic<uint64_t> writer{0};
  std::atomic<uint64_t> reader{0};

  bool guards(const std::byte* p) const {
    return p >= begin - kGuardBytes && p < begin + bytes + kGuardBytes;
  }
};

void* allocate(size_t bytes);
void release_memory(void* p);  // null is fine
bool owns(const void* p);      // whether allocate() returned it

// Bytes of allocations that kernels have moved, in checked runs: what the instructions ask for,
// each access anew, without caches. Atomics and copies that add count as writes.
struct Traffic {
  uint64_t read = 0;
  uint64_t written = 0;
};
Traffic traffic();  // since reset_traffic(), all finished launches
void reset_traffic();
void add_traffic(const Traffic& t);  // by every thread of the operating system, at its end

// Live allocations by address. Immutable: a launch works on the list of its start.
using Allocations = std::vector<std::shared_ptr<Allocation>>;
std::shared_ptr<const Allocations> allocations();
// The allocation whose bytes or guard zones hold `p`, or null.
Allocation* find(const Allocations& list, const void* p);

// "" or which allocation's guard zone was overwritten, and how far away.
std::string check_guards(const Allocations& list);
// "byte 40 behind an allocation of 4096 bytes"
std::string describe(const Allocation& allocation, const void* p);

}  // namespace emu
