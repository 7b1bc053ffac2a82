// SPDX-License-Identifier: Apache-2.0
//
// What happens beside the threads: cp.async, mbarriers, TMA and bulk copies, clusters.
#include "emu/device.h"
#include "emu/formats.h"
#include "emu/instructions.h"
#include "emu/report.h"
#include "emu/shadow.h"
#include "emu/tensor_map.h"

#include <algorithm>
#include <cstring>

namespace emu {
namespace {

// In the eight bytes of an mbarrier, so that overwriting it is noticed.
constexpr uint64_t kCookie = 0x7265697272616262u;
constexpr uint32_t kMaxArrivals = (1u << 20) - 1;

// The mbarrier at an address of `cta`, after a look at its bytes.
// `issued`: by whom, if no thread runs now.
MBarrier& mbarrier_at(
    Cta& cta, uint32_t bar, const char* what, Pc pc, const Issue* issued = nullptr) {
  const std::byte* bytes = shared_bytes(cta, bar, 8, 8, what, pc);
  const auto found = cta.mbarriers.find(bar);
  if (found == cta.mbarriers.end() || std::memcmp(bytes, &kCookie, 8) != 0) {
    fault(
        format("%s on shared address %u, which %s, ",
               what,
               bar,
               found == cta.mbarriers.end() ? "is no initialised mbarrier"
                                            : "was an mbarrier until its bytes were overwritten") +
        (current != nullptr ? where(*current) : "an asynchronous copy") + " at " + describe_pc(pc));
  }
  MBarrier& m = found->second;
  // Later atomics may have taken the place of the initialisation in the shadow.
  const auto knows_of_it = [&] {
    return current != nullptr
               ? m.init_agent == current->agent || current->clock[m.init_agent] >= m.init_epoch
               : issued == nullptr || issued->clock[m.init_agent] >= m.init_epoch;
  };
  if (checked() && !knows_of_it()) {
    fault(format("race on shared memory at address %u: ", bar) + what + " by " +
          (current != nullptr ? where(*current) : issued->who) + " at " + describe_pc(pc) +
          " on an mbarrier, and its initialisation at " + describe_pc(m.init_pc) +
          ", with nothing that orders the two");
  }
  if (current != nullptr) {
    observe(cta, bar, 8, Access::kAtomic, pc);
  }
  return m;
}

void complete_phase(MBarrier& m) {
  if (m.pending != 0 || m.tx_bytes != 0) {
    return;
  }
  ++m.phase;
  m.pending = m.count;
  m.completed.join(m.arriving);
  m.completed_fenced.join(m.arriving_fenced);
  m.arriving.clear();
  m.arriving_fenced.clear();
  if (checked()) {
    m.completed.set(m.agent, m.phase);
  }
  std::vector<Thread*> waiting;
  waiting.swap(m.waiting);
  // Whoever waits, waits for the parity of the phase that is now over.
  for (Thread* t : waiting) {
    acquire(*t, m.completed, m.completed_fenced);
    wake(t);
  }
  progress();
}

void arrive(MBarrier& m, uint32_t bar, Pc pc) {
  if (m.pending == 0) {
    fault(format("too many arrivals at the mbarrier at shared address %u: all %u of phase %u have "
                 "come, and %lld transaction bytes are outstanding, ",
                 bar,
                 m.count,
                 m.phase,
                 static_cast<long long>(m.tx_bytes)) +
          (current != nullptr ? where(*current) : "a cp.async") + " at " + describe_pc(pc));
  }
  --m.pending;
  if (current != nullptr) {
    release(m.arriving, m.arriving_fenced);
  }
  complete_phase(m);
}

void complete_bytes(Cta& cta, uint32_t bar, uint32_t bytes, const Issue& issued) {
  MBarrier& m = mbarrier_at(cta, bar, "completion of a copy", issued.pc, &issued);
  m.tx_bytes -= bytes;
  if (checked()) {
    m.arriving.join(issued.clock);
    m.arriving_fenced.join(issued.fenced);
  }
  if (m.pending == 0 && m.tx_bytes < 0) {
    fault(format("the mbarrier at shared address %u received %lld bytes more than expect_tx "
                 "announced in phase %u, by the copy at ",
                 bar,
                 static_cast<long long>(-m.tx_bytes),
                 m.phase) +
          describe_pc(issued.pc));
  }
  complete_phase(m);
}

bool passed(const MBarrier& m, uint32_t parity) { return (m.phase & 1) != parity; }

// A block that asynchronous copies and its peers may still touch.
void check_alive(const Cta& cta, const char* what, Pc pc) {
  if (cta.live == 0) {
    const Index3& b = cta.index;
    fault(format("%s touches the shared memory of block (%u,%u,%u) of the cluster, which has "
                 "exited; no block may exit while a peer can reach it, at ",
                 what,
                 b.x,
                 b.y,
                 b.z) +
          describe_pc(pc));
  }
}

std::vector<Cta*> receivers(uint16_t mask, Pc pc) {
  Cta& own = *current->cta;
  if (mask == 0) {
    return {&own};
  }
  Group& group = *own.group;
  const unsigned size = group.launch->cluster_ctas();
  std::vector<Cta*> ctas;
  for (unsigned rank = 0; rank < 16; ++rank) {
    if ((mask >> rank & 1) == 0) {
      continue;
    }
    if (rank >= size) {
      fault(format("multicast mask %#x names block %u of a cluster of %u, ", mask, rank, size) +
            where(*current) + " at " + describe_pc(pc));
    }
    ctas.push_back(&group.ctas[own.cluster * size + rank]);
  }
  return ctas;
}

// Null `from` leaves the bytes to the caller.
std::byte* write_shared(Cta& cta,
                        uint32_t address,
                        const void* from,
                        uint32_t bytes,
                        const Issue& issued,
                        const MBarrier* m,
                        bool async_proxy = true) {
  std::byte* to = shared_bytes(cta, address, bytes, 1, "asynchronous write", issued.pc);
  if (checked()) {
    cta.group->shadow->async_write(
        cta, address, bytes, issued, m->agent, m->phase + 1, async_proxy);
  }
  if (from != nullptr) {
    std::memcpy(to, from, bytes);
  }
  return to;
}

const MBarrier* find_mbarrier(Cta& cta, uint32_t bar) {
  const auto found = cta.mbarriers.find(bar);
  return found == cta.mbarriers.end() ? nullptr : &found->second;
}

// A copy into shared memory that lands later, whole, and then completes on each receiver's
// mbarrier. fill(cta, mbarrier) writes the bytes.
template <class Fill>
void start_load(const char* what, uint32_t bar, uint32_t bytes, uint16_t mask, Pc pc, Fill fill) {
  const Issue issued = issue(pc);
  for (Cta* cta : receivers(mask, pc)) {
    if (cta == current->cta) {
      mbarrier_at(*cta, bar, what, pc);
    }
    ++cta->pending_async;
    start_async(pc, [=] {
      check_alive(*cta, what, pc);
      mbarrier_at(*cta, bar, what, pc, &issued);
      fill(*cta, *find_mbarrier(*cta, bar), issued);
      --cta->pending_async;
      complete_bytes(*cta, bar, bytes, issued);
    });
  }
  preempt();
}

// A bulk store of the current thread; copy() reads shared memory and writes elsewhere.
template <class Copy>
void start_store(Pc pc, Copy copy) {
  Thread& t = *current;
  Cta* cta = t.cta;
  const Issue issued = issue(pc);
  auto store = std::make_shared<BulkStore>();
  if (checked()) {
    if (t.store_agent == 0) {
      t.store_agent = cta->group->shadow->add_agent("a bulk store of " + where(t));
    }
    store->number = ++t.stores;
  }
  t.open_stores.push_back(store);
  ++cta->pending_async;
  const size_t agent = t.store_agent;
  start_async(pc, [=] {
    copy(*cta, issued, agent, store->number);
    --cta->pending_async;
    store->read = true;
    if (store->waiter != nullptr) {
      wake(store->waiter);
    }
  });
  preempt();
}

const std::byte* read_shared(Cta& cta,
                             uint32_t address,
                             uint32_t bytes,
                             const Issue& issued,
                             size_t agent,
                             uint32_t number) {
  const std::byte* from = shared_bytes(cta, address, bytes, 1, "asynchronous read", issued.pc);
  if (checked()) {
    cta.group->shadow->async_read(cta, address, bytes, issued, agent, number);
  }
  return from;
}

void check_bulk(uint32_t shared, const void* global, uint32_t bytes, const char* what, Pc pc) {
  if (bytes % 16 != 0 || shared % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    fault(format("%s of %u bytes between shared address %u and %p: expected multiples of 16, ",
                 what,
                 bytes,
                 shared,
                 global) +
          where(*current) + " at " + describe_pc(pc));
  }
}

TensorMap checked_map(const CUtensorMap* map,
                      const int* at,
                      int rank,
                      const uint16_t* offsets,
                      uint32_t shared,
                      bool im2col,
                      const char* what,
                      Pc pc) {
  const std::optional<TensorMap> decoded = decode(*map);
  std::string problem = "the tensor map was never encoded, or was changed since";
  if (decoded.has_value()) {
    problem = decoded->rank != rank
                  ? format("the tensor map has rank %d, the instruction %d", decoded->rank, rank)
                  : check_copy(*decoded, at, offsets, shared, im2col);
  }
  if (!problem.empty()) {
    fault(std::string(what) + ": " + problem + ", " + where(*current) + " at " + describe_pc(pc));
  }
  return *decoded;
}

template <class T>
void add_as(std::byte* to, const std::byte* from) {
  T a, b;
  std::memcpy(&a, to, sizeof(T));
  std::memcpy(&b, from, sizeof(T));
  a = static_cast<T>(a + b);
  std::memcpy(to, &a, sizeof(T));
}

void add_elements(CUtensorMapDataType type, std::byte* to, const std::byte* from, uint32_t bytes) {
  const auto half = [&](auto load, auto store) {
    for (uint32_t i = 0; i < bytes; i += 2) {
      uint16_t a, b;
      std::memcpy(&a, to + i, 2);
      std::memcpy(&b, from + i, 2);
      a = store(load(a) + load(b));
      std::memcpy(to + i, &a, 2);
    }
  };
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
      return half(half_to_float, float_to_half);
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return half(bfloat16_to_float, float_to_bfloat16);
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      for (uint32_t i = 0; i < bytes; i += 4) {
        add_as<float>(to + i, from + i);
      }
      return;
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
      for (uint32_t i = 0; i < bytes; i += 4) {
        add_as<uint32_t>(to + i, from + i);
      }
      return;
    default:
      fault(format("tma_reduce_add: no addition for tensor map data type %d",
                   static_cast<int>(type)));
  }
}

}  // namespace

uint32_t shared_address(const void* p) {
  const Thread& t = *current;
  const auto* byte = static_cast<const std::byte*>(p);
  const std::byte* window = t.cta->window;
  if (byte < window || byte > window + t.cta->group->window_stride) {
    fault("shared_address of a pointer outside of the block's dynamic shared memory, " + where(t) +
          " at " + describe_pc(EMU_PC));
  }
  return static_cast<uint32_t>(byte - window);
}

// ---- cp.async -----------------------------------------------------------------------------------

namespace {

void land(Cta& cta, const CopyAsync& c) {
  std::byte* to = shared_bytes(cta, c.dst, c.bytes, c.bytes, "cp.async", c.pc);
  if (c.src_bytes != 0) {
    observe_global(c.src, c.src_bytes, 1, false, c.pc, c.dependency_waited);
    std::memcpy(to, c.src, c.src_bytes);
  }
  std::memset(to + c.src_bytes, 0, c.bytes - c.src_bytes);
}

// Lands copies of one thread, which are known to have landed to whoever knows (agent, epoch).
void land_all(const Thread& t, const std::vector<CopyAsync>& copies, size_t agent, uint32_t epoch) {
  Issue issued;
  const CopyAsync* before = nullptr;
  for (const CopyAsync& c : copies) {
    land(*t.cta, c);
    if (!checked()) {
      continue;
    }
    if (before == nullptr || before->epoch != c.epoch || !before->clock.is_shared_with(c.clock)) {
      issued = {c.clock, {}, c.pc, where(t), true};
      issued.clock.raise(t.agent, c.epoch);
    }
    before = &c;
    issued.pc = c.pc;
    t.cta->group->shadow->async_write(*t.cta, c.dst, c.bytes, issued, agent, epoch, false);
  }
}

void land_batch(const Thread& t, CopyBatch& batch, size_t agent, uint32_t epoch) {
  if (batch.landed) {
    return;
  }
  land_all(t, batch.copies, agent, epoch);
  batch.landed = true;
  batch.agent = agent;
  batch.epoch = epoch;
}

// Makes the copies since the last cut a batch of the open group.
void cut_batch(Thread& t) {
  if (!t.open_copies.empty()) {
    t.open_batches.push_back(std::make_shared<CopyBatch>());
    t.open_batches.back()->copies.swap(t.open_copies);
  }
}

}  // namespace

void cp_async(uint32_t dst, const void* src, uint32_t bytes, uint32_t src_bytes) {
  const Pc pc = EMU_PC;
  Thread& t = *current;
  if (src_bytes > bytes) {
    fault(format("cp.async of %u bytes with a source of %u, ", bytes, src_bytes) + where(t) +
          " at " + describe_pc(pc));
  }
  shared_bytes(*t.cta, dst, bytes, bytes, "cp.async", pc);
  if (reinterpret_cast<uintptr_t>(src) % bytes != 0) {
    observe_global(src, 1, bytes, false, pc, true);  // says that it is misaligned
  }
  t.open_copies.push_back(
      {dst, src, bytes, src_bytes, pc, t.waited_for_grid_dependency, t.clock, t.epoch});
}

void cp_async_commit() {
  Thread& t = *current;
  cut_batch(t);
  t.copy_groups.push_back(std::move(t.open_batches));
  t.open_batches.clear();
  ++t.epoch;  // what it reads from now on is not before these copies
  preempt();
}

void cp_async_wait(int pending) {
  Thread& t = *current;
  const auto land_group = [&](const Thread::CopyGroup& group) {
    for (const auto& batch : group) {
      land_batch(t, *batch, t.agent, t.epoch);
      if (batch->agent != t.agent) {
        t.clock.raise(batch->agent, batch->epoch);
      }
    }
  };
  while (static_cast<int>(t.copy_groups.size()) > std::max(pending, 0)) {
    land_group(t.copy_groups.front());
    t.copy_groups.pop_front();
  }
  if (pending < 0) {
    cut_batch(t);
    land_group(t.open_batches);
    t.open_batches.clear();
  }
}

void cp_async_mbarrier_arrive(uint32_t bar) {
  const Pc pc = EMU_PC;
  Thread& t = *current;
  Cta* cta = t.cta;
  mbarrier_at(*cta, bar, "cp.async.mbarrier.arrive", pc);
  cut_batch(t);
  Thread::CopyGroup batches = t.open_batches;
  for (const Thread::CopyGroup& group : t.copy_groups) {
    batches.insert(batches.end(), group.begin(), group.end());
  }
  for (const auto& batch : batches) {
    batch->on_mbarrier = true;
  }
  const Issue issued = issue(pc);
  const Thread* thread = &t;
  ++cta->pending_async;
  start_async(pc, [=] {
    MBarrier& m = mbarrier_at(*cta, bar, "cp.async.mbarrier.arrive", pc, &issued);
    for (const auto& batch : batches) {
      land_batch(*thread, *batch, m.agent, m.phase + 1);
      if (checked() && batch->agent != m.agent) {
        m.arriving.raise(batch->agent, batch->epoch);
      }
    }
    if (checked()) {
      m.arriving.join(issued.clock);
      m.arriving_fenced.join(issued.fenced);
    }
    --cta->pending_async;
    arrive(m, bar, pc);
  });
  preempt();
}

// ---- mbarrier -----------------------------------------------------------------------------------

void mbarrier_init(uint32_t bar, uint32_t count) {
  const Pc pc = EMU_PC;
  Cta& cta = *current->cta;
  std::byte* bytes = shared_bytes(cta, bar, 8, 8, "mbarrier.init", pc);
  if (count == 0 || count > kMaxArrivals) {
    fault(format("mbarrier.init with count %u: expected 1 to 2^20-1, ", count) + where(*current) +
          " at " + describe_pc(pc));
  }
  if (cta.mbarriers.contains(bar)) {
    fault(format("mbarrier.init on shared address %u, which is an mbarrier already: invalidate it "
                 "first, ",
                 bar) +
          where(*current) + " at " + describe_pc(pc));
  }
  observe(cta, bar, 8, Access::kWrite, pc);
  MBarrier& m = cta.mbarriers[bar];
  m.count = count;
  m.pending = count;
  m.init_agent = current->agent;
  m.init_epoch = current->epoch;
  m.init_pc = pc;
  if (checked()) {
    m.agent = cta.group->shadow->add_agent(
        format("an asynchronous copy that completes on the mbarrier at shared address %u", bar));
  }
  std::memcpy(bytes, &kCookie, 8);
}

void mbarrier_invalidate(uint32_t bar) {
  Cta& cta = *current->cta;
  mbarrier_at(cta, bar, "mbarrier.inval", EMU_PC);
  std::memset(cta.window + bar, kPoison, 8);
  cta.mbarriers.erase(bar);
}

void mbarrier_arrive(uint32_t bar) {
  const Pc pc = EMU_PC;
  arrive(mbarrier_at(*current->cta, bar, "mbarrier.arrive", pc), bar, pc);
  preempt();
}

namespace {

void expect(MBarrier& m, uint32_t bytes, Pc pc) {
  m.tx_bytes += bytes;
  if (m.tx_bytes > kMaxArrivals) {
    fault(format("mbarrier.expect_tx: %lld bytes outstanding, at most 2^20-1 can be counted, ",
                 static_cast<long long>(m.tx_bytes)) +
          where(*current) + " at " + describe_pc(pc));
  }
}

void check_parity(uint32_t parity, Pc pc) {
  if (parity > 1) {
    fault(format("mbarrier wait for parity %u: expected 0 or 1, ", parity) + where(*current) +
          " at " + describe_pc(pc));
  }
}

}  // namespace

void mbarrier_expect_tx(uint32_t bar, uint32_t bytes) {
  const Pc pc = EMU_PC;
  expect(mbarrier_at(*current->cta, bar, "mbarrier.expect_tx", pc), bytes, pc);
}

void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  const Pc pc = EMU_PC;
  MBarrier& m = mbarrier_at(*current->cta, bar, "mbarrier.arrive.expect_tx", pc);
  expect(m, bytes, pc);
  arrive(m, bar, pc);
  preempt();
}

bool mbarrier_test_wait(uint32_t bar, uint32_t parity) {
  const Pc pc = EMU_PC;
  MBarrier& m = mbarrier_at(*current->cta, bar, "mbarrier.test_wait", pc);
  check_parity(parity, pc);
  if (!passed(m, parity)) {
    spin({"a poll of the mbarrier at shared address %lld, parity %lld", bar, parity, 0, pc});
    return false;
  }
  acquire(*current, m.completed, m.completed_fenced);
  return true;
}

void mbarrier_wait(uint32_t bar, uint32_t parity) {
  const Pc pc = EMU_PC;
  MBarrier& m = mbarrier_at(*current->cta, bar, "mbarrier wait", pc);
  check_parity(parity, pc);
  if (passed(m, parity)) {
    acquire(*current, m.completed, m.completed_fenced);
    return;
  }
  m.waiting.push_back(current);
  block({"the mbarrier at shared address %lld, parity %lld", bar, parity, 0, pc});
}

void mbarrier_arrive_cluster(uint32_t cluster_bar) {
  const Pc pc = EMU_PC;
  const auto [cta, bar] = cluster_address(cluster_bar, "mbarrier.arrive.shared::cluster", pc);
  arrive(mbarrier_at(*cta, bar, "mbarrier.arrive.shared::cluster", pc), bar, pc);
  preempt();
}

void fence_proxy_async() {
  if (checked()) {
    Thread& t = *current;
    t.fenced.join(t.clock);
    t.fenced.raise(t.agent, t.epoch++);  // later writes are not covered
  }
  preempt();
}

// ---- TMA and bulk copies ------------------------------------------------------------------------

void prefetch_tensor_map(const CUtensorMap* map) {
  if (!decode(*map).has_value()) {
    fault("prefetch of a tensor map that was never encoded, " + where(*current) + " at " +
          describe_pc(EMU_PC));
  }
}

void tma_load(uint32_t dst,
              const CUtensorMap* map,
              uint32_t bar,
              const int* at,
              int rank,
              const uint16_t* im2col_offsets,
              uint16_t mask) {
  const Pc pc = EMU_PC;
  const TensorMap m =
      checked_map(map, at, rank, im2col_offsets, dst, im2col_offsets != nullptr, "TMA load", pc);
  struct Position {
    int at[5];
    uint16_t offsets[3];
  } p{};
  std::copy(at, at + rank, p.at);
  if (im2col_offsets != nullptr) {
    std::copy(im2col_offsets, im2col_offsets + rank - 2, p.offsets);
  }
  start_load("a TMA load",
             bar,
             box_bytes(m),
             mask,
             pc,
             [=](Cta& cta, const MBarrier& barrier, const Issue& issued) {
               for_each_run(
                   m,
                   p.at,
                   im2col_offsets != nullptr ? p.offsets : nullptr,
                   dst,
                   [&](uint32_t address, const std::byte* global, uint32_t bytes) {
                     if (global != nullptr) {
                       observe_global(global, bytes, 1, false, issued.pc, issued.dependency_waited);
                       write_shared(cta, address, global, bytes, issued, &barrier);
                       return;
                     }
                     fill_outside(
                         m, write_shared(cta, address, nullptr, bytes, issued, &barrier), bytes);
                   });
             });
}

void tma_store(const CUtensorMap* map, const int* at, int rank, uint32_t src, bool add) {
  const Pc pc = EMU_PC;
  const TensorMap m = checked_map(map, at, rank, nullptr, src, false, "TMA store", pc);
  struct Position {
    int at[5];
  } p{};
  std::copy(at, at + rank, p.at);
  start_store(pc, [=](Cta& cta, const Issue& issued, size_t agent, uint32_t number) {
    for_each_run(
        m, p.at, nullptr, src, [&](uint32_t address, const std::byte* global, uint32_t bytes) {
          const std::byte* from = read_shared(cta, address, bytes, issued, agent, number);
          if (global == nullptr) {
            return;  // outside of the tensor: dropped
          }
          auto* to = const_cast<std::byte*>(global);
          observe_global(to, bytes, 1, true, issued.pc, issued.dependency_waited);
          if (add) {
            add_elements(m.data_type, to, from, bytes);
          } else {
            std::memcpy(to, from, bytes);
          }
        });
  });
}

void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar, uint16_t mask) {
  const Pc pc = EMU_PC;
  check_bulk(dst, src, bytes, "bulk load", pc);
  start_load("a bulk load",
             bar,
             bytes,
             mask,
             pc,
             [=](Cta& cta, const MBarrier& barrier, const Issue& issued) {
               observe_global(src, bytes, 16, false, issued.pc, issued.dependency_waited);
               write_shared(cta, dst, src, bytes, issued, &barrier);
             });
}

void bulk_store(void* dst, uint32_t src, uint32_t bytes, bool add_f32) {
  const Pc pc = EMU_PC;
  check_bulk(src, dst, bytes, "bulk store", pc);
  start_store(pc, [=](Cta& cta, const Issue& issued, size_t agent, uint32_t number) {
    const std::byte* from = read_shared(cta, src, bytes, issued, agent, number);
    observe_global(dst, bytes, 16, true, issued.pc, issued.dependency_waited);
    auto* to = static_cast<std::byte*>(dst);
    if (add_f32) {
      add_elements(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, to, from, bytes);
    } else {
      std::memcpy(to, from, bytes);
    }
  });
}

void bulk_copy_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar) {
  const Pc pc = EMU_PC;
  const ClusterAddress to = cluster_address(dst, "bulk copy to a cluster", pc);
  const ClusterAddress at = cluster_address(bar, "bulk copy to a cluster", pc);
  check_bulk(src, nullptr, bytes, "bulk copy to a cluster", pc);
  if (to.cta != at.cta || to.address % 16 != 0) {
    fault(
        "bulk copy to a cluster: expected the destination, a multiple of 16, and the mbarrier in "
        "the same block, " +
        where(*current) + " at " + describe_pc(pc));
  }
  const Issue issued = issue(pc);
  Cta* from = current->cta;
  ++from->pending_async;
  ++to.cta->pending_async;
  start_async(pc, [=] {
    check_alive(*to.cta, "a bulk copy", pc);
    mbarrier_at(*to.cta, at.address, "bulk copy to a cluster", pc, &issued);
    const MBarrier* m = find_mbarrier(*to.cta, at.address);
    const std::byte* bytes_from = read_shared(*from, src, bytes, issued, m->agent, m->phase + 1);
    write_shared(*to.cta, to.address, bytes_from, bytes, issued, m);
    --from->pending_async;
    --to.cta->pending_async;
    complete_bytes(*to.cta, at.address, bytes, issued);
  });
  preempt();
}

void bulk_commit() {
  Thread& t = *current;
  t.store_groups.push_back(std::move(t.open_stores));
  t.open_stores.clear();
}

void bulk_wait(int pending) {
  const Pc pc = EMU_PC;
  Thread& t = *current;
  while (static_cast<int>(t.store_groups.size()) > pending) {
    for (const auto& store : t.store_groups.front()) {
      if (!store->read) {
        store->waiter = &t;
        block({"a bulk store of its own", 0, 0, 0, pc});
      }
      if (checked()) {
        t.clock.set(t.store_agent, std::max(t.clock[t.store_agent], store->number));
      }
    }
    t.store_groups.pop_front();
  }
}

// ---- clusters -----------------------------------------------------------------------------------

uint32_t cluster_rank() { return current->cta->cluster_rank; }
uint32_t cluster_size() { return current->cta->group->launch->cluster_ctas(); }
void cluster_barrier_arrive() { cluster_arrive(EMU_PC); }
void cluster_barrier_wait() { cluster_wait(EMU_PC); }

uint32_t map_shared(uint32_t address, uint32_t rank) {
  if (rank >= cluster_size() || address >> 24 != 0) {
    fault(format("map_shared of address %u to block %u of a cluster of %u, ",
                 address,
                 rank,
                 cluster_size()) +
          where(*current) + " at " + describe_pc(EMU_PC));
  }
  return address | (rank + 1) << 24;
}

ClusterAddress cluster_address(uint32_t address, const char* what, Pc pc) {
  Cta& own = *current->cta;
  const uint32_t rank = address >> 24;
  if (rank == 0) {
    return {&own, address};
  }
  const unsigned size = own.group->launch->cluster_ctas();
  if (rank > size) {
    fault(format("%s: %#x is no address of this cluster, ", what, address) + where(*current) +
          " at " + describe_pc(pc));
  }
  Cta& cta = own.group->ctas[own.cluster * size + rank - 1];
  check_alive(cta, what, pc);
  if (&cta != &own && checked()) {
    const auto known = [](const Thread* t) { return current->clock[t->agent] != 0; };
    if (std::none_of(cta.threads.begin(), cta.threads.end(), known)) {
      const Index3& b = cta.index;
      fault(format("%s reaches block (%u,%u,%u), which may not have started: wait at the cluster "
                   "barrier first, ",
                   what,
                   b.x,
                   b.y,
                   b.z) +
            where(*current) + " at " + describe_pc(pc));
    }
    cta.touched_by[current->agent] = {current->epoch, pc};
  }
  return {&cta, address & 0xffffff};
}

uint32_t load_shared_cluster(uint32_t address) {
  const Pc pc = EMU_PC;
  const auto [cta, at] = cluster_address(address, "ld.shared::cluster", pc);
  const std::byte* from = shared_bytes(*cta, at, 4, 4, "ld.shared::cluster", pc);
  observe(*cta, at, 4, Access::kRead, pc);
  uint32_t value;
  std::memcpy(&value, from, 4);
  preempt();
  return value;
}

void store_shared_cluster(uint32_t address, uint32_t value) {
  const Pc pc = EMU_PC;
  preempt();
  const auto [cta, at] = cluster_address(address, "st.shared::cluster", pc);
  std::byte* to = shared_bytes(*cta, at, 4, 4, "st.shared::cluster", pc);
  observe(*cta, at, 4, Access::kWrite, pc);
  std::memcpy(to, &value, 4);
}

void store_async(uint32_t address, uint32_t value, uint32_t bar) {
  const Pc pc = EMU_PC;
  const ClusterAddress to = cluster_address(address, "st.async", pc);
  const ClusterAddress at = cluster_address(bar, "st.async", pc);
  if (to.cta != at.cta) {
    fault("st.async: expected the destination and the mbarrier in the same block, " +
          where(*current) + " at " + describe_pc(pc));
  }
  const Issue issued = issue(pc);
  ++to.cta->pending_async;
  start_async(pc, [=] {
    check_alive(*to.cta, "st.async", pc);
    mbarrier_at(*to.cta, at.address, "st.async", pc, &issued);
    write_shared(*to.cta, to.address, &value, 4, issued, find_mbarrier(*to.cta, at.address), false);
    --to.cta->pending_async;
    complete_bytes(*to.cta, at.address, 4, issued);
  });
  preempt();
}

// ---- barriers and launches ----------------------------------------------------------------------

void barrier_sync(int id, int threads) {
  barrier(id, static_cast<unsigned>(threads), true, false, EMU_PC);
}
void barrier_arrive(int id, int threads) {
  barrier(id, static_cast<unsigned>(threads), false, false, EMU_PC);
}

void grid_sync() { grid_barrier(EMU_PC); }

void grid_dependency_wait() { current->waited_for_grid_dependency = true; }

}  // namespace emu
