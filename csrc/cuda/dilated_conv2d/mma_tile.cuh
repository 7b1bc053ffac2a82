// SPDX-License-Identifier: Apache-2.0
//
// Products of tiles on the tensor cores of sm_80 and newer: how operands lie in shared memory, how
// they become fragments, and the block's accumulators. The convolutions' GEMMs differ only in where
// their tiles come from.
//
// A stage of the pipeline holds kStageK values of k for each of the block's rows, 64 bytes:
//   K-major   [mn][k]: 64-byte rows, 16-byte chunk c of row r at c ^ (r / 2 % 4)
//   MN-major  [k][mn]: rows of the tile's width, chunk c of row r at c ^ (r % 8), for float
//             c ^ (r % 4 * 2)
// With these swizzles the copies and the fragment loads below are free of bank conflicts.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/common/ptx.cuh"

#include <cstdint>
#include <type_traits>

namespace dilseg::cuda {

constexpr int kChunkBytes = 16;
template <class T>
constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));
// Values of k of one stage: two steps of 16 for halves, one for floats.
template <class T>
constexpr int kStageK = 64 / static_cast<int>(sizeof(T));
constexpr int kStepK = 16;

// The tile of one operand in one stage. A row is an mn if K-major, else a k.
template <class T, int kMn, bool kKMajor>
struct StagedTile {
  static constexpr int kRows = kKMajor ? kMn : kStageK<T>;
  static constexpr int kRowChunks = (kKMajor ? kStageK<T> : kMn) / kChunk<T>;
  static constexpr int kChunks = kRows * kRowChunks;
  static constexpr int kBytes = kChunks * kChunkBytes;
  static_assert(kKMajor || kRowChunks % 8 == 0);

  // Offset in bytes of a chunk.
  static __device__ __forceinline__ uint32_t at(int row, int chunk) {
    int swizzle = row & 7;
    if constexpr (kKMajor) {
      swizzle = (row >> 1) & 3;
    } else if constexpr (sizeof(T) == 4) {
      swizzle = (row & 3) << 1;
    }
    return static_cast<uint32_t>((row * kRowChunks + (chunk ^ swizzle)) * kChunkBytes);
  }
};

// Fragments of A (16 rows) and B (16 columns), 16 of k, as raw registers. With g = lane / 4 and
// q = lane % 4, for halves as mma.m16n8k16 wants them. For floats register 4 s + r holds
//   A: row g + 8 (r % 2),  k = 4 (2 s + r / 2) + q
//   B: column g + 8 (r / 2), k = 4 (2 s + r % 2) + q
// which is what two mma.m16n8k8 want, and, with k in another order that A and B share, one
// mma.m16n8k16.
template <class T>
struct Fragment {
  uint32_t r[sizeof(T) * 2];
};

// Fragment `i` of those that begin at m: its rows are m + 16 i and up. (Sixteen rows further the
// swizzle of a K-major tile is the same, so that the distance is a constant.)
template <class T, int kMn, bool kKMajor>
__device__ __forceinline__ void load_a(
    Fragment<T>& f, const unsigned char* tile, int m, int i, int k) {
  using Tile = StagedTile<T, kMn, kKMajor>;
  const int lane = threadIdx.x % 32;
  const uint32_t address = ptx::shared_address(tile);
  if constexpr (kKMajor) {
#pragma unroll
    for (int s = 0; s < static_cast<int>(sizeof(T)) / 2; ++s) {
      uint32_t r[4];
      ptx::ldmatrix<4>(r,
                       address + Tile::at(m + lane % 16, k / kChunk<T> + 2 * s + lane / 16) +
                           Tile::at(16 * i, 0));
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        f.r[4 * s + v] = r[v];
      }
    }
  } else if constexpr (sizeof(T) == 2) {
    ptx::ldmatrix<4, true>(
        f.r,
        address + Tile::at(k + lane / 16 * 8 + lane % 8, (m + 16 * i) / kChunk<T> + lane / 8 % 2));
  } else {
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      const int row = k + 4 * (v / 4 * 2 + v % 4 / 2) + lane % 4;
      const int column = m + 16 * i + lane / 4 + 8 * (v % 2);
      f.r[v] = reinterpret_cast<const uint32_t*>(tile + Tile::at(row, column / 4))[column % 4];
    }
  }
}

template <class T, int kMn, bool kKMajor>
__device__ __forceinline__ void load_b(
    Fragment<T>& f, const unsigned char* tile, int n, int i, int k) {
  using Tile = StagedTile<T, kMn, kKMajor>;
  const int lane = threadIdx.x % 32;
  const uint32_t address = ptx::shared_address(tile);
  if constexpr (kKMajor) {
#pragma unroll
    for (int s = 0; s < static_cast<int>(sizeof(T)) / 2; ++s) {
      uint32_t r[4];
      ptx::ldmatrix<4>(
          r,
          address + Tile::at(n + lane / 16 * 8 + lane % 8, k / kChunk<T> + 2 * s + lane / 8 % 2) +
              Tile::at(16 * i, 0));
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        f.r[4 * s + v] = r[v];
      }
    }
  } else if constexpr (sizeof(T) == 2) {
    ptx::ldmatrix<4, true>(
        f.r,
        address + Tile::at(k + lane / 8 % 2 * 8 + lane % 8, (n + 16 * i) / kChunk<T> + lane / 16));
  } else {
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      const int row = k + 4 * (v / 4 * 2 + v % 2) + lane % 4;
      const int column = n + 16 * i + lane / 4 + 8 * (v % 4 / 2);
      f.r[v] = reinterpret_cast<const uint32_t*>(tile + Tile::at(row, column / 4))[column % 4];
    }
  }
}

// ---- arithmetic ---------------------------------------------------------------------------------
// Each turns raw fragments into operands and adds one 16 x 16 x 16 product to two accumulators.

template <class Half>
struct HalfMath {
  using T = Half;
  static constexpr bool kPromotes = false;
  using A = Fragment<T>;
  using B = Fragment<T>;
  static __device__ __forceinline__ A to_a(const Fragment<T>& raw) { return raw; }
  static __device__ __forceinline__ B to_b(const Fragment<T>& raw) { return raw; }
  static __device__ __forceinline__ void multiply(float (&acc)[2][4], const A& a, const B& b) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t column[2] = {b.r[2 * i], b.r[2 * i + 1]};
      if constexpr (std::is_same_v<T, __half>) {
        ptx::mma_f16(acc[i], a.r, column);
      } else {
        ptx::mma_bf16(acc[i], a.r, column);
      }
    }
  }
};

struct Tf32Math {
  using T = float;
  static constexpr bool kPromotes = false;
  using A = Fragment<T>;
  using B = Fragment<T>;
  static __device__ __forceinline__ Fragment<T> to_a(const Fragment<T>& raw) {
    Fragment<T> rounded;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      rounded.r[i] = ptx::to_tf32(__uint_as_float(raw.r[i]));
    }
    return rounded;
  }
  static __device__ __forceinline__ Fragment<T> to_b(const Fragment<T>& raw) { return to_a(raw); }
  static __device__ __forceinline__ void multiply(float (&acc)[2][4], const A& a, const B& b) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t rows[4] = {a.r[4 * s], a.r[4 * s + 1], a.r[4 * s + 2], a.r[4 * s + 3]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t column[2] = {b.r[4 * s + 2 * i], b.r[4 * s + 2 * i + 1]};
        ptx::mma_tf32(acc[i], rows, column);
      }
    }
  }
};

// A float as the sum of kParts bfloat16: exact with three while the last one is normal (down to
// about 2^-108). The first part is cut, not rounded, so that no finite float becomes infinite; an
// infinite or nan float gives nan products.
template <int kParts>
struct SplitMath {
  using T = float;
  // The tensor cores truncate when they add: sums are moved to ordinary float accumulators before
  // that shows.
  static constexpr bool kPromotes = true;
  struct A {
    uint32_t r[kParts][4];
  };
  struct B {
    uint32_t r[kParts][4];
  };

  static __device__ __forceinline__ A to_a(const Fragment<T>& raw) {
    constexpr int kFirst[4] = {0, 1, 4, 5};
    A a;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      split(a.r, i, raw.r[kFirst[i]], raw.r[kFirst[i] + 2]);
    }
    return a;
  }
  static __device__ __forceinline__ B to_b(const Fragment<T>& raw) {
    // Registers 2 i, 2 i + 1 of column group i.
    constexpr int kFirst[4] = {0, 4, 2, 6};
    B b;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      split(b.r, i, raw.r[kFirst[i]], raw.r[kFirst[i] + 1]);
    }
    return b;
  }
  // The smallest products first.
  static __device__ __forceinline__ void multiply(float (&acc)[2][4], const A& a, const B& b) {
#pragma unroll
    for (int order = kParts - 1; order >= 0; --order) {
#pragma unroll
      for (int part = 0; part <= order; ++part) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t column[2] = {b.r[part][2 * i], b.r[part][2 * i + 1]};
          ptx::mma_bf16(acc[i], a.r[order - part], column);
        }
      }
    }
  }

 private:
  // Register i of every part, from the values of its low and high half.
  static __device__ __forceinline__ void split(uint32_t (&r)[kParts][4],
                                               int i,
                                               uint32_t low_bits,
                                               uint32_t high_bits) {
    constexpr uint32_t kHigh = 0xffff0000u;
    float low = __uint_as_float(low_bits);
    float high = __uint_as_float(high_bits);
    // Three parts hold all bits of a cut number. Two hold one bit more of a rounded one, which is
    // infinite within a rounding of the largest float, as in tf32.
    uint32_t next = (low_bits >> 16) | (high_bits & kHigh);
    if constexpr (kParts == 2) {
      next = to_bfloat16(low, high);
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      r[part][i] = next;
      if (part + 1 < kParts) {
        low -= __uint_as_float(next << 16);
        high -= __uint_as_float(next & kHigh);
        next = to_bfloat16(low, high);
      }
    }
  }
  static __device__ __forceinline__ uint32_t to_bfloat16(float low, float high) {
    const __nv_bfloat162 rounded = __floats2bfloat162_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &rounded, sizeof(bits));
    return bits;
  }
};

// ---- the block's product ------------------------------------------------------------------------

template <class Math_, int kM_, int kN_, int kWarpM_, int kWarpN_>
struct TileShape {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kM = kM_, kN = kN_, kWarpM = kWarpM_, kWarpN = kWarpN_;
  static constexpr int kWarpsM = kM / kWarpM;
  static constexpr int kThreads = 32 * kWarpsM * (kN / kWarpN);
};

// Accumulators of a thread; kAKMajor and kBKMajor say how the operands are staged.
template <class Shape, bool kAKMajor, bool kBKMajor>
class BlockProduct {
 public:
  using Math = typename Shape::Math;
  using T = typename Shape::T;
  using TileA = StagedTile<T, Shape::kM, kAKMajor>;
  using TileB = StagedTile<T, Shape::kN, kBKMajor>;
  static constexpr int kStageBytes = TileA::kBytes + TileB::kBytes;

  __device__ __forceinline__ BlockProduct() {
    const int warp = threadIdx.x / 32;
    m_ = warp % Shape::kWarpsM * Shape::kWarpM;
    n_ = warp / Shape::kWarpsM * Shape::kWarpN;
    clear(sum_);
    if constexpr (Math::kPromotes) {
      clear(total_);
    }
  }

  // Adds the product of one stage: A's tile at `stage`, B's behind it.
  __device__ __forceinline__ void add(const unsigned char* stage) {
    const unsigned char* const tile_b = stage + TileA::kBytes;
#pragma unroll
    for (int k = 0; k < kStageK<T>; k += kStepK) {
      typename Math::A a[kTilesM];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        Fragment<T> raw;
        load_a<T, Shape::kM, kAKMajor>(raw, stage, m_, i, k);
        a[i] = Math::to_a(raw);
      }
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        Fragment<T> raw;
        load_b<T, Shape::kN, kBKMajor>(raw, tile_b, n_, j, k);
        const typename Math::B b = Math::to_b(raw);
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          Math::multiply(sum_[i][j], a[i], b);
        }
      }
    }
  }

  // To be called after every stage, with the number of stages added so far.
  __device__ __forceinline__ void promote(int stages) {
    if constexpr (Math::kPromotes) {
      // Six products per step of 16: after 64 of k truncation shows, after 256 it is 8 times an
      // error of float arithmetic.
      constexpr int kEvery = 32 / kStageK<T>;
      if (stages % kEvery == 0) {
        promote();
      }
    }
  }

  // Calls fn(m, n, sums) for pairs of neighbours: sums[0] of (m, n) and sums[1] of (m, n + 1), in
  // the block's tile, n even. All m of one n come together.
  template <class F>
  __device__ __forceinline__ void finish(F&& fn) {
    if constexpr (Math::kPromotes) {
      promote();
    }
    auto& sums = result();
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            const float pair[2] = {sums[i][j][half][2 * row], sums[i][j][half][2 * row + 1]};
            fn(m_ + 16 * i + lane / 4 + 8 * row, n_ + 16 * j + 8 * half + lane % 4 * 2, pair);
          }
        }
      }
    }
  }

 private:
  static constexpr int kTilesM = Shape::kWarpM / 16;
  static constexpr int kTilesN = Shape::kWarpN / 16;
  using Sums = float[kTilesM][kTilesN][2][4];
  struct None {};

  static __device__ __forceinline__ void clear(Sums& sums) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int v = 0; v < 8; ++v) {
          sums[i][j][v / 4][v % 4] = 0;
        }
      }
    }
  }
  __device__ __forceinline__ void promote() {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
        for (int v = 0; v < 8; ++v) {
          total_[i][j][v / 4][v % 4] += sum_[i][j][v / 4][v % 4];
        }
      }
    }
    clear(sum_);
  }
  __device__ __forceinline__ Sums& result() {
    if constexpr (Math::kPromotes) {
      return total_;
    } else {
      return sum_;
    }
  }

  int m_, n_;  // of the warp
  Sums sum_;
  std::conditional_t<Math::kPromotes, Sums, None> total_;
};

}  // namespace dilseg::cuda
