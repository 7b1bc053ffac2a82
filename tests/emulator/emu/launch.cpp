// SPDX-License-Identifier: Apache-2.0
#include "emu/launch.h"

#include "cuda_runtime.h"
#include "emu/memory.h"
#include "emu/report.h"
#include "emu/shadow.h"

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <numeric>
#include <setjmp.h>
#include <sys/mman.h>
#include <thread>
#include <ucontext.h>
#include <unistd.h>
#include <utility>

namespace emu {
namespace {

constexpr Device kDevices[] = {
    {80, 163 << 10, 164 << 10, 2048, false},
    {86, 99 << 10, 100 << 10, 1536, false},
    {89, 99 << 10, 100 << 10, 1536, false},
    {90, 227 << 10, 228 << 10, 2048, true},
    {100, 227 << 10, 228 << 10, 2048, true},
    {120, 99 << 10, 100 << 10, 1536, true},
};

constexpr size_t kDefaultMaxShared = 48 << 10;
constexpr size_t kMaxParameterBytes = 32764;
constexpr size_t kBandBytes = size_t{64} << 20;  // on either side of the shared windows

struct FunctionAttributes {
  size_t max_shared = kDefaultMaxShared;
  bool large_clusters = false;
};

std::mutex attributes_lock;
std::map<const void*, FunctionAttributes> attributes;
std::atomic<uint64_t> launches{0};

FunctionAttributes attributes_of(const void* kernel) {
  const std::lock_guard<std::mutex> guard(attributes_lock);
  return attributes[kernel];
}

uint64_t count(const Index3& i) { return static_cast<uint64_t>(i.x) * i.y * i.z; }

// "" or which limit of the driver the launch breaks.
std::string refuse(const LaunchRequest& r, const void* kernel, size_t parameter_bytes) {
  const FunctionAttributes function = attributes_of(kernel);
  if (count(r.block) == 0 || count(r.block) > 1024 || r.block.x > 1024 || r.block.y > 1024 ||
      r.block.z > 64) {
    return format("block (%u,%u,%u): expected 1 to 1024 threads, z at most 64",
                  r.block.x,
                  r.block.y,
                  r.block.z);
  }
  if (count(r.grid) == 0 || r.grid.x > 2147483647u || r.grid.y > 65535 || r.grid.z > 65535) {
    return format("grid (%u,%u,%u): expected x from 1 to 2^31-1, y and z from 1 to 65535",
                  r.grid.x,
                  r.grid.y,
                  r.grid.z);
  }
  if (r.shared_bytes > device().shared_per_block) {
    return format("%zu bytes of shared memory: sm_%d has %u for a block",
                  r.shared_bytes,
                  device().arch,
                  device().shared_per_block);
  }
  if (r.shared_bytes > function.max_shared) {
    return format(
        "%zu bytes of dynamic shared memory: this kernel may have %zu; raise "
        "cudaFuncAttributeMaxDynamicSharedMemorySize before the launch",
        r.shared_bytes,
        function.max_shared);
  }
  if (parameter_bytes > kMaxParameterBytes) {
    return format("%zu bytes of kernel parameters: expected at most %zu",
                  parameter_bytes,
                  kMaxParameterBytes);
  }
  const uint64_t cluster = count(r.cluster);
  if (cluster != 1) {
    if (!device().clusters) {
      return format("a cluster of %llu blocks: sm_%d has no clusters",
                    static_cast<unsigned long long>(cluster),
                    device().arch);
    }
    const unsigned most = function.large_clusters ? 16 : 8;
    if (cluster == 0 || cluster > most) {
      return format("a cluster of %llu blocks: expected at most %u%s",
                    static_cast<unsigned long long>(cluster),
                    most,
                    function.large_clusters
                        ? ""
                        : " (16 with cudaFuncAttributeNonPortableClusterSizeAllowed)");
    }
    if (r.grid.x % r.cluster.x != 0 || r.grid.y % r.cluster.y != 0 || r.grid.z % r.cluster.z != 0) {
      return format("grid (%u,%u,%u): expected a multiple of the cluster (%u,%u,%u)",
                    r.grid.x,
                    r.grid.y,
                    r.grid.z,
                    r.cluster.x,
                    r.cluster.y,
                    r.cluster.z);
    }
  }
  return "";
}

Index3 index_in(const Index3& size, uint64_t linear) {
  return {static_cast<unsigned>(linear % size.x),
          static_cast<unsigned>(linear / size.x % size.y),
          static_cast<unsigned>(linear / size.x / size.y)};
}

// The blocks of group `number`, as blockIdx: one block, one cluster, or the whole grid.
std::vector<Index3> blocks_of(const Launch& launch, uint64_t number) {
  std::vector<Index3> blocks;
  const Index3& c = launch.cluster;
  const Index3 clusters = {launch.grid.x / c.x, launch.grid.y / c.y, launch.grid.z / c.z};
  const uint64_t first = launch.cooperative ? 0 : number;
  const uint64_t end = launch.cooperative ? count(clusters) : number + 1;
  for (uint64_t i = first; i < end; ++i) {
    const Index3 at = index_in(clusters, i);
    for (unsigned rank = 0; rank < launch.cluster_ctas(); ++rank) {
      const Index3 in = index_in(c, rank);
      blocks.push_back({at.x * c.x + in.x, at.y * c.y + in.y, at.z * c.z + in.z});
    }
  }
  return blocks;
}

void prepare(Group& group, const Launch& launch, uint64_t number) {
  const std::vector<Index3> blocks = blocks_of(launch, number);
  const unsigned threads = launch.block_threads();
  group.launch = &launch;
  group.random = launch.seed * 0x2545f4914f6cdd1du + number;
  group.next_random();
  // Different habits find different mistakes: orderly or wild, copies prompt or as late as can be.
  constexpr unsigned kOrder[] = {256, 64, 8};
  constexpr unsigned kAsync[] = {2, 16, 1u << 20};
  constexpr unsigned kPreempt[] = {128, 32, 0};
  group.random_order = kOrder[group.next_random() % 3];
  group.eager_async = kAsync[group.next_random() % 3];
  group.preempt_odds = kPreempt[group.next_random() % 3];
  group.fault.clear();
  group.idle_spins = 0;
  group.last_allocation = nullptr;
  group.async.clear();
  group.atomics.clear();
  group.used = blocks.size() * threads;
  while (group.threads.size() < group.used) {
    group.threads.push_back(std::make_unique<Thread>());
  }
  const unsigned per_cluster = launch.cluster_ctas();
  group.clusters.assign(blocks.size() / per_cluster, {});
  group.grid = {};

  group.window_stride = (kSharedBase + launch.shared_bytes + kSharedGuard + 1023) / 1024 * 1024;
  group.windows = group.memory.reserve(group.window_stride * blocks.size());
  std::memset(group.windows, kPoison, group.window_stride * blocks.size());

  group.ctas.clear();
  group.ctas.resize(blocks.size());
  for (size_t b = 0; b < blocks.size(); ++b) {
    Cta& cta = group.ctas[b];
    cta.group = &group;
    cta.index = blocks[b];
    cta.rank = static_cast<unsigned>(b);
    cta.cluster = cta.rank / per_cluster;
    cta.cluster_rank = cta.rank % per_cluster;
    cta.live = threads;
    cta.window = group.windows + b * group.window_stride;
    cta.warps.resize((threads + kWarpThreads - 1) / kWarpThreads);
    cta.threads.resize(threads);
    for (unsigned i = 0; i < threads; ++i) {
      Thread& t = *group.threads[b * threads + i];
      t.cta = &cta;
      t.linear = i;
      t.agent = static_cast<unsigned>(b * threads + i);
      t.index = index_in(launch.block, i);
      t.done = false;
      t.wait = {};
      t.open_copies.clear();
      t.open_batches.clear();
      t.copy_groups.clear();
      t.open_stores.clear();
      t.store_groups.clear();
      t.wgmma.reset();
      t.arrived_at_cluster = t.waited_for_grid_dependency = false;
      t.store_agent = 0;
      t.stores = 0;
      cta.threads[i] = &t;
      cta.warps[t.warp()].live |= 1u << t.lane();
    }
  }
  group.shadow.reset();
  if (checked()) {
    group.shadow = std::make_unique<Shadow>(group);
    for (size_t i = 0; i < group.used; ++i) {
      Thread& t = *group.threads[i];
      t.clock.clear();
      t.epoch = 1;
      t.fenced.clear();
    }
  }
}

// "" or what a finished block left overwritten behind its shared memory.
std::string check_windows(const Group& group) {
  for (const Cta& cta : group.ctas) {
    const std::byte* behind = cta.window + kSharedBase + group.launch->shared_bytes;
    for (unsigned i = 0; i < kSharedGuard; ++i) {
      if (behind[i] != std::byte{kPoison}) {
        return format(
            "write of shared memory %u bytes behind the end of the %u that block "
            "(%u,%u,%u) has",
            i,
            group.launch->shared_bytes,
            cta.index.x,
            cta.index.y,
            cta.index.z);
      }
    }
  }
  return "";
}

// Groups, with their fibers' stacks, are kept for the next launch.
class GroupPool {
 public:
  std::unique_ptr<Group> take() {
    const std::lock_guard<std::mutex> guard(lock_);
    if (free_.empty()) {
      return std::make_unique<Group>();
    }
    std::unique_ptr<Group> group = std::move(free_.back());
    free_.pop_back();
    return group;
  }
  void give(std::unique_ptr<Group> group) {
    const std::lock_guard<std::mutex> guard(lock_);
    free_.push_back(std::move(group));
  }

 private:
  std::mutex lock_;
  std::vector<std::unique_ptr<Group>> free_;
};
GroupPool& pool() {
  static auto* kept = new GroupPool;  // never destroyed: fibers may outlive static destruction
  return *kept;
}

// ---- wild addresses -----------------------------------------------------------------------------

#if defined(__x86_64__) && !EMU_ASAN
#define EMU_CATCH_SIGNALS 1

thread_local const void* signal_address = nullptr;
thread_local Pc signal_pc = nullptr;
thread_local sigjmp_buf* landing = nullptr;  // where to go on if a copy that lands fails
struct sigaction previous_segv, previous_bus;

[[noreturn]] void after_signal() {
  const bool overflow = [] {
    const auto* p = static_cast<const char*>(signal_address);
    const char* bottom = current->stack.bottom();
    return p < bottom && p >= bottom - (64 << 10);
  }();
  if (overflow) {
    fault("stack overflow of " + where(*current) + " at " + describe_pc(signal_pc));
  }
  // A misaligned vector access raises SIGSEGV without an address.
  fault((signal_address == nullptr
             ? std::string("access through a null or misaligned pointer by ")
             : format("access to unmapped memory at %p by ", signal_address)) +
        where(*current) + " at " + describe_pc(signal_pc));
}

void on_signal(int number, siginfo_t* info, void* context) {
  if (landing != nullptr) {
    signal_address = info->si_addr;
    siglongjmp(*landing, 1);
  }
  if (current == nullptr) {
    // Not a kernel's: let whoever was there before deal with it.
    sigaction(number, number == SIGSEGV ? &previous_segv : &previous_bus, nullptr);
    return;
  }
  signal_address = info->si_addr;
  auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  signal_pc = reinterpret_cast<Pc>(registers[REG_RIP] + 1);
  // Go on in after_signal, on top of the fiber's stack, outside of the signal handler.
  registers[REG_RIP] = reinterpret_cast<greg_t>(&after_signal);
  registers[REG_RSP] = reinterpret_cast<greg_t>(current->stack.bottom() + Stack::kBytes - 8);
}

// While kernels run; counted, since launches of several threads may overlap.
class SignalScope {
 public:
  SignalScope() {
    const std::lock_guard<std::mutex> guard(lock());
    if (users()++ == 0) {
      struct sigaction action = {};
      action.sa_sigaction = &on_signal;
      action.sa_flags = SA_SIGINFO | SA_ONSTACK;
      sigaction(SIGSEGV, &action, &previous_segv);
      sigaction(SIGBUS, &action, &previous_bus);
    }
  }
  ~SignalScope() {
    const std::lock_guard<std::mutex> guard(lock());
    if (--users() == 0) {
      sigaction(SIGSEGV, &previous_segv, nullptr);
      sigaction(SIGBUS, &previous_bus, nullptr);
    }
  }

 private:
  static std::mutex& lock() {
    static std::mutex m;
    return m;
  }
  static int& users() {
    static int count = 0;
    return count;
  }
};

// A stack for the handler, since the fiber's own may be what overflowed.
class SignalStack {
 public:
  SignalStack() : memory_(64 << 10) {
    stack_t mine = {};
    mine.ss_sp = memory_.data();
    mine.ss_size = memory_.size();
    sigaltstack(&mine, &previous_);
  }
  ~SignalStack() { sigaltstack(&previous_, nullptr); }

 private:
  std::vector<char> memory_;
  stack_t previous_;
};
#else
struct SignalScope {
  SignalScope() {}
};
struct SignalStack {
  SignalStack() {}
};
#endif

// Takes groups until there is none left or one has failed.
void work(const Launch& launch,
          const std::vector<uint32_t>& order,
          uint64_t groups,
          std::atomic<uint64_t>& next,
          std::atomic<bool>& failed,
          std::mutex& lock,
          std::string& text) {
  const SignalStack signal_stack;
  std::unique_ptr<Group> group = pool().take();
  while (!failed) {
    const uint64_t i = next++;
    if (i >= groups) {
      break;
    }
    prepare(*group, launch, order.empty() ? i : order[i]);
    ++launch.running_groups;
    run_group(*group);
    --launch.running_groups;
    std::string found = group->fault;
    if (found.empty()) {
      found = check_windows(*group);
    }
    if (!found.empty()) {
      const std::lock_guard<std::mutex> guard(lock);
      if (!failed.exchange(true)) {
        text = found;
      }
    }
  }
  add_traffic(std::exchange(group->traffic, {}));
  if (failed) {
    group.reset();  // abandoned fibers; start afresh
  } else {
    pool().give(std::move(group));
  }
}

}  // namespace

#ifdef EMU_CATCH_SIGNALS
bool land_safely(const Async& async, const void*& address) {
  sigjmp_buf point;
  struct Scope {
    ~Scope() { landing = nullptr; }  // also when a fault is thrown
  } const scope;
  if (sigsetjmp(point, 1) != 0) {
    address = signal_address;
    return false;
  }
  landing = &point;
  async.land();
  return true;
}
#else
bool land_safely(const Async& async, const void*&) {
  async.land();
  return true;
}
#endif

WindowMemory::~WindowMemory() {
  if (mapped_ != nullptr) {
    munmap(mapped_, bytes_ + 2 * kBandBytes);
  }
}

std::byte* WindowMemory::reserve(size_t bytes) {
  if (bytes > bytes_) {
    if (mapped_ != nullptr) {
      munmap(mapped_, bytes_ + 2 * kBandBytes);
      mapped_ = nullptr;
    }
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    bytes_ = (bytes + page - 1) / page * page;
    void* memory = mmap(nullptr,
                        bytes_ + 2 * kBandBytes,
                        PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                        -1,
                        0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    mapped_ = static_cast<std::byte*>(memory);
    mprotect(mapped_ + kBandBytes, bytes_, PROT_READ | PROT_WRITE);
  }
  return mapped_ + kBandBytes;
}

const Device& device() {
  for (const Device& d : kDevices) {
    if (d.arch == settings().arch) {
      return d;
    }
  }
  return kDevices[3];
}

void set_max_shared(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> guard(attributes_lock);
  attributes[kernel].max_shared = std::max(kDefaultMaxShared, bytes);
}

void allow_large_clusters(const void* kernel) {
  const std::lock_guard<std::mutex> guard(attributes_lock);
  attributes[kernel].large_clusters = true;
}

int resident_blocks(unsigned threads, size_t shared_bytes) {
  const size_t by_shared = device().shared_per_multiprocessor / (shared_bytes + 1024);
  const size_t by_threads = device().threads_per_multiprocessor / std::max(32u, threads);
  return static_cast<int>(std::min({by_shared, by_threads, size_t{32}}));
}

int resident_clusters(const LaunchRequest& r) {
  const auto blocks =
      static_cast<unsigned>(resident_blocks(static_cast<unsigned>(count(r.block)), r.shared_bytes));
  return static_cast<int>(settings().multiprocessors * blocks / count(r.cluster));
}

int launch(const LaunchRequest& request,
           const void* kernel,
           size_t parameter_bytes,
           std::function<void()> body) {
  set_report("");
  if (const std::string limit = refuse(request, kernel, parameter_bytes); !limit.empty()) {
    set_report("launch refused: " + limit);
    return cudaErrorInvalidConfiguration;
  }
  Launch launch;
  launch.grid = request.grid;
  launch.block = request.block;
  launch.cluster = request.cluster;
  launch.shared_bytes = static_cast<unsigned>(request.shared_bytes);
  launch.cooperative = request.cooperative;
  launch.dependent = request.dependent;
  launch.seed = settings().seed;
  launch.number = ++launches;
  launch.body = std::move(body);
  launch.allocations = allocations();
  if (request.cooperative) {
    const uint64_t resident =
        static_cast<uint64_t>(settings().multiprocessors) *
        static_cast<unsigned>(resident_blocks(launch.block_threads(), request.shared_bytes));
    if (count(request.grid) > resident) {
      set_report(
          format("launch refused: a cooperative grid of %llu blocks, of which %llu can be "
                 "resident",
                 static_cast<unsigned long long>(count(request.grid)),
                 static_cast<unsigned long long>(resident)));
      return cudaErrorCooperativeLaunchTooLarge;
    }
  }

  const uint64_t groups = request.cooperative ? 1 : count(request.grid) / count(request.cluster);
  // Blocks start in any order; beyond a million the order of the hardware will do.
  std::vector<uint32_t> order;
  if (groups <= (1u << 20)) {
    order.resize(groups);
    std::iota(order.begin(), order.end(), 0u);
    Group random;
    random.random = launch.seed;
    for (uint64_t i = groups; i > 1; --i) {
      std::swap(order[i - 1], order[random.next_random() % i]);
    }
  }
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex lock;
  std::string text;
  const auto worker = [&] { work(launch, order, groups, next, failed, lock, text); };
  {
    const SignalScope signals;
    std::vector<std::thread> others;
    const uint64_t threads = std::min<uint64_t>(settings().threads, groups / 2);
    for (uint64_t i = 1; i < threads; ++i) {
      others.emplace_back(worker);
    }
    worker();
    for (std::thread& other : others) {
      other.join();
    }
  }
  if (text.empty()) {
    text = check_guards(*launch.allocations);
  }
  if (!text.empty()) {
    set_report(text + format("\nreplay with EMULATOR_SEED=%llu%s",
                             static_cast<unsigned long long>(launch.seed),
                             groups > 1 ? " EMULATOR_THREADS=1" : ""));
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

LaunchRequest to_request(const cudaLaunchConfig_t& c) {
  LaunchRequest r;
  r.grid = {c.gridDim.x, c.gridDim.y, c.gridDim.z};
  r.block = {c.blockDim.x, c.blockDim.y, c.blockDim.z};
  r.shared_bytes = c.dynamicSmemBytes;
  for (unsigned i = 0; i < c.numAttrs; ++i) {
    const cudaLaunchAttributeValue& value = c.attrs[i].val;
    switch (c.attrs[i].id) {
      case cudaLaunchAttributeCooperative:
        r.cooperative = value.cooperative != 0;
        break;
      case cudaLaunchAttributeClusterDimension:
        r.cluster = {value.clusterDim.x, value.clusterDim.y, value.clusterDim.z};
        break;
      case cudaLaunchAttributeProgrammaticStreamSerialization:
        r.dependent = value.programmaticStreamSerializationAllowed != 0;
        break;
      default:
        break;
    }
  }
  return r;
}

std::byte* shared_bytes(
    Cta& cta, uint32_t address, uint32_t bytes, uint32_t alignment, const char* what, Pc pc) {
  const uint32_t size = cta.group->launch->shared_bytes;
  if (address < kSharedBase || address + uint64_t{bytes} > uint64_t{kSharedBase} + size) {
    fault(format("%s of %u bytes of shared memory at offset %lld, but the block has %u bytes: ",
                 what,
                 bytes,
                 static_cast<long long>(address) - kSharedBase,
                 size) +
          (current != nullptr ? where(*current) : "an asynchronous copy") + " at " +
          describe_pc(pc));
  }
  if (address % alignment != 0) {
    fault(format("misaligned %s of %u bytes of shared memory at address %u: expected a multiple of "
                 "%u, ",
                 what,
                 bytes,
                 address,
                 alignment) +
          (current != nullptr ? where(*current) : "an asynchronous copy") + " at " +
          describe_pc(pc));
  }
  return cta.window + address;
}

}  // namespace emu
