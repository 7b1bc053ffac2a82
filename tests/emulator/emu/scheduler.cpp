// SPDX-License-Identifier: Apache-2.0
//
// Runs the threads of a group one at a time, in an order drawn from the seed, until all have exited
// or something is wrong.
#include "emu/core.h"
#include "emu/device.h"
#include "emu/report.h"
#include "emu/shadow.h"

#include <algorithm>
#include <map>
#include <thread>

thread_local emu::Index3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

thread_local Thread* current = nullptr;
thread_local Group* running = nullptr;

namespace {

struct GroupFault {};

// A group in which this many polls failed in a row, with nothing else to run, does not move again.
constexpr unsigned kSpinLimit = 100000;
constexpr unsigned kPatience = 100;

void leave(Thread& t) { Fiber::switch_to(t.fiber, t.cta->group->scheduler); }

void add_lanes(std::string& text, uint32_t lanes) {
  if (lanes == 0xffffffffu) {
    text += "all lanes";
    return;
  }
  text += "lane";
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    if ((lanes >> lane & 1) == 0) {
      continue;
    }
    int last = lane;
    while (last + 1 < kWarpThreads && (lanes >> (last + 1) & 1) != 0) {
      ++last;
    }
    text += last > lane ? format(" %d-%d", lane, last) : format(" %d", lane);
    lane = last;
  }
}

// "warp 2" or "warps 0-1, 4"
std::string warp_list(const std::vector<unsigned>& warps) {
  std::string text = warps.size() > 1 ? "warps " : "warp ";
  for (size_t i = 0; i < warps.size(); ++i) {
    size_t last = i;
    while (last + 1 < warps.size() && warps[last + 1] == warps[last] + 1) {
      ++last;
    }
    text += i == 0 ? "" : ", ";
    text += last > i ? format("%u-%u", warps[i], warps[last]) : format("%u", warps[i]);
    i = last;
  }
  return text;
}

// What every warp waits for, warps in the same state on one line.
std::string waiting_report(const Group& group) {
  std::vector<std::pair<std::string, std::vector<std::string>>> lines;
  std::map<Pc, std::string> places;
  for (const Cta& cta : group.ctas) {
    const auto warps = static_cast<unsigned>(cta.warps.size());
    std::vector<std::pair<std::string, std::vector<unsigned>>> of_block;
    for (unsigned w = 0; w < warps; ++w) {
      std::map<std::string, uint32_t> states;
      for (const Thread* t : cta.threads) {
        if (t->warp() != w) {
          continue;
        }
        std::string state;
        if (t->done) {
          state = "exited";
        } else if (t->wait.what == nullptr) {
          state = "can run";
        } else {
          auto [place, added] = places.try_emplace(t->wait.pc);
          if (added) {
            place->second = describe_pc(t->wait.pc);
          }
          const Wait& wait = t->wait;
          state = format(wait.what, wait.a, wait.b, wait.c) + " at " + place->second;
        }
        states[state] |= 1u << t->lane();
      }
      std::string text;
      for (const auto& [state, lanes] : states) {
        text += text.empty() ? "" : "; ";
        add_lanes(text, lanes);
        text += ": " + state;
      }
      const auto same =
          std::find_if(of_block.begin(), of_block.end(), [&](auto& l) { return l.first == text; });
      if (same == of_block.end()) {
        of_block.push_back({text, {w}});
      } else {
        same->second.push_back(w);
      }
    }
    for (const auto& [text, of_text] : of_block) {
      const Index3& b = cta.index;
      const std::string name = format("block (%u,%u,%u) ", b.x, b.y, b.z) + warp_list(of_text);
      const auto same =
          std::find_if(lines.begin(), lines.end(), [&](auto& l) { return l.first == text; });
      if (same == lines.end()) {
        lines.push_back({text, {name}});
      } else {
        same->second.push_back(name);
      }
    }
  }
  std::string report;
  for (const auto& [text, names] : lines) {
    for (const std::string& name : names) {
      report += (&name == &names.front() ? "\n  " : ", ") + name;
    }
    report += " - " + text;
  }
  for (const Cta& cta : group.ctas) {
    for (int id = 0; id < 16; ++id) {
      if (const Barrier& b = cta.barriers[id]; b.arrived != 0) {
        report +=
            format("\n  barrier %d: %u of %u threads have arrived", id, b.arrived, b.expected);
        if (const size_t exited = cta.threads.size() - cta.live; exited != 0) {
          report += format("; unbalanced: %zu threads of the block have exited", exited);
        }
      }
    }
    for (const auto& [address, m] : cta.mbarriers) {
      if (!m.waiting.empty()) {
        report += format(
            "\n  mbarrier at shared address %u: phase %u, %lld of %u arrivals and %lld "
            "transaction bytes outstanding",
            address,
            m.phase,
            static_cast<long long>(m.pending),
            m.count,
            static_cast<long long>(m.tx_bytes));
      }
    }
  }
  return report;
}

[[noreturn]] void deadlock(const Group& group, const char* kind) {
  fault(std::string(kind) + ": no thread can go on" + waiting_report(group));
}

// A rendezvous is complete when all lanes of its mask that have not exited are there.
void complete_if_all_came(Cta& cta, unsigned w, size_t index) {
  Warp& warp = cta.warps[w];
  const uint32_t needed = warp.meeting[index].mask & warp.live;
  if ((warp.meeting[index].arrived & needed) != needed) {
    return;
  }
  const Rendezvous r = warp.meeting[index];
  if (r.all_lanes && r.arrived != r.mask) {
    fault(format("%s needs all 32 lanes of the warp, but some exited without it, ", r.what) +
          where(*current));
  }
  warp.meeting.erase(warp.meeting.begin() + static_cast<std::ptrdiff_t>(index));
  r.run(r.slots, r.arrived);
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    Thread* t = (r.arrived >> lane & 1) != 0 ? cta.threads[w * kWarpThreads + lane] : nullptr;
    if (t != nullptr && t != current) {
      wake(t);
    }
  }
  progress();
}

void check_nothing_is_left(const Thread& t) {
  const auto check_copies = [&](const std::vector<CopyAsync>& copies) {
    if (!copies.empty()) {
      fault(where(t) + " exits with cp.async copies that it has not waited for; the first is at " +
            describe_pc(copies.front().pc));
    }
  };
  for (const Thread::CopyGroup& group : t.copy_groups) {
    for (const auto& batch : group) {
      if (!batch->on_mbarrier) {
        check_copies(batch->copies);
      }
    }
  }
  check_copies(t.open_copies);
  for (const auto& group : t.store_groups) {
    for (const auto& store : group) {
      if (!store->read) {
        fault(where(t) +
              " exits while a bulk store may still read the block's shared memory; wait with "
              "bulk_wait_read");
      }
    }
  }
  if (!t.open_stores.empty()) {
    fault(where(t) + " exits with a bulk store that was never committed");
  }
  check_wgmma_done(t);
}

// The block has exited by now; in this schedule its peers had done with it, in others perhaps not.
void check_peers_are_done(const Cta& cta) {
  for (const auto& [agent, last] : cta.touched_by) {
    if (cta.exits[agent] < last.first) {
      const Index3& b = cta.index;
      fault(format("block (%u,%u,%u) exits without having waited for a peer that can reach its "
                   "shared memory, ",
                   b.x,
                   b.y,
                   b.z) +
            where(*cta.group->threads[agent]) + " at " + describe_pc(last.second));
    }
  }
}

void exit_thread() {
  Thread& t = *current;
  check_nothing_is_left(t);
  t.done = true;
  t.wait = {};
  Cta& cta = *t.cta;
  Group& group = *cta.group;
  --cta.live;
  --group.live;
  const unsigned w = t.warp();
  Warp& warp = cta.warps[w];
  warp.live &= ~(1u << t.lane());
  for (size_t i = warp.meeting.size(); i-- > 0;) {
    if ((warp.meeting[i].mask >> t.lane() & 1) != 0) {
      complete_if_all_came(cta, w, i);
    }
  }
  if (cta.live == 0 && cta.pending_async != 0) {
    const Index3& b = cta.index;
    fault(
        format("block (%u,%u,%u) has exited while %u asynchronous copies to or from its shared "
               "memory were in flight",
               b.x,
               b.y,
               b.z,
               cta.pending_async));
  }
  if (checked()) {
    cta.exits.join(t.clock);
    if (cta.live == 0) {
      check_peers_are_done(cta);
    }
  }
  progress();
  leave(t);
}

void thread_entry() {
  Fiber::entered();
  running->launch->body();
  exit_thread();
}

void land_one(Group& group) {
  const size_t pick = group.next_random() % group.async.size();
  const Async async = std::move(group.async[pick]);
  group.async[pick] = std::move(group.async.back());
  group.async.pop_back();
  const void* address = nullptr;
  if (!land_safely(async, address)) {
    fault(format("an asynchronous copy touches unmapped memory at %p; it was issued at ", address) +
          describe_pc(async.pc));
  }
  progress();
}

Thread* pick(Group& group) {
  const size_t count = group.ready.size();
  // 32 random bits times the count, without a division: this runs at every switch.
  const size_t at =
      group.chance(group.random_order) ? (group.next_random() >> 32) * count >> 32 : count - 1;
  Thread* next = group.ready[at];
  group.ready[at] = group.ready.back();
  group.ready.pop_back();
  return next;
}

// A meeting of all blocks of a cluster or grid.
void arrive(ClusterState& state, unsigned expected) {
  release(state.arriving, state.arriving_fenced);
  if (++state.arrived < expected) {
    return;
  }
  state.arrived = 0;
  ++state.generation;
  state.completed = state.arriving;
  state.completed_fenced = state.arriving_fenced;
  state.arriving.clear();
  state.arriving_fenced.clear();
  for (Thread* t : state.waiting) {
    acquire(*t, state.completed, state.completed_fenced);
    wake(t);
  }
  state.waiting.clear();
  progress();
}

}  // namespace

uint64_t Group::next_random() {  // splitmix64
  uint64_t z = random += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

void fault(const std::string& text) {
  if (running->fault.empty()) {
    running->fault = text;
  }
  if (current == nullptr) {
    throw GroupFault{};
  }
  leave(*current);  // for ever: the scheduler stops at the first fault
  std::abort();
}

void run_group(Group& group) {
  running = &group;
  group.live = static_cast<unsigned>(group.used);
  group.ready.clear();
  for (size_t i = group.used; i-- > 0;) {
    Thread& t = *group.threads[i];
    t.fiber.prepare(t.stack, &thread_entry);
    group.ready.push_back(&t);
  }
  // Looked up once: thread-local storage of a loaded library costs a call per access.
  Thread*& thread = current;
  Index3& thread_index = threadIdx;
  Index3& block_index = blockIdx;
  blockDim = group.launch->block;
  gridDim = group.launch->grid;
  try {
    while (group.live > 0 && group.fault.empty()) {
      if (group.ready.empty() && group.async.empty()) {
        deadlock(group, "deadlock");
      }
      const bool idle = group.ready.empty() || group.idle_spins > 4 * group.ready.size();
      if (!group.async.empty() && (idle || group.next_random() % group.eager_async == 0)) {
        land_one(group);
        continue;
      }
      if (group.idle_spins > kSpinLimit) {
        // Perhaps a block on another core is about to set the flag.
        if (group.launch->running_groups < 2 || group.idle_spins > kPatience * kSpinLimit) {
          deadlock(group, "livelock, all threads that are not blocked only poll");
        }
        std::this_thread::yield();
      }
      Thread* const next = pick(group);
      thread = next;
      thread_index = next->index;
      block_index = next->cta->index;
      Fiber::switch_to(group.scheduler, next->fiber);
      thread = nullptr;
    }
  } catch (const GroupFault&) {
  }
  current = nullptr;
  group.async.clear();
  running = nullptr;
}

// ---- blocking -----------------------------------------------------------------------------------

void block(const Wait& wait) {
  Thread& t = *current;
  t.wait = wait;
  leave(t);
}

void wake(Thread* thread) {
  thread->wait = {};
  Group& group = *thread->cta->group;
  group.ready.push_back(thread);
  group.idle_spins = 0;
}

void preempt() {
  Thread& t = *current;
  Group& group = *t.cta->group;
  if (group.chance(group.preempt_odds)) {
    group.ready.push_back(&t);
    leave(t);
  }
}

void spin(const Wait& wait) {
  current->wait = wait;
  ++running->idle_spins;
  // In front of the others: with last in, first out it would be picked again at once.
  running->ready.insert(running->ready.begin(), current);
  leave(*current);
  current->wait = {};
}

void progress() { running->idle_spins = 0; }

void start_async(Pc pc, std::function<void()> land) {
  running->async.push_back({pc, std::move(land)});
}

// ---- happened-before ----------------------------------------------------------------------------

void release(Clock& clock, Clock& fenced) {
  if (!checked()) {
    return;
  }
  Thread& t = *current;
  clock.join(t.clock);
  clock.raise(t.agent, t.epoch++);
  fenced.join(t.fenced);
}

void acquire(Thread& thread, const Clock& clock, const Clock& fenced) {
  if (!checked()) {
    return;
  }
  thread.clock.join(clock);
  thread.fenced.join(fenced);
}

void acquire_all(Thread& thread, const Clock& clock, const Clock& fenced) {
  thread.clock.share(clock);
  thread.fenced.share(fenced);
}

// ---- warps --------------------------------------------------------------------------------------

void meet(const char* what,
          uint32_t mask,
          void* slot,
          void (*run)(void* const* slots, uint32_t mask),
          Pc pc,
          bool all_lanes) {
  Thread& t = *current;
  Cta& cta = *t.cta;
  Warp& warp = cta.warps[t.warp()];
  const unsigned lane = t.lane();
  if ((mask >> lane & 1) == 0) {
    fault(format("%s by lane %u, which its mask %#x does not name, %s at ",
                 what,
                 lane,
                 mask,
                 where(t).c_str()) +
          describe_pc(pc));
  }
  size_t index = 0;
  while (index < warp.meeting.size()) {
    const Rendezvous& r = warp.meeting[index];
    if (r.what == what && r.mask == mask && (r.arrived >> lane & 1) == 0) {
      break;
    }
    ++index;
  }
  if (index == warp.meeting.size()) {
    warp.meeting.push_back({});
    warp.meeting.back().what = what;
    warp.meeting.back().mask = mask;
    warp.meeting.back().all_lanes = all_lanes;
  }
  Rendezvous& r = warp.meeting[index];
  r.run = run;
  r.arrived |= 1u << lane;
  r.slots[lane] = slot;
  const uint32_t needed = mask & warp.live;
  if ((r.arrived & needed) == needed) {
    complete_if_all_came(cta, t.warp(), index);
    return;
  }
  block({"%s of its warp", reinterpret_cast<long long>(what), 0, 0, pc});
}

void meet_all(const char* what, void* slot, void (*run)(void* const* slots, uint32_t mask), Pc pc) {
  const Thread& t = *current;
  if (t.cta->warps[t.warp()].live != 0xffffffffu) {
    fault(format("%s needs all 32 lanes of the warp, but some have exited or never were, ", what) +
          where(t) + " at " + describe_pc(pc));
  }
  meet(what, 0xffffffffu, slot, run, pc, true);
}

// ---- blocks -------------------------------------------------------------------------------------

void barrier(int id, unsigned threads, bool wait, bool predicate, Pc pc) {
  Thread& t = *current;
  if (id < 0 || id > 15) {
    fault(format("barrier %d: a block has barriers 0 to 15, ", id) + where(t) + " at " +
          describe_pc(pc));
  }
  if (id != 0 && (threads % kWarpThreads != 0 || threads == 0)) {
    fault(format("barrier %d for %u threads: expected a multiple of 32, ", id, threads) + where(t) +
          " at " + describe_pc(pc));
  }
  Barrier& b = t.cta->barriers[id];
  if (b.arrived == 0) {
    b.expected = threads;
    b.first = pc;
    b.votes = 0;
    b.clock.clear();
    b.fenced.clear();
  } else if (b.expected != threads) {
    fault(format("barrier %d: %s arrives expecting %u threads at ", id, where(t).c_str(), threads) +
          describe_pc(pc) + format(", others expect %u at ", b.expected) + describe_pc(b.first));
  }
  b.votes += predicate ? 1 : 0;
  release(b.clock, b.fenced);
  if (++b.arrived < b.expected) {
    if (wait) {
      b.waiting.push_back(&t);
      block({"barrier %lld", id, 0, 0, pc});
    } else {
      preempt();
    }
    return;
  }
  b.arrived = 0;
  for (Thread* other : b.waiting) {
    acquire_all(*other, b.clock, b.fenced);
    other->votes = b.votes;
    wake(other);
  }
  b.waiting.clear();
  if (wait) {
    acquire_all(t, b.clock, b.fenced);
    t.votes = b.votes;
  }
  progress();
  preempt();
}

void cluster_arrive(Pc pc) {
  Thread& t = *current;
  if (t.arrived_at_cluster) {
    fault(where(t) + " arrives at the cluster barrier twice without waiting, at " +
          describe_pc(pc));
  }
  t.arrived_at_cluster = true;
  Group& group = *t.cta->group;
  ClusterState& state = group.clusters[t.cta->cluster];
  t.cluster_generation = state.generation;
  arrive(state, group.launch->cluster_ctas() * group.launch->block_threads());
  preempt();
}

void cluster_wait(Pc pc) {
  Thread& t = *current;
  if (!t.arrived_at_cluster) {
    fault(where(t) + " waits at the cluster barrier without having arrived, at " + describe_pc(pc));
  }
  t.arrived_at_cluster = false;
  ClusterState& state = t.cta->group->clusters[t.cta->cluster];
  if (t.cluster_generation == state.generation) {
    state.waiting.push_back(&t);
    block({"the cluster barrier", 0, 0, 0, pc});
  } else {
    acquire(t, state.completed, state.completed_fenced);
  }
}

void grid_barrier(Pc pc) {
  Thread& t = *current;
  Group& group = *t.cta->group;
  if (!group.launch->cooperative) {
    fault(where(t) + " waits for the grid in a launch that is not cooperative, at " +
          describe_pc(pc));
  }
  ClusterState& state = group.grid;
  const unsigned generation = state.generation;
  arrive(state, static_cast<unsigned>(group.used));
  if (state.generation == generation) {
    state.waiting.push_back(&t);
    block({"the grid barrier", 0, 0, 0, pc});
  } else {
    acquire(t, state.completed, state.completed_fenced);
  }
}

}  // namespace emu
