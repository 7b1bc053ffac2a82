// SPDX-License-Identifier: Apache-2.0
#include "emu/device.h"

#include "emu/report.h"
#include "emu/shadow.h"

#include <algorithm>
#include <chrono>
#include <cstdarg>
#include <cstdio>

namespace emu {
namespace {

// What kernels printed, for the report of a trap.
thread_local std::string printed;

struct ShuffleSlot {
  Shuffle kind;
  uint64_t value, result;
  int argument, width;
  const char* error;
};

void run_shuffle(void* const* slots, uint32_t mask) {
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    if ((mask >> lane & 1) == 0) {
      continue;
    }
    auto& s = *static_cast<ShuffleSlot*>(slots[lane]);
    const int first = lane & ~(s.width - 1);
    const int end = first + s.width;
    int source = lane;
    switch (s.kind) {
      case Shuffle::kIndex:
        source = first + (s.argument & (s.width - 1));
        break;
      case Shuffle::kUp:
        source = lane - s.argument >= first ? lane - s.argument : lane;
        break;
      case Shuffle::kDown:
        source = lane + s.argument < end ? lane + s.argument : lane;
        break;
      case Shuffle::kXor:
        source = (lane ^ s.argument) < end ? lane ^ s.argument : lane;
        break;
    }
    if ((mask >> source & 1) == 0) {
      s.error = "reads a lane that takes no part";
      continue;
    }
    s.result = static_cast<ShuffleSlot*>(slots[source])->value;
  }
}

struct ValueSlot {
  uint64_t value, result;
  Reduce kind;
};

template <class F>
void for_lanes(void* const* slots, uint32_t mask, F&& f) {
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    if ((mask >> lane & 1) != 0) {
      f(lane, *static_cast<ValueSlot*>(slots[lane]));
    }
  }
}

void run_ballot(void* const* slots, uint32_t mask) {
  uint64_t bits = 0;
  for_lanes(slots, mask, [&](int lane, ValueSlot& s) { bits |= s.value << lane; });
  for_lanes(slots, mask, [&](int, ValueSlot& s) { s.result = bits; });
}

void run_match(void* const* slots, uint32_t mask) {
  for_lanes(slots, mask, [&](int, ValueSlot& s) {
    s.result = 0;
    for_lanes(slots, mask, [&](int lane, ValueSlot& other) {
      s.result |= other.value == s.value ? uint64_t{1} << lane : 0;
    });
  });
}

int64_t combine(Reduce kind, int64_t a, int64_t b) {
  switch (kind) {
    case Reduce::kAdd:
      return a + b;
    case Reduce::kMin:
      return std::min(a, b);
    case Reduce::kMax:
      return std::max(a, b);
    case Reduce::kAnd:
      return a & b;
    case Reduce::kOr:
      return a | b;
    case Reduce::kXor:
      return a ^ b;
  }
  return 0;
}

void run_reduce(void* const* slots, uint32_t mask) {
  bool first = true;
  int64_t total = 0;
  for_lanes(slots, mask, [&](int, ValueSlot& s) {
    const auto value = static_cast<int64_t>(s.value);
    total = first ? value : combine(s.kind, total, value);
    first = false;
  });
  for_lanes(slots, mask, [&](int, ValueSlot& s) { s.result = static_cast<uint64_t>(total); });
}

void run_sync_warp(void* const* slots, uint32_t mask) {
  if (!checked()) {
    return;
  }
  Clock clock, fenced;
  const auto each = [&](auto&& f) {
    for (int lane = 0; lane < kWarpThreads; ++lane) {
      if ((mask >> lane & 1) != 0) {
        f(*static_cast<Thread*>(slots[lane]));
      }
    }
  };
  each([&](Thread& t) {
    clock.join(t.clock);
    clock.raise(t.agent, t.epoch++);
    fenced.join(t.fenced);
  });
  each([&](Thread& t) { acquire_all(t, clock, fenced); });
}

template <class T>
uint64_t apply_atomic(Atomic kind, T* p, T v, T compare) {
  T old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
  switch (kind) {
    case Atomic::kLoad:
      return static_cast<uint64_t>(old);
    case Atomic::kStore:
      __atomic_store_n(p, v, __ATOMIC_SEQ_CST);
      return static_cast<uint64_t>(old);
    case Atomic::kAdd:  // wraps, as the hardware does
      return static_cast<uint64_t>(__atomic_fetch_add(p, v, __ATOMIC_SEQ_CST));
    case Atomic::kAnd:
      return static_cast<uint64_t>(__atomic_fetch_and(p, v, __ATOMIC_SEQ_CST));
    case Atomic::kOr:
      return static_cast<uint64_t>(__atomic_fetch_or(p, v, __ATOMIC_SEQ_CST));
    case Atomic::kXor:
      return static_cast<uint64_t>(__atomic_fetch_xor(p, v, __ATOMIC_SEQ_CST));
    case Atomic::kExchange:
      return static_cast<uint64_t>(__atomic_exchange_n(p, v, __ATOMIC_SEQ_CST));
    case Atomic::kCompareAndSwap:
      __atomic_compare_exchange_n(p, &compare, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
      return static_cast<uint64_t>(compare);
    case Atomic::kMin:
    case Atomic::kMax:
      while (
          !__atomic_compare_exchange_n(p,
                                       &old,
                                       kind == Atomic::kMin ? std::min(old, v) : std::max(old, v),
                                       false,
                                       __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST)) {
      }
      return static_cast<uint64_t>(old);
  }
  return 0;
}

}  // namespace

void sync_threads() {
  barrier(0, static_cast<unsigned>(current->cta->threads.size()), true, false, EMU_PC);
}

unsigned sync_threads_votes(bool predicate) {
  barrier(0, static_cast<unsigned>(current->cta->threads.size()), true, predicate, EMU_PC);
  return current->votes;
}

void sync_warp(uint32_t mask) { meet("__syncwarp", mask, current, &run_sync_warp, EMU_PC); }

uint64_t shuffle(Shuffle kind, uint32_t mask, uint64_t value, int argument, int width) {
  ShuffleSlot slot{kind, value, 0, argument, width, nullptr};
  meet("__shfl_sync", mask, &slot, &run_shuffle, EMU_PC);
  if (slot.error != nullptr) {
    fault("__shfl_sync " + std::string(slot.error) + ", " + where(*current) + " at " +
          describe_pc(EMU_PC));
  }
  return slot.result;
}

uint32_t ballot(uint32_t mask, bool predicate) {
  ValueSlot slot{predicate, 0, {}};
  meet("__ballot_sync", mask, &slot, &run_ballot, EMU_PC);
  return static_cast<uint32_t>(slot.result);
}

uint32_t match_any(uint32_t mask, uint64_t value) {
  ValueSlot slot{value, 0, {}};
  meet("__match_any_sync", mask, &slot, &run_match, EMU_PC);
  return static_cast<uint32_t>(slot.result);
}

int64_t reduce(Reduce kind, uint32_t mask, int64_t value) {
  ValueSlot slot{static_cast<uint64_t>(value), 0, kind};
  meet("__reduce_sync", mask, &slot, &run_reduce, EMU_PC);
  return static_cast<int64_t>(slot.result);
}

uint64_t atomic(
    Atomic kind, void* p, unsigned bytes, bool is_signed, uint64_t v, uint64_t compare) {
  const Pc pc = EMU_PC;
  Group& group = *running;
  const auto* byte = static_cast<const std::byte*>(p);
  const bool writes = kind != Atomic::kLoad;
  if (byte >= group.windows && byte < group.windows + group.window_stride * group.ctas.size()) {
    Cta& cta = group.ctas[static_cast<size_t>(byte - group.windows) / group.window_stride];
    const auto address = static_cast<uint32_t>(byte - cta.window);
    shared_bytes(cta, address, bytes, bytes, "atomic", pc);
    observe(cta, address, bytes, Access::kAtomic, pc);
  } else {
    observe_global(p, bytes, bytes, writes, pc, current->waited_for_grid_dependency);
  }
  if (checked()) {
    auto& [clock, fenced] = group.atomics[p];
    acquire(*current, clock, fenced);
    release(clock, fenced);
  }
  uint64_t old;
  if (bytes == 4) {
    old = is_signed ? apply_atomic(kind,
                                   static_cast<int32_t*>(p),
                                   static_cast<int32_t>(v),
                                   static_cast<int32_t>(compare))
                    : apply_atomic(kind,
                                   static_cast<uint32_t*>(p),
                                   static_cast<uint32_t>(v),
                                   static_cast<uint32_t>(compare));
  } else {
    old = is_signed ? apply_atomic(kind,
                                   static_cast<int64_t*>(p),
                                   static_cast<int64_t>(v),
                                   static_cast<int64_t>(compare))
                    : apply_atomic(kind, static_cast<uint64_t*>(p), v, compare);
  }
  uint64_t now = 0;
  std::memcpy(&now, p, bytes);
  if (now == (bytes == 4 ? old & 0xffffffffu : old)) {
    spin({"a flag in memory", 0, 0, 0, pc});  // polling a flag is how grid barriers and locks wait
  } else {
    progress();
    preempt();
  }
  return old;
}

void trap() {
  std::string text = "trap by " + where(*current) + " at " + describe_pc(EMU_PC);
  if (!printed.empty()) {
    text += "; it printed: " + printed;
    printed.clear();
  }
  fault(text);
}

int device_printf(const char* pattern, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, pattern);
  const int length = std::vsnprintf(buffer, sizeof buffer, pattern, arguments);
  va_end(arguments);
  std::fputs(buffer, stdout);
  std::fflush(stdout);
  printed = buffer;
  return length;
}

long long clock_cycles() {
  preempt();
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

void nanosleep() { spin({"a while", 0, 0, 0, EMU_PC}); }

std::byte* dynamic_shared() { return current->cta->window + kSharedBase; }

}  // namespace emu
