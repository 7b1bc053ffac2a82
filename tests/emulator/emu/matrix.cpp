// SPDX-License-Identifier: Apache-2.0
//
// ldmatrix, stmatrix and mma.sync: what all lanes of a warp do together.
#include "emu/instructions.h"
#include "emu/report.h"
#include "emu/shadow.h"

namespace emu {
namespace {

struct MatrixSlot {
  int count;
  bool trans;
  uint32_t* registers;
  uint32_t row;
};

// Addresses of the rows, lane by lane; only the first 8 * count lanes give one.
template <class Pointer>
const MatrixSlot& collect(void* const* slots, Pointer (&rows)[32], uint32_t* (&registers)[32]) {
  const auto& first = *static_cast<MatrixSlot*>(slots[0]);
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const auto& s = *static_cast<MatrixSlot*>(slots[lane]);
    rows[lane] = lane < 8 * first.count ? current->cta->window + s.row : nullptr;
    registers[lane] = s.registers;
  }
  return first;
}

void run_ldmatrix(void* const* slots, uint32_t) {
  const std::byte* rows[32];
  uint32_t* registers[32];
  const MatrixSlot& s = collect(slots, rows, registers);
  ldmatrix(s.count, s.trans, rows, registers);
}

void run_stmatrix(void* const* slots, uint32_t) {
  std::byte* rows[32];
  uint32_t* registers[32];
  const MatrixSlot& s = collect(slots, rows, registers);
  stmatrix(s.count, s.trans, rows, registers);
}

struct MmaSlot {
  Element element;
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

void run_mma(void* const* slots, uint32_t) {
  const uint32_t* a[32];
  const uint32_t* b[32];
  float* d[32];
  for (int lane = 0; lane < kWarpThreads; ++lane) {
    const auto& s = *static_cast<MmaSlot*>(slots[lane]);
    a[lane] = s.a;
    b[lane] = s.b;
    d[lane] = s.d;
  }
  mma_m16n8(static_cast<MmaSlot*>(slots[0])->element,
            settings().truncate ? Accumulation::kTruncated : Accumulation::kRounded,
            a,
            b,
            d);
}

void check_row(int count, uint32_t row, Access kind, const char* what, Pc pc) {
  Thread& t = *current;
  if (t.lane() < static_cast<unsigned>(8 * count)) {
    shared_bytes(*t.cta, row, 16, 16, what, pc);
    observe(*t.cta, row, 16, kind, pc);
  }
}

}  // namespace

void ldmatrix(int count, bool trans, uint32_t* registers, uint32_t row) {
  const Pc pc = EMU_PC;
  check_row(count, row, Access::kRead, "ldmatrix", pc);
  MatrixSlot slot{count, trans, registers, row};
  meet_all("ldmatrix", &slot, &run_ldmatrix, pc);
}

void stmatrix(int count, bool trans, uint32_t row, const uint32_t* registers) {
  const Pc pc = EMU_PC;
  check_row(count, row, Access::kWrite, "stmatrix", pc);
  MatrixSlot slot{count, trans, const_cast<uint32_t*>(registers), row};
  meet_all("stmatrix", &slot, &run_stmatrix, pc);
}

void mma(Element element, float* d, const uint32_t* a, const uint32_t* b) {
  MmaSlot slot{element, d, a, b};
  meet_all("mma.sync", &slot, &run_mma, EMU_PC);
}

}  // namespace emu
