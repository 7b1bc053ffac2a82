// SPDX-License-Identifier: Apache-2.0
//
// Warpgroup matrix instructions. They are queued when issued and executed warp by warp when that
// warp waits for them: shared memory is read as late as is legal, so overwriting an operand early
// changes the result. While an instruction is in flight its accumulators hold nan, so reading or
// writing them early shows too.
#include "emu/instructions.h"
#include "emu/launch.h"
#include "emu/report.h"
#include "emu/shadow.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <vector>

namespace emu {

// The accumulators of one thread that start at one address.
struct Accumulators {
  std::vector<float> values;  // the true ones, while in flight; what was written, afterwards
  int in_flight = 0;
};

struct WgmmaOp {
  Wgmma spec;
  bool a_in_registers;
  uint64_t a, b;
  std::array<uint32_t, 4> a_registers;
  float* d;
  uint32_t number;  // of its warp's, from 1 on
  Pc pc;
};

struct WgmmaThread {
  using Ops = std::vector<WgmmaOp>;
  Ops open;
  std::deque<Ops> groups;
  bool fenced = false;  // a wgmma.fence since the start or the last wait
  uint32_t issued = 0;
  std::map<float*, Accumulators> accumulators;
  std::vector<Issue> issues;  // of the lane that stands for the warp, by number
};

namespace {

constexpr uint32_t kNan = 0xffffffffu;

std::string whose(Pc pc) { return where(*current) + " at " + describe_pc(pc); }

WgmmaThread& state() {
  Thread& t = *current;
  if (t.wgmma == nullptr) {
    t.wgmma = std::make_shared<WgmmaThread>();
  }
  return *t.wgmma;
}

bool all_nan(const float* d, size_t count) {
  return std::all_of(d, d + count, [](const float& v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits == kNan;
  });
}

// Takes the accumulators into flight.
void take(WgmmaThread& w, const WgmmaOp& op) {
  const size_t count = static_cast<size_t>(op.spec.n) / 2;
  Accumulators& held = w.accumulators[op.d];
  if (held.in_flight == 0) {
    const bool changed = held.values.size() == count && op.spec.scale_d &&
                         std::memcmp(held.values.data(), op.d, 4 * count) != 0;
    if (!w.fenced && (changed || held.values.empty())) {
      fault(format("missing wgmma.fence: the accumulators were %s since the last one, ",
                   held.values.empty() ? "never used" : "written") +
            whose(op.pc));
    }
    held.values.assign(op.d, op.d + count);
    std::memset(op.d, 0xff, 4 * count);
  } else if (held.values.size() != count || !all_nan(op.d, count)) {
    fault("the accumulators of a wgmma in flight were written or used in another shape, " +
          whose(op.pc));
  }
  ++held.in_flight;
}

// Gives them back when the last instruction on them is done.
void give_back(WgmmaThread& w, const WgmmaOp& op, const Thread& t) {
  Accumulators& held = w.accumulators[op.d];
  if (--held.in_flight != 0) {
    return;
  }
  if (!all_nan(op.d, held.values.size())) {
    fault("the accumulators of a wgmma were written while it was in flight, " + where(t) +
          "; it was issued at " + describe_pc(op.pc));
  }
  std::memcpy(op.d, held.values.data(), 4 * held.values.size());
}

void push(WgmmaOp op) {
  Thread& t = *current;
  const size_t first = t.warp() / 4 * kWarpgroupThreads;
  if (t.cta->threads.size() < first + kWarpgroupThreads) {
    fault("wgmma needs a whole warpgroup of 128 threads, " + whose(op.pc));
  }
  if (device().arch != 90) {
    fault(format("wgmma does not exist on sm_%d, ", device().arch) + whose(op.pc));
  }
  WgmmaThread& w = state();
  op.number = ++w.issued;
  take(w, op);
  if (checked() && t.lane() == 0) {
    w.issues.push_back(issue(op.pc));
  }
  w.open.push_back(op);
  preempt();
}

// Bounds, order and proxies of an operand's bytes.
void check_operand(Cta& cta,
                   const WgmmaOp& op,
                   const Descriptor& descriptor,
                   bool is_a,
                   unsigned warp,
                   const Issue& issued,
                   size_t agent) {
  const int extent = is_a ? 64 : op.spec.n;
  const bool mn_major = is_a ? op.spec.trans_a : op.spec.trans_b;
  const int depth_of = depth(op.spec.element);
  const int per_run = 16 / element_bytes(op.spec.element);
  int run = 0;
  operand_rows(
      descriptor,
      op.spec.element,
      extent,
      depth_of,
      mn_major,
      [&](uint32_t address, uint32_t bytes) {
        // A warp reads its own 16 rows of A.
        const int mn = mn_major ? run % (extent / per_run) * per_run : run / (depth_of / per_run);
        ++run;
        if (is_a && mn / 16 != static_cast<int>(warp % 4)) {
          return;
        }
        shared_bytes(cta, address, bytes, 16, is_a ? "wgmma operand A" : "wgmma operand B", op.pc);
        if (checked()) {
          cta.group->shadow->async_read(cta, address, bytes, issued, agent, op.number);
        }
      });
}

void execute(Cta& cta, unsigned warp, std::array<const WgmmaOp*, 32> ops) {
  const WgmmaOp& op = *ops[0];
  const Descriptor b = Descriptor::decode(op.b);
  const Descriptor a = Descriptor::decode(op.a);
  Issue issued;
  size_t agent = 0;
  if (checked()) {
    issued = cta.threads[warp * kWarpThreads]->wgmma->issues[op.number - 1];
    agent = cta.warps[warp].wgmma_agent;
  }
  if (!op.a_in_registers) {
    check_operand(cta, op, a, true, warp, issued, agent);
  }
  check_operand(cta, op, b, false, warp, issued, agent);

  float* d[32];
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const Thread& t = *cta.threads[warp * kWarpThreads + static_cast<unsigned>(lane)];
    d[lane] = t.wgmma->accumulators[ops[static_cast<size_t>(lane)]->d].values.data();
  }
  Wgmma spec = op.spec;
  spec.accumulation = settings().truncate ? Accumulation::kTruncated : Accumulation::kRounded;
  const std::span<const std::byte> window(cta.window, cta.group->window_stride);
  if (op.a_in_registers) {
    const uint32_t* registers[32];
    for (size_t lane = 0; lane < 32; ++lane) {
      registers[lane] = ops[lane]->a_registers.data();
    }
    wgmma_rows(spec, window, registers, b, d);
  } else {
    wgmma_rows(spec, window, a, static_cast<int>(warp % 4), b, d);
  }
}

struct WaitSlot {
  Thread* thread;
  int pending;
  Pc pc;
};

void run_wait(void* const* slots, uint32_t) {
  const auto& first = *static_cast<WaitSlot*>(slots[0]);
  Cta& cta = *first.thread->cta;
  const unsigned warp = first.thread->warp();
  std::array<WgmmaThread*, 32> lanes;
  for (size_t lane = 0; lane < 32; ++lane) {
    WgmmaThread*& w = lanes[lane];
    w = static_cast<WaitSlot*>(slots[lane])->thread->wgmma.get();
    if (w->issued != lanes[0]->issued || w->groups.size() != lanes[0]->groups.size()) {
      fault("wgmma: the lanes of a warp issued different numbers of instructions, " +
            whose(first.pc));
    }
  }
  if (checked() && cta.warps[warp].wgmma_agent == 0) {
    cta.warps[warp].wgmma_agent = cta.group->shadow->add_agent(format(
        "a wgmma of warp %u of block (%u,%u,%u)", warp, cta.index.x, cta.index.y, cta.index.z));
  }
  uint32_t done = 0;
  while (static_cast<int>(lanes[0]->groups.size()) > first.pending) {
    for (size_t i = 0; i < lanes[0]->groups.front().size(); ++i) {
      std::array<const WgmmaOp*, 32> ops;
      for (size_t lane = 0; lane < 32; ++lane) {
        ops[lane] = &lanes[lane]->groups.front()[i];
        if (ops[lane]->a != ops[0]->a || ops[lane]->b != ops[0]->b ||
            ops[lane]->spec.n != ops[0]->spec.n) {
          fault("wgmma: the lanes of a warp issued it with different descriptors or shapes, " +
                whose(ops[0]->pc));
        }
      }
      execute(cta, warp, ops);
      done = ops[0]->number;
      for (size_t lane = 0; lane < 32; ++lane) {
        give_back(*lanes[lane], *ops[lane], *static_cast<WaitSlot*>(slots[lane])->thread);
      }
    }
    for (WgmmaThread* w : lanes) {
      w->groups.pop_front();
    }
  }
  for (size_t lane = 0; lane < 32; ++lane) {
    lanes[lane]->fenced = false;
    if (checked() && done != 0) {
      static_cast<WaitSlot*>(slots[lane])->thread->clock.set(cta.warps[warp].wgmma_agent, done);
    }
  }
}

}  // namespace

void wgmma_fence() { state().fenced = true; }

void wgmma_commit() {
  WgmmaThread& w = state();
  w.groups.push_back(std::move(w.open));
  w.open.clear();
  preempt();
}

void wgmma_wait(int pending) {
  const Pc pc = EMU_PC;
  state();
  WaitSlot slot{current, pending, pc};
  meet_all("wgmma.wait_group", &slot, &run_wait, pc);
}

void wgmma(Element element,
           int n,
           bool trans_a,
           bool trans_b,
           float* d,
           uint64_t a,
           uint64_t b,
           bool scale_d) {
  push({{element, Accumulation::kRounded, n, trans_a, trans_b, scale_d},
        false,
        a,
        b,
        {},
        d,
        0,
        EMU_PC});
}

void wgmma(
    Element element, int n, bool trans_b, float* d, const uint32_t* a, uint64_t b, bool scale_d) {
  push({{element, Accumulation::kRounded, n, false, trans_b, scale_d},
        true,
        0,
        b,
        {a[0], a[1], a[2], a[3]},
        d,
        0,
        EMU_PC});
}

void check_wgmma_done(const Thread& t) {
  if (t.wgmma == nullptr) {
    return;
  }
  const WgmmaThread& w = *t.wgmma;
  const auto check = [&](const WgmmaThread::Ops& ops, const char* what) {
    if (!ops.empty()) {
      fault(where(t) + " exits without having " + what + " the wgmma at " +
            describe_pc(ops.front().pc));
    }
  };
  check(w.open, "committed");
  for (const WgmmaThread::Ops& ops : w.groups) {  // may be empty: a commit without a wgmma
    check(ops, "waited for");
  }
  const size_t first = t.warp() / 4 * kWarpgroupThreads;
  const size_t end = std::min(first + kWarpgroupThreads, t.cta->threads.size());
  for (size_t i = first; i < end; ++i) {
    const Thread& other = *t.cta->threads[i];
    if (other.done && (other.wgmma == nullptr ? 0 : other.wgmma->issued) != w.issued) {
      fault(where(t) + format(" issued %u wgmma instructions, but ", w.issued) + where(other) +
            " of the same warpgroup another number; all four warps must execute each");
    }
  }
}

// The register file of a multiprocessor, shared out by setmaxnreg.
void setmaxnreg(int registers) {
  const Pc pc = EMU_PC;
  Cta& cta = *current->cta;
  Warp& warp = cta.warps[current->warp()];
  warp.registers = static_cast<unsigned>(registers);
  unsigned total = 0;
  for (const Warp& w : cta.warps) {
    total += w.registers * kWarpThreads;
  }
  if (total > 65536) {
    fault(format("setmaxnreg: the warps of the block ask for %u registers, a multiprocessor has "
                 "65536, ",
                 total) +
          whose(pc));
  }
}

}  // namespace emu
