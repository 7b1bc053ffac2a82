// SPDX-License-Identifier: Apache-2.0
#include "emu/memory.h"

#include "emu/core.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

namespace emu {
namespace {

std::mutex lock;
std::shared_ptr<const Allocations> live = std::make_shared<Allocations>();

// Where the bytes begin in the block from the heap: aligned, and behind a guard zone.
constexpr size_t kFront =
    (kGuardBytes + kAllocationAlignment - 1) / kAllocationAlignment * kAllocationAlignment;

std::atomic<uint64_t> bytes_read{0};
std::atomic<uint64_t> bytes_written{0};

bool before(const std::shared_ptr<Allocation>& a, const std::byte* p) { return a->begin < p; }

}  // namespace

void* allocate(size_t bytes) {
  const size_t needed = kFront + bytes + kGuardBytes;
  const size_t rounded =
      (needed + kAllocationAlignment - 1) / kAllocationAlignment * kAllocationAlignment;
  auto* memory = static_cast<std::byte*>(std::aligned_alloc(kAllocationAlignment, rounded));
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  std::byte* begin = memory + kFront;
  std::memset(begin - kGuardBytes, kPoison, kGuardBytes);
  std::memset(begin, kPoison, bytes);
  std::memset(begin + bytes, kPoison, kGuardBytes);
  auto allocation = std::make_shared<Allocation>();
  allocation->begin = begin;
  allocation->bytes = bytes;
  const std::lock_guard<std::mutex> guard(lock);
  auto next = std::make_shared<Allocations>(*live);
  next->insert(std::lower_bound(next->begin(), next->end(), begin, before), allocation);
  live = next;
  return begin;
}

void release_memory(void* p) {
  if (p == nullptr) {
    return;
  }
  auto* begin = static_cast<std::byte*>(p);
  {
    const std::lock_guard<std::mutex> guard(lock);
    auto next = std::make_shared<Allocations>(*live);
    const auto at = std::lower_bound(next->begin(), next->end(), begin, before);
    if (at == next->end() || (*at)->begin != begin) {
      std::abort();  // not from allocate(), or released twice
    }
    next->erase(at);
    live = next;
  }
  std::free(begin - kFront);
}

bool owns(const void* p) {
  const auto list = allocations();
  const auto* begin = static_cast<const std::byte*>(p);
  const auto at = std::lower_bound(list->begin(), list->end(), begin, before);
  return at != list->end() && (*at)->begin == begin;
}

Traffic traffic() { return {bytes_read, bytes_written}; }

void reset_traffic() {
  bytes_read = 0;
  bytes_written = 0;
}

void add_traffic(const Traffic& t) {
  bytes_read += t.read;
  bytes_written += t.written;
}

std::shared_ptr<const Allocations> allocations() {
  const std::lock_guard<std::mutex> guard(lock);
  return live;
}

Allocation* find(const Allocations& list, const void* p) {
  const auto* byte = static_cast<const std::byte*>(p);
  auto at = std::lower_bound(list.begin(), list.end(), byte + 1, before);
  // The one that begins at or before p, else the one whose front guard holds p.
  if (at != list.begin() && (*(at - 1))->guards(byte)) {
    return (at - 1)->get();
  }
  return at != list.end() && (*at)->guards(byte) ? at->get() : nullptr;
}

std::string describe(const Allocation& a, const void* p) {
  const std::ptrdiff_t offset = static_cast<const std::byte*>(p) - a.begin;
  if (offset < 0) {
    return format("%td bytes before an allocation of %zu bytes", -offset, a.bytes);
  }
  const auto behind = offset - static_cast<std::ptrdiff_t>(a.bytes);
  return behind >= 0
             ? format("%td bytes behind the end of an allocation of %zu bytes", behind, a.bytes)
             : format("byte %td of an allocation of %zu bytes", offset, a.bytes);
}

std::string check_guards(const Allocations& list) {
  for (const auto& a : list) {
    for (const std::byte* zone : {a->begin - kGuardBytes, a->begin + a->bytes}) {
      for (size_t i = 0; i < kGuardBytes; ++i) {
        if (zone[i] != std::byte{kPoison}) {
          std::memset(const_cast<std::byte*>(zone), kPoison, kGuardBytes);
          return "write outside of a buffer: " + describe(*a, zone + i) + " was overwritten";
        }
      }
    }
  }
  return "";
}

}  // namespace emu
