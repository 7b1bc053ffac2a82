// SPDX-License-Identifier: Apache-2.0
//
// The arithmetic behind tensor_core.h. Operands are unpacked into plain float matrices, A as [m][k]
// and B as [k][n], and the rows of D are summed in registers over k.
#include "emu/tensor_core.h"

#include "emu/formats.h"

#include <cstring>
#include <memory>

namespace emu {
namespace {

constexpr int kWgmmaRows = 64;
constexpr int kWarpRows = 16;
constexpr int kMaxColumns = 256;
constexpr int kOperandBytes = 32;  // of one row or column of an operand along k

// Calls fn.operator()<element>(): the conversions below are compiled for each format.
template <class F>
void dispatch(Element element, F&& fn) {
  switch (element) {
    case Element::kFloat16:
      return fn.template operator()<Element::kFloat16>();
    case Element::kBFloat16:
      return fn.template operator()<Element::kBFloat16>();
    case Element::kTf32:
      return fn.template operator()<Element::kTf32>();
  }
}

template <Element kElement>
float widen(uint32_t bits) {
  if constexpr (kElement == Element::kFloat16) {
    return half_to_float(static_cast<uint16_t>(bits));
  } else if constexpr (kElement == Element::kBFloat16) {
    return bfloat16_to_float(static_cast<uint16_t>(bits));
  } else {
    return tf32_truncated(bits);
  }
}

// A fragment of a 16-row matrix, [16][depth].
template <Element kElement>
void unpack_a(const uint32_t* const a[32], float* matrix) {
  constexpr int kDepth = depth(kElement);
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4;
    const int q = lane % 4;
    for (int r = 0; r < 4; ++r) {
      float* row = matrix + (g + 8 * (r & 1)) * kDepth;
      const uint32_t bits = a[lane][r];
      if constexpr (kElement == Element::kTf32) {
        row[q + 4 * (r >> 1)] = widen<kElement>(bits);
      } else {
        row[2 * q + 8 * (r >> 1)] = widen<kElement>(bits & 0xffff);
        row[2 * q + 8 * (r >> 1) + 1] = widen<kElement>(bits >> 16);
      }
    }
  }
}

// A fragment of an 8-column matrix, [depth][8].
template <Element kElement>
void unpack_b(const uint32_t* const b[32], float* matrix) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4;
    const int q = lane % 4;
    for (int r = 0; r < 2; ++r) {
      const uint32_t bits = b[lane][r];
      if constexpr (kElement == Element::kTf32) {
        matrix[(q + 4 * r) * 8 + g] = widen<kElement>(bits);
      } else {
        matrix[(2 * q + 8 * r) * 8 + g] = widen<kElement>(bits & 0xffff);
        matrix[(2 * q + 8 * r + 1) * 8 + g] = widen<kElement>(bits >> 16);
      }
    }
  }
}

// row[0..kColumns) += a[0..kDepth) times the columns of b[kDepth][pitch].
template <int kDepth, int kColumns>
void add_products(
    Accumulation accumulation, const float* a, const float* b, int pitch, float* row) {
  if (accumulation == Accumulation::kRounded) {
    float sums[kColumns];
    std::memcpy(sums, row, sizeof(sums));
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < kColumns; ++j) {
        sums[j] += a[k] * b[k * pitch + j];
      }
    }
    std::memcpy(row, sums, sizeof(sums));
  } else {
    double sums[kColumns] = {};
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < kColumns; ++j) {
        sums[j] += static_cast<double>(a[k]) * static_cast<double>(b[k * pitch + j]);
      }
    }
    for (int j = 0; j < kColumns; ++j) {
      row[j] = add_truncated(row[j], sums[j]);
    }
  }
}

// Operands of one wgmma. Kept off the stack: the fibers' stacks are small.
struct Operands {
  alignas(64) std::byte packed[kMaxColumns * kOperandBytes];
  alignas(64) float a[kWgmmaRows * 16];
  alignas(64) float b[16 * kMaxColumns];
};

Operands& operands() {
  // Behind a pointer: thread-local storage of a loaded library is quick to reach only while small.
  thread_local const auto operands = std::make_unique<Operands>();
  return *operands;
}

// Copies the operand out of shared memory, densely and in the order of operand_rows.
bool gather(std::span<const std::byte> shared,
            const Descriptor& descriptor,
            Element element,
            int mn,
            bool mn_major,
            std::byte* packed) {
  bool inside = true;
  operand_rows(
      descriptor, element, mn, depth(element), mn_major, [&](uint32_t address, uint32_t bytes) {
        if (size_t{address} + bytes <= shared.size()) {
          std::memcpy(packed, shared.data() + address, bytes);
        } else {
          inside = false;
        }
        packed += bytes;
      });
  return inside;
}

// packed[rows][columns] as floats, transposed or as it is.
template <Element kElement>
void unpack(const std::byte* packed, int rows, int columns, bool transposed, float* matrix) {
  constexpr size_t kBytes = element_bytes(kElement);
  const auto load = [&](int row, int column) {
    uint32_t bits = 0;
    std::memcpy(&bits, packed + static_cast<size_t>(row * columns + column) * kBytes, kBytes);
    return widen<kElement>(bits);
  };
  if (transposed) {
    for (int column = 0; column < columns; ++column) {
      for (int row = 0; row < rows; ++row) {
        matrix[column * rows + row] = load(row, column);
      }
    }
  } else {
    for (int i = 0; i < rows * columns; ++i) {
      matrix[i] = load(0, i);
    }
  }
}

void unpack(Element element,
            const std::byte* packed,
            int rows,
            int columns,
            bool transposed,
            float* matrix) {
  dispatch(element, [&]<Element kElement>() {
    unpack<kElement>(packed, rows, columns, transposed, matrix);
  });
}

// The accumulators of one row: those of its four threads start at the row's half.
struct AccumulatorRow {
  float* of_thread[4];

  AccumulatorRow(float* const d[32], int row) {
    for (int q = 0; q < 4; ++q) {
      of_thread[q] = d[4 * (row % 8) + q] + 2 * (row / 8);
    }
  }

  void load(int n, float* row) const {
    for (int j = 0; j < n / 8; ++j) {
      for (int q = 0; q < 4; ++q) {
        std::memcpy(row + 8 * j + 2 * q, of_thread[q] + 4 * j, 2 * sizeof(float));
      }
    }
  }

  void store(int n, const float* row) const {
    for (int j = 0; j < n / 8; ++j) {
      for (int q = 0; q < 4; ++q) {
        std::memcpy(of_thread[q] + 4 * j, row + 8 * j + 2 * q, 2 * sizeof(float));
      }
    }
  }
};

template <int kDepth>
void add_rows(const Wgmma& wgmma, const float* a, const float* b, float* const d[32]) {
  constexpr int kBlock = 32;  // columns whose sums fit the host's registers
  const int n = wgmma.n;
  for (int i = 0; i < kWarpRows; ++i) {
    const AccumulatorRow accumulators(d, i);
    alignas(64) float row[kMaxColumns] = {};
    if (wgmma.scale_d) {
      accumulators.load(n, row);
    }
    const float* a_row = a + i * kDepth;
    int j = 0;
    for (; j + kBlock <= n; j += kBlock) {
      add_products<kDepth, kBlock>(wgmma.accumulation, a_row, b + j, n, row + j);
    }
    for (; j < n; j += 8) {
      add_products<kDepth, 8>(wgmma.accumulation, a_row, b + j, n, row + j);
    }
    accumulators.store(n, row);
  }
}

// A warp's rows, a[16][depth], times B.
bool multiply(const Wgmma& wgmma,
              std::span<const std::byte> shared,
              const float* a,
              const Descriptor& b,
              float* const d[32]) {
  Operands& of_call = operands();
  if (!gather(shared, b, wgmma.element, wgmma.n, wgmma.trans_b, of_call.packed)) {
    return false;
  }
  const int k = depth(wgmma.element);
  const int rows = wgmma.trans_b ? k : wgmma.n;
  const int columns = wgmma.trans_b ? wgmma.n : k;
  unpack(wgmma.element, of_call.packed, rows, columns, !wgmma.trans_b, of_call.b);
  if (k == 16) {
    add_rows<16>(wgmma, a, of_call.b, d);
  } else {
    add_rows<8>(wgmma, a, of_call.b, d);
  }
  return true;
}

}  // namespace

void ldmatrix(int count,
              bool trans,
              const std::byte* const rows[32],
              uint32_t* const registers[32]) {
  for (int i = 0; i < count; ++i) {
    const std::byte* const* matrix = rows + 8 * i;
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4;
      const int q = lane % 4;
      uint16_t halves[2];
      for (int h = 0; h < 2; ++h) {
        const int row = trans ? 2 * q + h : g;
        const int column = trans ? g : 2 * q + h;
        std::memcpy(&halves[h], matrix[row] + 2 * column, sizeof(uint16_t));
      }
      registers[lane][i] = halves[0] | static_cast<uint32_t>(halves[1]) << 16;
    }
  }
}

void stmatrix(int count,
              bool trans,
              std::byte* const rows[32],
              const uint32_t* const registers[32]) {
  for (int i = 0; i < count; ++i) {
    std::byte* const* matrix = rows + 8 * i;
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4;
      const int q = lane % 4;
      for (int h = 0; h < 2; ++h) {
        const int row = trans ? 2 * q + h : g;
        const int column = trans ? g : 2 * q + h;
        const uint16_t half = static_cast<uint16_t>(registers[lane][i] >> (16 * h));
        std::memcpy(matrix[row] + 2 * column, &half, sizeof(uint16_t));
      }
    }
  }
}

void mma_m16n8(Element element,
               Accumulation accumulation,
               const uint32_t* const a[32],
               const uint32_t* const b[32],
               float* const d[32]) {
  dispatch(element, [&]<Element kElement>() {
    constexpr int kDepth = depth(kElement);
    alignas(64) float a_matrix[16 * kDepth];
    alignas(64) float b_matrix[kDepth * 8];
    unpack_a<kElement>(a, a_matrix);
    unpack_b<kElement>(b, b_matrix);
    for (int i = 0; i < 16; ++i) {
      alignas(32) float row[8];
      float* const* of_thread = d + 4 * (i % 8);
      const int first = 2 * (i / 8);
      for (int q = 0; q < 4; ++q) {
        std::memcpy(row + 2 * q, of_thread[q] + first, 2 * sizeof(float));
      }
      add_products<kDepth, 8>(accumulation, a_matrix + i * kDepth, b_matrix, 8, row);
      for (int q = 0; q < 4; ++q) {
        std::memcpy(of_thread[q] + first, row + 2 * q, 2 * sizeof(float));
      }
    }
  });
}

bool wgmma_rows(const Wgmma& wgmma,
                std::span<const std::byte> shared,
                const Descriptor& a,
                int warp,
                const Descriptor& b,
                float* const d[32]) {
  Operands& of_call = operands();
  if (!gather(shared, a, wgmma.element, kWgmmaRows, wgmma.trans_a, of_call.packed)) {
    return false;
  }
  const int k = depth(wgmma.element);
  const int rows = wgmma.trans_a ? k : kWgmmaRows;
  const int columns = wgmma.trans_a ? kWgmmaRows : k;
  unpack(wgmma.element, of_call.packed, rows, columns, wgmma.trans_a, of_call.a);
  return multiply(wgmma, shared, of_call.a + kWarpRows * warp * k, b, d);
}

bool wgmma_rows(const Wgmma& wgmma,
                std::span<const std::byte> shared,
                const uint32_t* const a[32],
                const Descriptor& b,
                float* const d[32]) {
  Operands& of_call = operands();
  dispatch(wgmma.element, [&]<Element kElement>() { unpack_a<kElement>(a, of_call.a); });
  return multiply(wgmma, shared, of_call.a, b, d);
}

}  // namespace emu
