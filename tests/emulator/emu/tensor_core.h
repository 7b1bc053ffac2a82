// SPDX-License-Identifier: Apache-2.0
//
// What the matrix instructions compute: ldmatrix, stmatrix, mma.sync, and wgmma with its
// shared-memory descriptors. Pure functions of registers and bytes; who may read what and when is
// the business of the callers. Lane l of a warp has g = l / 4 and q = l % 4 below.
#pragma once

#include <cassert>
#include <cstddef>
#include <cstdint>
#include <span>

namespace emu {

enum class Element { kFloat16, kBFloat16, kTf32 };

// How the products of one instruction are added up. kRounded: ordinary float sums, one k after the
// other. kTruncated: the instruction's products are summed in double and the sum is added to the
// accumulator with rounding toward zero, the model of the tensor cores' bias.
enum class Accumulation { kRounded, kTruncated };

constexpr int element_bytes(Element element) { return element == Element::kTf32 ? 4 : 2; }

// Extent of one instruction along k: 32 bytes of either operand.
constexpr int depth(Element element) { return 32 / element_bytes(element); }

// ldmatrix.m8n8.b16 of `count` matrices, 1, 2 or 4. rows[8 i + r] points to the 16 bytes of row r
// of matrix i; pointers from 8 * count up are not looked at. Lane l receives its register i at
// registers[l][i]: elements (g, 2q) and (g, 2q + 1), with `trans` (2q, g) and (2q + 1, g).
void ldmatrix(int count,
              bool trans,
              const std::byte* const rows[32],
              uint32_t* const registers[32]);

// The inverse, stmatrix.
void stmatrix(int count,
              bool trans,
              std::byte* const rows[32],
              const uint32_t* const registers[32]);

// mma.sync.m16n8k16 (k8 for tf32): lane l holds a[l][0..3], b[l][0..1] and d[l][0..3], and d += A
// B. Register r, half h (0 is the low one) of a lane:
//   A  row g + 8 (r & 1), k = 2q + h + 8 (r >> 1); tf32: k = q + 4 (r >> 1)
//   B  k = 2q + h + 8 r, column g; tf32: k = q + 4 r
//   D  value v: row g + 8 (v >> 1), column 2q + (v & 1)
void mma_m16n8(Element element,
               Accumulation accumulation,
               const uint32_t* const a[32],
               const uint32_t* const b[32],
               float* const d[32]);

// Bits 4-6 of the address that a swizzle layout (0 none, 1 = 128 B, 2 = 64 B, 3 = 32 B) may flip.
constexpr uint32_t swizzle_mask(int layout) { return layout == 0 ? 0 : (8u >> (layout - 1)) - 1; }

// Where the byte at `address` of an unswizzled tile lies; the same for TMA and wgmma. Acts on
// absolute addresses, so that buffers need alignment but a start may advance inside a row.
constexpr uint32_t swizzle(uint32_t address, int layout) {
  return address ^ (((address >> 7) & swizzle_mask(layout)) << 4);
}

// The shared-memory operand of a wgmma.
struct Descriptor {
  uint32_t start;        // bytes, of the shared window
  uint32_t leading;      // bytes
  uint32_t stride;       // bytes
  uint32_t base_offset;  // of the pattern, in units of 128 bytes
  int layout;            // as of swizzle()

  static constexpr Descriptor decode(uint64_t bits) {
    return {.start = static_cast<uint32_t>(bits & 0x3fff) << 4,
            .leading = static_cast<uint32_t>((bits >> 16) & 0x3fff) << 4,
            .stride = static_cast<uint32_t>((bits >> 32) & 0x3fff) << 4,
            .base_offset = static_cast<uint32_t>((bits >> 49) & 7),
            .layout = static_cast<int>(bits >> 62)};
  }
};

// Shared address of element (mn, k) of an operand; mn is a row of A or a column of B. The operand
// is made of eight rows, of k or of mn, as wide as the swizzle (16 bytes without one):
//   K-major     row mn % 8, the next eight rows at `stride`; a row holds the instruction's whole k,
//               or without a swizzle its first 16 bytes, with the next 16 at `leading`
//   MN-major    row k % 8, the next eight k at `stride`, the mn beyond the row at `leading`;
//               without a swizzle the other way round: next eight mn at `stride`, k at `leading`
// The swizzle pattern starts at the multiples of its period; base_offset is the phase
// (address >> 7) & 7 of the place where it starts instead, and is subtracted from the phase.
// Only 16-bit elements may be MN-major.
inline uint32_t element_address(
    const Descriptor& descriptor, Element element, int mn, int k, bool mn_major) {
  assert(!mn_major || element != Element::kTf32);
  const int widening = descriptor.layout == 0 ? 0 : 4 - descriptor.layout;  // row: 16 B << widening
  const uint32_t row_bytes = 16u << widening;
  const bool wide = descriptor.layout != 0;
  const uint32_t leading = descriptor.leading;
  const uint32_t stride = descriptor.stride;

  uint32_t address = descriptor.start;
  if (mn_major) {
    const int per_row = 8 << widening;
    address += static_cast<uint32_t>(k % 8) * row_bytes + static_cast<uint32_t>(mn % per_row) * 2;
    address += static_cast<uint32_t>(mn >> (3 + widening)) * (wide ? leading : stride);
    address += static_cast<uint32_t>(k / 8) * (wide ? stride : leading);
  } else {
    const uint32_t along = static_cast<uint32_t>(k * element_bytes(element));
    address += static_cast<uint32_t>(mn % 8) * row_bytes + static_cast<uint32_t>(mn / 8) * stride;
    address += wide ? along : (along / 16) * leading + along % 16;
  }
  const uint32_t phase = (address >> 7) - descriptor.base_offset;
  return address ^ ((phase & swizzle_mask(descriptor.layout)) << 4);
}

// Calls visit(uint32_t address, uint32_t bytes) for every contiguous run (16 bytes, whatever the
// layout) of an operand of mn x k elements, both multiples of eight. Put one after the other, the
// runs are the operand as [mn][k] if it is K-major and as [k][mn] if it is MN-major.
template <class Visit>
void operand_rows(
    const Descriptor& descriptor, Element element, int mn, int k, bool mn_major, Visit visit) {
  constexpr uint32_t kRunBytes = 16;
  const int per_run = static_cast<int>(kRunBytes) / element_bytes(element);
  if (mn_major) {
    for (int row = 0; row < k; ++row) {
      for (int at = 0; at < mn; at += per_run) {
        visit(element_address(descriptor, element, at, row, true), kRunBytes);
      }
    }
  } else {
    for (int row = 0; row < mn; ++row) {
      for (int at = 0; at < k; at += per_run) {
        visit(element_address(descriptor, element, row, at, false), kRunBytes);
      }
    }
  }
}

// One wgmma.mma_async.m64n<n>: D[64][n] = A B, or += with scale_d.
struct Wgmma {
  Element element;
  Accumulation accumulation;
  int n;         // a multiple of 8 in 8..256
  bool trans_a;  // A is MN-major; without meaning if A comes from registers
  bool trans_b;  // B is MN-major
  bool scale_d;  // otherwise the accumulators are not read
};

// The part of one warp, w = 0..3 of its warpgroup: rows 16w..16w + 15. d[l] points to the n / 2
// accumulators of lane l: value v is row 16w + g + 8 ((v >> 1) & 1), column 8 (v >> 2) + 2q + (v &
// 1). `shared` is the window that the descriptors' addresses count in. False, with d untouched, if
// an operand reaches beyond it.
bool wgmma_rows(const Wgmma& wgmma,
                std::span<const std::byte> shared,
                const Descriptor& a,
                int warp,
                const Descriptor& b,
                float* const d[32]);

// The same with A from registers: a[l] points to the four of lane l, in the layout of mma_m16n8.
bool wgmma_rows(const Wgmma& wgmma,
                std::span<const std::byte> shared,
                const uint32_t* const a[32],
                const Descriptor& b,
                float* const d[32]);

}  // namespace emu
