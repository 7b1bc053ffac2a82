// SPDX-License-Identifier: Apache-2.0
//
// What is remembered about every byte of shared memory: who wrote it when, through which proxy, and
// who read it since. From that follow races, reads of unwritten bytes and missing proxy fences.
// Kernels are compiled with -fsanitize=thread, but its runtime is ours (hooks in shadow.cpp): every
// load and store of a kernel arrives here with its source line.
#pragma once

#include "emu/core.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace emu {

// Who issued an asynchronous operation, and what it knew then.
struct Issue {
  Clock clock, fenced;
  Pc pc = nullptr;
  std::string who;                // empty in runs that are not checked
  bool dependency_waited = true;  // griddepcontrol.wait came before it
};
Issue issue(Pc pc);

enum class Access { kRead, kWrite, kAtomic };

class Shadow {
 public:
  explicit Shadow(Group& group);

  // Registers an agent that is no thread, e.g. "copies that complete on the mbarrier at 1024".
  size_t add_agent(std::string description);

  // By the current thread, through the generic proxy.
  void access(Cta& cta, uint32_t address, uint32_t bytes, Access kind, Pc pc);
  // By an engine; ordered for others by (agent, epoch).
  void async_write(Cta& cta,
                   uint32_t address,
                   uint32_t bytes,
                   const Issue& issue,
                   size_t agent,
                   uint32_t epoch,
                   bool async_proxy);
  void async_read(
      Cta& cta, uint32_t address, uint32_t bytes, const Issue& issue, size_t agent, uint32_t epoch);

 private:
  struct Reader {
    uint32_t epoch = 0;  // 0: free
    uint32_t agent = 0;
    Pc pc = nullptr;
  };
  struct Cell {
    uint32_t epoch = 0;  // of the last write; 0: never written
    uint32_t agent = 0;
    Pc pc = nullptr;
    bool async_proxy = false;
    bool atomic = false;
    Reader readers[4];
  };

  Cell* cells(const Cta& cta, uint32_t address);
  void record_read(Cell& cell, const Clock& clock, Reader reader);
  [[noreturn]] void race(const Cta& cta,
                         uint32_t address,
                         const std::string& now,
                         Pc now_pc,
                         const char* verb,
                         uint32_t agent,
                         Pc pc);
  [[noreturn]] void missing_fence(const Cell& cell,
                                  uint32_t address,
                                  const char* verb,
                                  const Issue& issue);
  std::string agent_name(uint32_t agent) const;

  Group& group_;
  size_t bytes_;  // of one block
  std::vector<Cell> cells_;
  std::vector<std::string> agents_;  // behind the threads
};

// Convenience for the emulator's own accesses on behalf of the current thread.
void observe(Cta& cta, uint32_t address, uint32_t bytes, Access kind, Pc pc);
// Global memory touched for the current thread (or an engine): bounds, alignment, dependent
// launches.
// dependency_waited: griddepcontrol.wait came before it.
void observe_global(
    const void* p, size_t bytes, size_t alignment, bool write, Pc pc, bool dependency_waited);

}  // namespace emu
