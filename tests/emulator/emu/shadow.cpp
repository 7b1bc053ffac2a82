// SPDX-License-Identifier: Apache-2.0
#include "emu/shadow.h"

#include "emu/device.h"
#include "emu/memory.h"
#include "emu/report.h"

#include <algorithm>
#include <cstring>

namespace emu {
namespace {

// Set by the constructors of files that were compiled with -fsanitize=thread.
bool instrumented = false;

constexpr size_t kUnknown = ~size_t{0};

// The block of the current group whose shared window holds p.
size_t window_of(const Group& group, const void* p) {
  const auto* byte = static_cast<const std::byte*>(p);
  if (byte < group.windows || byte >= group.windows + group.window_stride * group.ctas.size()) {
    return kUnknown;
  }
  return static_cast<size_t>(byte - group.windows) / group.window_stride;
}

}  // namespace

bool checked() { return instrumented; }

Issue issue(Pc pc) {
  if (!checked()) {
    return {{}, {}, pc, "", true};
  }
  Issue issued{
      current->clock, current->fenced, pc, where(*current), current->waited_for_grid_dependency};
  issued.clock.raise(current->agent, current->epoch++);  // what it does next is later
  return issued;
}

Shadow::Shadow(Group& group)
    : group_(group), bytes_(group.launch->shared_bytes), cells_(bytes_ * group.ctas.size()) {
  group.agents = group.used;
}

size_t Shadow::add_agent(std::string description) {
  agents_.push_back(std::move(description));
  return group_.agents++;
}

Shadow::Cell* Shadow::cells(const Cta& cta, uint32_t address) {
  return &cells_[cta.rank * bytes_ + (address - kSharedBase)];
}

std::string Shadow::agent_name(uint32_t agent) const {
  return agent < group_.used ? where(*group_.threads[agent]) : agents_[agent - group_.used];
}

void Shadow::race(const Cta& cta,
                  uint32_t address,
                  const std::string& now,
                  Pc now_pc,
                  const char* verb,
                  uint32_t agent,
                  Pc pc) {
  const Index3& b = cta.index;
  fault(
      format("race on shared memory at address %u of block (%u,%u,%u): ", address, b.x, b.y, b.z) +
      now + " at " + describe_pc(now_pc) + ", and " + agent_name(agent) + " " + verb + " at " +
      describe_pc(pc) + ", with nothing that orders the two");
}

void Shadow::missing_fence(const Cell& cell,
                           uint32_t address,
                           const char* verb,
                           const Issue& issue) {
  fault(format("missing fence.proxy.async: shared memory at address %u was written by ", address) +
        agent_name(cell.agent) + " at " + describe_pc(cell.pc) +
        " through the generic proxy and is " + verb + " through the async proxy for " + issue.who +
        " at " + describe_pc(issue.pc));
}

void Shadow::record_read(Cell& cell, const Clock& clock, Reader reader) {
  Reader* slot = nullptr;
  for (Reader& r : cell.readers) {
    // A reader that happened before this one can be forgotten: what races with it races with this.
    if (r.epoch == 0 || r.agent == reader.agent || clock[r.agent] >= r.epoch) {
      slot = &r;
      break;
    }
  }
  if (slot == nullptr) {
    slot = &cell.readers[group_.next_random() % std::size(cell.readers)];
  }
  *slot = reader;
}

void Shadow::access(Cta& cta, uint32_t address, uint32_t bytes, Access kind, Pc pc) {
  const Thread& t = *current;
  Cell* cell = cells(cta, address);
  for (uint32_t i = 0; i < bytes; ++i, ++cell) {
    if (cell->epoch == 0 && kind != Access::kWrite && settings().uninitialised) {
      fault(format("read of shared memory at address %u that was never written in this block, ",
                   address + i) +
            where(t) + " at " + describe_pc(pc));
    }
    const bool both_atomic = kind == Access::kAtomic && cell->atomic;
    if (cell->epoch != 0 && cell->agent != t.agent && !both_atomic &&
        t.clock[cell->agent] < cell->epoch) {
      const char* verb = kind == Access::kRead ? " reads" : " writes";
      race(cta, address + i, where(t) + verb, pc, "wrote", cell->agent, cell->pc);
    }
    if (kind == Access::kRead) {
      record_read(*cell, t.clock, {t.epoch, t.agent, pc});
      continue;
    }
    for (Reader& r : cell->readers) {
      if (r.epoch != 0 && r.agent != t.agent && t.clock[r.agent] < r.epoch) {
        race(cta, address + i, where(t) + " writes", pc, "read", r.agent, r.pc);
      }
      r.epoch = 0;
    }
    cell->epoch = t.epoch;
    cell->agent = t.agent;
    cell->pc = pc;
    cell->async_proxy = false;
    cell->atomic = kind == Access::kAtomic;
  }
}

void Shadow::async_write(Cta& cta,
                         uint32_t address,
                         uint32_t bytes,
                         const Issue& issue,
                         size_t agent,
                         uint32_t epoch,
                         bool async_proxy) {
  Cell* cell = cells(cta, address);
  for (uint32_t i = 0; i < bytes; ++i, ++cell) {
    // Two parts of one copy, or two copies on one barrier, may fall on the same bytes only by
    // mistake; it is not told apart here.
    if (cell->epoch != 0 && cell->agent != agent && issue.clock[cell->agent] < cell->epoch) {
      race(cta,
           address + i,
           "an asynchronous copy of " + issue.who + " writes",
           issue.pc,
           "wrote",
           cell->agent,
           cell->pc);
    }
    if (async_proxy && cell->epoch != 0 && !cell->async_proxy &&
        issue.fenced[cell->agent] < cell->epoch) {
      missing_fence(*cell, address + i, "overwritten", issue);
    }
    for (Reader& r : cell->readers) {
      if (r.epoch != 0 && issue.clock[r.agent] < r.epoch) {
        race(cta,
             address + i,
             "an asynchronous copy of " + issue.who + " writes",
             issue.pc,
             "read",
             r.agent,
             r.pc);
      }
      r.epoch = 0;
    }
    cell->epoch = epoch;
    cell->agent = static_cast<uint32_t>(agent);
    cell->pc = issue.pc;
    cell->async_proxy = async_proxy;
    cell->atomic = false;
  }
}

void Shadow::async_read(
    Cta& cta, uint32_t address, uint32_t bytes, const Issue& issue, size_t agent, uint32_t epoch) {
  Cell* cell = cells(cta, address);
  for (uint32_t i = 0; i < bytes; ++i, ++cell) {
    if (cell->epoch == 0) {
      if (settings().uninitialised) {
        fault(format("asynchronous read of shared memory at address %u that was never written in "
                     "this block, for ",
                     address + i) +
              issue.who + " at " + describe_pc(issue.pc));
      }
      continue;
    }
    if (issue.clock[cell->agent] < cell->epoch) {
      race(cta,
           address + i,
           "an asynchronous read for " + issue.who,
           issue.pc,
           "wrote",
           cell->agent,
           cell->pc);
    }
    if (!cell->async_proxy && issue.fenced[cell->agent] < cell->epoch) {
      missing_fence(*cell, address + i, "read", issue);
    }
    record_read(*cell, issue.clock, {epoch, static_cast<uint32_t>(agent), issue.pc});
  }
}

void observe(Cta& cta, uint32_t address, uint32_t bytes, Access kind, Pc pc) {
  if (checked()) {
    cta.group->shadow->access(cta, address, bytes, kind, pc);
  }
}

void observe_global(
    const void* p, size_t bytes, size_t alignment, bool write, Pc pc, bool dependency_waited) {
  const auto number = reinterpret_cast<uintptr_t>(p);
  const auto who = [] { return current != nullptr ? where(*current) : "an asynchronous copy"; };
  const char* verb = write ? "write" : "read";
  if (number % alignment != 0) {
    fault(format("misaligned %s of %zu bytes at %p: expected a multiple of %zu, ",
                 verb,
                 bytes,
                 p,
                 alignment) +
          who() + " at " + describe_pc(pc));
  }
  if (!checked() || bytes == 0) {
    return;
  }
  const Launch& launch = *running->launch;
  const auto* first = static_cast<const std::byte*>(p);
  const std::byte* last = first + bytes - 1;
  // Neighbouring accesses mostly fall into the same allocation.
  Allocation*& a = running->last_allocation;
  if (a == nullptr || !a->guards(first) || !a->guards(last)) {
    a = find(*launch.allocations, last);
    if (a == nullptr && (a = find(*launch.allocations, p)) == nullptr) {
      return;  // not ours to judge: a constant, or memory that somebody else allocated
    }
  }
  const std::byte* outside = first < a->begin ? first : last;
  if (outside < a->begin || outside >= a->begin + a->bytes) {
    fault(format("%s outside of a buffer: %zu bytes at ", verb, bytes) + describe(*a, p) + ", " +
          who() + " at " + describe_pc(pc));
  }
  if (launch.dependent && !dependency_waited) {
    const uint64_t previous = launch.number - 1;
    const bool written = a->writer.load(std::memory_order_relaxed) == previous;
    const bool was_read = a->reader.load(std::memory_order_relaxed) == previous;
    if (written || (write && was_read)) {
      fault(format("%s of memory that the previous kernel %s, before griddepcontrol.wait: ",
                   verb,
                   written ? "writes" : "reads") +
            describe(*a, p) + ", " + who() + " at " + describe_pc(pc));
    }
  }
  (write ? running->traffic.written : running->traffic.read) += bytes;
  std::atomic<uint64_t>& seen = write ? a->writer : a->reader;
  if (seen.load(std::memory_order_relaxed) != launch.number) {
    seen.store(launch.number, std::memory_order_relaxed);
  }
}

}  // namespace emu

// ---- the hooks of -fsanitize=thread -------------------------------------------------------------

namespace {

using emu::Access;
using emu::current;
using emu::Pc;

// CUDA's built-in variables, which lie together in this thread's memory.
bool is_built_in(const void* p) {
  const auto distance = static_cast<const char*>(p) - reinterpret_cast<const char*>(&threadIdx);
  constexpr std::ptrdiff_t kReach = 4 * sizeof(threadIdx);
  return distance > -kReach && distance < kReach;
}

void touched(const void* p, uint32_t bytes, uint32_t alignment, bool write, Pc pc) {
  emu::Thread* t = current;
  if (t == nullptr || t->stack.contains(p) || is_built_in(p)) {
    return;
  }
  emu::Group& group = *t->cta->group;
  const size_t rank = emu::window_of(group, p);
  if (rank == emu::kUnknown) {
    emu::observe_global(p, bytes, alignment, write, pc, t->waited_for_grid_dependency);
    return;
  }
  emu::Cta& cta = group.ctas[rank];
  if (&cta != t->cta) {
    const emu::Index3& b = cta.index;
    emu::fault(emu::format("%s of shared memory of block (%u,%u,%u) by ",
                           write ? "write" : "read",
                           b.x,
                           b.y,
                           b.z) +
               emu::where(*t) + ", another block, at " + emu::describe_pc(pc));
  }
  const auto address = static_cast<uint32_t>(static_cast<const std::byte*>(p) - cta.window);
  emu::shared_bytes(cta, address, bytes, alignment, write ? "write" : "read", pc);
  group.shadow->access(cta, address, bytes, write ? Access::kWrite : Access::kRead, pc);
}

}  // namespace

extern "C" {
#define EMU_HOOK __attribute__((visibility("default"), noinline)) void
// NOLINTBEGIN: names that the compiler prescribes
#define EMU_HOOKS(bytes)                                                                     \
  EMU_HOOK __tsan_read##bytes(void* p) { touched(p, bytes, bytes, false, EMU_PC); }          \
  EMU_HOOK __tsan_write##bytes(void* p) { touched(p, bytes, bytes, true, EMU_PC); }          \
  EMU_HOOK __tsan_unaligned_read##bytes(void* p) { touched(p, bytes, 1, false, EMU_PC); }    \
  EMU_HOOK __tsan_unaligned_write##bytes(void* p) { touched(p, bytes, 1, true, EMU_PC); }    \
  EMU_HOOK __tsan_volatile_read##bytes(void* p) { touched(p, bytes, bytes, false, EMU_PC); } \
  EMU_HOOK __tsan_volatile_write##bytes(void* p) { touched(p, bytes, bytes, true, EMU_PC); }
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
EMU_HOOK __tsan_read_range(void* p, unsigned long bytes) {
  touched(p, static_cast<uint32_t>(bytes), 1, false, EMU_PC);
}
EMU_HOOK __tsan_write_range(void* p, unsigned long bytes) {
  touched(p, static_cast<uint32_t>(bytes), 1, true, EMU_PC);
}
EMU_HOOK __tsan_init() { emu::instrumented = true; }
EMU_HOOK __tsan_func_entry(void*) {}
EMU_HOOK __tsan_func_exit() {}
EMU_HOOK __tsan_vptr_update(void**, void*) {}
EMU_HOOK __tsan_vptr_read(void**) {}
// NOLINTEND
}
