// SPDX-License-Identifier: Apache-2.0
//
// The machine that kernels run on: threads (fibers) of blocks of a group. A group is what must be
// resident together: one block, one cluster, or a whole cooperative grid. It runs on one thread of
// the operating system, so nothing in it needs a lock, and its schedule is a function of the seed.
#pragma once

#include "emu/clock.h"
#include "emu/fiber.h"
#include "emu/memory.h"

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace emu {

struct Cta;
struct Group;
struct Launch;
struct Thread;
class Shadow;

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// Where a kernel called the emulator; turned into a source line when something is reported.
using Pc = const void*;
#define EMU_PC __builtin_return_address(0)

// The first 1 KB of the shared window belongs to the system, as on a GPU: address 0 is never valid.
constexpr uint32_t kSharedBase = 1024;
// Bytes behind the block's shared memory that nobody may touch.
constexpr uint32_t kSharedGuard = 1024;
constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr unsigned char kPoison = 0xff;  // nan in every floating-point format

// ---- reports ------------------------------------------------------------------------------------

// Ends the launch with this sentence. Does not return: called by a kernel's thread, it never runs
// again; called by the scheduler, it throws.
[[noreturn]] void fault(const std::string& text);
std::string describe_pc(Pc pc);  // "csrc/cuda/x/forward.cu:29 in x_kernel", or the bare address
std::string format(const char* pattern, ...) __attribute__((format(__printf__, 1, 2)));

// ---- synchronisation objects --------------------------------------------------------------------

// __syncthreads (id 0) and the named barriers.
struct Barrier {
  unsigned expected = 0;
  unsigned arrived = 0;
  std::vector<Thread*> waiting;
  Pc first = nullptr;
  unsigned votes = 0;  // predicates that were true, for __syncthreads_count and its kin
  Clock clock, fenced;
};

struct MBarrier {
  uint32_t count = 0;
  int64_t pending = 0;
  int64_t tx_bytes = 0;
  uint32_t phase = 0;
  size_t agent = 0;         // entry in the clocks, for what completes here asynchronously
  unsigned init_agent = 0;  // who initialised it, and when
  uint32_t init_epoch = 0;
  Pc init_pc = nullptr;
  std::vector<Thread*> waiting;
  Clock arriving, completed;
  Clock arriving_fenced, completed_fenced;
};

// Lanes of a warp that meet: each brings a slot; the last one to come runs the operation for all.
struct Rendezvous {
  const char* what = nullptr;
  uint32_t mask = 0;
  uint32_t arrived = 0;
  bool all_lanes = false;     // an instruction that no lane may miss
  void* slots[kWarpThreads];  // of those that have arrived
  void (*run)(void* const* slots, uint32_t mask) = nullptr;
};

// One cp.async of one thread; it lands when the thread waits for its group.
struct CopyAsync {
  uint32_t dst;
  const void* src;
  uint32_t bytes, src_bytes;
  Pc pc;
  bool dependency_waited;  // griddepcontrol.wait came before it
  Clock clock;             // of its issue: it may write from then on
  uint32_t epoch;
};

// Copies of one thread that land together, when the first of wait_group and mbarrier asks for them.
struct CopyBatch {
  std::vector<CopyAsync> copies;
  bool on_mbarrier = false;  // an mbarrier will hear of them
  bool landed = false;
  size_t agent = 0;  // whoever knows this entry of the clocks knows that they have landed
  uint32_t epoch = 0;
};

// One bulk store of one thread: reads shared memory when it lands.
struct BulkStore {
  bool read = false;
  uint32_t number = 0;  // of its thread's, from 1 on
  Thread* waiter = nullptr;
};

struct WgmmaThread;  // wgmma.cpp

// ---- threads and blocks -------------------------------------------------------------------------

// What a blocked thread waits for: `what` with up to three numbers, printed as in the report.
struct Wait {
  const char* what = nullptr;  // a printf pattern for (a, b, c), all long long
  long long a = 0, b = 0, c = 0;
  Pc pc = nullptr;
};

struct Thread {
  Fiber fiber;
  Stack stack;
  Cta* cta = nullptr;
  unsigned linear = 0;  // in the block
  unsigned agent = 0;   // in the group, entry in the clocks
  Index3 index;
  bool done = false;
  unsigned votes = 0;  // what the last voting barrier counted
  Wait wait;

  using CopyGroup = std::vector<std::shared_ptr<CopyBatch>>;
  std::vector<CopyAsync> open_copies;
  CopyGroup open_batches;  // of the open group, cut off by an mbarrier arrival
  std::deque<CopyGroup> copy_groups;

  using BulkGroup = std::vector<std::shared_ptr<BulkStore>>;
  BulkGroup open_stores;
  std::deque<BulkGroup> store_groups;

  std::shared_ptr<WgmmaThread> wgmma;

  bool arrived_at_cluster = false;
  unsigned cluster_generation = 0;
  bool waited_for_grid_dependency = false;
  uint32_t stores = 0;
  size_t store_agent = 0;  // of its bulk stores, in the clocks; 0: none yet

  uint32_t epoch = 1;   // of its own events; not in its clock
  Clock clock, fenced;  // fenced: what a fence.proxy.async has made visible to the async proxy

  unsigned lane() const { return linear % kWarpThreads; }
  unsigned warp() const { return linear / kWarpThreads; }
};

struct Warp {
  std::vector<Rendezvous> meeting;
  uint32_t live = 0;       // lanes that have not exited
  size_t wgmma_agent = 0;  // of its wgmmas, in the clocks; 0: none yet
  unsigned registers = 0;  // per thread, if setmaxnreg has named a number
};

struct Cta {
  Group* group = nullptr;
  Index3 index;          // blockIdx
  unsigned rank = 0;     // in the cluster (or in the cooperative grid)
  unsigned cluster = 0;  // which cluster of the group; groups of one cluster have 0
  unsigned cluster_rank = 0;
  unsigned live = 0;
  std::byte* window = nullptr;  // shared address 0
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::unordered_map<uint32_t, MBarrier> mbarriers;
  unsigned pending_async = 0;  // copies in flight that read or write this block's shared memory
  // Threads of other blocks that touched it, with the last time: it may not exit before.
  std::unordered_map<unsigned, std::pair<uint32_t, Pc>> touched_by;
  Clock exits;  // what its exited threads knew
};

// Something in flight that no thread executes: TMA, bulk copies.
struct Async {
  Pc pc;  // where it was issued
  std::function<void()> land;
};

// The barrier of a cluster or grid. Arriving and waiting are apart, so what was released for the
// next time must not reach those who still wait for the last.
struct ClusterState {
  unsigned arrived = 0;
  unsigned generation = 0;
  std::vector<Thread*> waiting;
  Clock arriving, arriving_fenced;
  Clock completed, completed_fenced;
};

// Shared windows, between bands of memory that nobody can touch: an index that is far off stops
// there instead of in some other part of the process.
class WindowMemory {
 public:
  WindowMemory() = default;
  ~WindowMemory();
  WindowMemory(const WindowMemory&) = delete;
  WindowMemory& operator=(const WindowMemory&) = delete;

  std::byte* reserve(size_t bytes);  // aligned to a page; contents are lost

 private:
  std::byte* mapped_ = nullptr;
  size_t bytes_ = 0;
};

struct Group {
  const Launch* launch = nullptr;
  uint64_t random = 1;
  unsigned eager_async = 8;  // an asynchronous copy lands about every so many steps
  unsigned random_order =
      256;                     // of 256 choices, how many are random rather than last in, first out
  unsigned preempt_odds = 64;  // of 256 chances to give way, how many are taken
  unsigned live = 0;
  unsigned idle_spins = 0;
  std::vector<std::unique_ptr<Thread>> threads;  // kept for the next group; the first `used` count
  size_t used = 0;
  std::vector<Cta> ctas;
  std::vector<Thread*> ready;
  std::vector<Async> async;
  std::vector<ClusterState> clusters;
  ClusterState grid;
  WindowMemory memory;
  std::byte* windows = nullptr;
  size_t window_stride = 0;
  std::unordered_map<const void*, std::pair<Clock, Clock>> atomics;  // clocks of flags
  size_t agents = 0;  // entries of the clocks: threads, then mbarriers
  std::string fault;
  Fiber scheduler;
  Allocation* last_allocation = nullptr;  // where the last access of global memory fell
  Traffic traffic;                 // of the groups that ran on this thread since its last sum
  std::unique_ptr<Shadow> shadow;  // present in checked runs

  uint64_t next_random();
  bool chance(unsigned of_256) { return (next_random() >> 56) < of_256; }
};

struct Launch {
  Index3 grid, block, cluster{1, 1, 1};
  unsigned shared_bytes = 0;
  bool cooperative = false;
  bool dependent = false;  // programmatic dependent launch
  uint64_t seed = 0;
  uint64_t number = 0;  // launches of this process so far
  std::function<void()> body;
  std::shared_ptr<const std::vector<std::shared_ptr<Allocation>>> allocations;
  mutable std::atomic<unsigned> running_groups{0};

  unsigned block_threads() const { return block.x * block.y * block.z; }
  unsigned cluster_ctas() const { return cluster.x * cluster.y * cluster.z; }
};

// The thread that runs now; null in the scheduler and on the host.
extern thread_local Thread* current;
// The group that runs on this thread of the operating system.
extern thread_local Group* running;

// ---- what synchronisation is made of ------------------------------------------------------------

void block(const Wait& wait);  // until somebody wakes this thread
void wake(Thread* thread);
void preempt();                // perhaps let others run: called where a real GPU may interleave
void spin(const Wait& wait);   // a failed poll: lets others run; only spinning is a deadlock
void progress();               // something changed that a poll may see
void run_group(Group& group);  // throws nothing; group.fault says what went wrong

// What synchronisation carries from the thread that releases to the one that acquires; nothing in
// runs that are not checked.
void release(Clock& clock, Clock& fenced);
void acquire(Thread& thread, const Clock& clock, const Clock& fenced);
// The same for a thread that has released into these very clocks, so that nothing of its own is
// lost.
void acquire_all(Thread& thread, const Clock& clock, const Clock& fenced);

// Runs `run` once for all lanes of `mask`; every lane's slot is valid meanwhile.
void meet(const char* what,
          uint32_t mask,
          void* slot,
          void (*run)(void* const* slots, uint32_t mask),
          Pc pc,
          bool all_lanes = false);
// The same for instructions that all 32 lanes of a warp must execute together (".aligned").
void meet_all(const char* what, void* slot, void (*run)(void* const* slots, uint32_t mask), Pc pc);

// Barrier `id` of the block for `threads` threads; `wait` false only arrives.
void barrier(int id, unsigned threads, bool wait, bool predicate, Pc pc);
void cluster_arrive(Pc pc);
void cluster_wait(Pc pc);
void grid_barrier(Pc pc);

// Hands a copy to the engines that no thread runs; it lands in any order, late.
void start_async(Pc pc, std::function<void()> land);
// Calls it; false if it touched unmapped memory, whose address is then in `address`.
bool land_safely(const Async& async, const void*& address);

// Memory of the shared window of `cta`, checked: inside the block's allocation and aligned.
std::byte* shared_bytes(
    Cta& cta, uint32_t address, uint32_t bytes, uint32_t alignment, const char* what, Pc pc);

// Resolves a shared::cluster address (own window, or another block's made by map_shared).
struct ClusterAddress {
  Cta* cta;
  uint32_t address;
};
ClusterAddress cluster_address(uint32_t address, const char* what, Pc pc);

void check_wgmma_done(const Thread& thread);

std::string where(const Thread& thread);  // "thread 3 of block (0,1,0)"
bool checked();                           // memory accesses of kernels are observed

}  // namespace emu
