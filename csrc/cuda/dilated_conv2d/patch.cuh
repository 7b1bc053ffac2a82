// SPDX-License-Identifier: Apache-2.0
//
// Pieces shared by the kernels for few channels: where a tile lies, loading pixels into shared
// memory as rows of channel chunks, and products of split numbers.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/dilated_conv2d/patch.h"
#include "cuda/dilated_conv2d/split.cuh"

#include <climits>
#include <type_traits>

namespace dilseg::cuda {

// A tensor as the kernels read it. `raw` types: 16-bit elements are moved, not computed with.
template <class Raw>
struct PatchSource {
  const Raw* data;
  Strides4 strides;
  int channels, h, w;
  bool inner;    // neighbouring lanes take neighbouring channels, else pixels
  bool vectors;  // chunks are whole and aligned
};

template <class T>
using patch_raw_t = std::conditional_t<sizeof(T) == 2, uint16_t, float>;

template <class T>
PatchSource<patch_raw_t<T>> patch_source(
    const void* data, const Strides4& strides, int channels, int h, int w) {
  return {static_cast<const patch_raw_t<T>*>(data),
          strides,
          channels,
          h,
          w,
          patch::channels_inner(strides, channels),
          patch::has_vectors(data, strides, channels, sizeof(T))};
}

// Division of small numbers by one that the host knows: n < 2^16 and divisor < 2^16 make it exact.
struct PatchDivider {
  int divisor;
  uint32_t reciprocal;  // 2^32 / divisor, rounded up; 0 for 1

  __device__ __forceinline__ int quotient(int n) const {
    return reciprocal == 0
               ? n
               : static_cast<int>((uint64_t{static_cast<uint32_t>(n)} * reciprocal) >> 32);
  }
  __device__ __forceinline__ int remainder(int n) const { return n - quotient(n) * divisor; }
};

inline PatchDivider patch_divider(int divisor) {
  constexpr uint64_t kOne = UINT64_C(1) << 32;
  const auto d = static_cast<uint64_t>(divisor);
  return {divisor, divisor == 1 ? 0 : static_cast<uint32_t>((kOne + d - 1) / d)};
}

// A tile: its image, the dst pixel of its first row and column, and how many of its phases exist.
struct PatchTile {
  int n;
  int y, x;
  int phases;
};

__device__ __forceinline__ int patch_part(int& i, int extent) {
  const int quotient = i / extent;
  const int remainder = i - quotient * extent;
  i = quotient;
  return remainder;
}

// Neighbouring tiles read common lines of memory.
__device__ __forceinline__ PatchTile patch_tile(const PatchGeometry& g,
                                                const PatchTiling& t,
                                                int tile) {
  const int phase_w = patch_part(tile, t.phases_w) * t.phases;
  const int at_w = patch_part(tile, t.tiles_w) * t.tile_x;
  const int phase_h = patch_part(tile, t.phases_h);
  const int at_h = patch_part(tile, t.tiles_h) * t.tile_h;
  return {tile, at_h * g.dil_h + phase_h, at_w * g.dil_w + phase_w, g.dil_w - phase_w};
}

// Half-open range of taps that meet the map anywhere in a tile.
struct TapRange {
  int begin, end;
};

__device__ __forceinline__ int floor_div(int a, int b) {
  return a >= 0 ? a / b : -((b - 1 - a) / b);
}

// Of `taps` taps, for `steps` pixels of one phase from `first` (an src coordinate) on, each `width`
// pixels wide.
__device__ __forceinline__ TapRange
meeting_taps(int first, int steps, int width, int dilation, int extent, int taps) {
  const int lowest = -floor_div(first + width - 1, dilation);   // step whose last pixel is >= 0
  const int highest = floor_div(extent - 1 - first, dilation);  // whose first pixel is < extent
  const int begin = max(0, lowest - steps + 1);
  return {begin, max(begin, min(taps, highest + 1))};
}

// ---- pixels to shared memory --------------------------------------------------------------------

// The pixels of a tile or patch, as rows of `chunks` chunks, `pitch` bytes apart.
struct PatchRows {
  PatchDivider pixels, columns, chunks;
  PatchDivider phases;
  int step_h, step_w;  // of the map between rows and between columns of a phase
  int pitch;
  int64_t plane;  // bytes between the parts of split numbers
};

inline PatchRows patch_rows_of(const PatchGeometry& g,
                               const PatchTiling& t,
                               int height,
                               int width,
                               int chunks,
                               int pitch,
                               int64_t plane) {
  return {patch_divider(height * width),
          patch_divider(width),
          patch_divider(chunks),
          patch_divider(t.phases),
          g.dil_h,
          g.dil_w,
          pitch,
          plane};
}

// Distance on the map from the first pixel of a tile or patch, and the phase.
struct PatchPosition {
  int y, x, phase;
};
__device__ __forceinline__ PatchPosition patch_position(const PatchRows& rows, int pixel) {
  const int row = rows.columns.quotient(pixel);
  const int column = pixel - row * rows.columns.divisor;
  const int step = rows.phases.quotient(column);
  const int phase = column - step * rows.phases.divisor;
  return {row * rows.step_h, step * rows.step_w + phase, phase};
}

// Loads all of them; the first lies at (y, x) of image n, and chunks count from `first_chunk` on.
// Outside of the map, beyond the last channel and in phases from `phases_left` on they are zero.
template <int kPlanes, class Raw>
__device__ __forceinline__ void load_pixels(const PatchSource<Raw>& source,
                                            const PatchRows& rows,
                                            int64_t n,
                                            int y,
                                            int x,
                                            int phases_left,
                                            int first_chunk,
                                            unsigned char* to) {
  const Raw* image = source.data + n * source.strides.n;
  const int units = rows.pixels.divisor * rows.chunks.divisor;
  const int threads = static_cast<int>(blockDim.x);
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < units; i += threads) {
    const int quotient = source.inner ? rows.chunks.quotient(i) : rows.pixels.quotient(i);
    const int pixel = source.inner ? quotient : i - quotient * rows.pixels.divisor;
    const int chunk = source.inner ? i - quotient * rows.chunks.divisor : quotient;
    const PatchPosition at = patch_position(rows, pixel);
    const int at_y = y + at.y;
    const int at_x = x + at.x;
    const int channel = (first_chunk + chunk) * kPatchChunk;
    const bool inside = at_y >= 0 && at_y < source.h && at_x >= 0 && at_x < source.w &&
                        at.phase < phases_left && channel < source.channels;
    Raw value[kPatchChunk] = {};
    if (inside) {
      const Raw* p =
          image + at_y * source.strides.h + at_x * source.strides.w + channel * source.strides.c;
      if (source.vectors) {
        constexpr int kPart = 16 / sizeof(Raw);
#pragma unroll
        for (int part = 0; part < kPatchChunk; part += kPart) {
          const auto v = load_vec<kPart>(p + part);
#pragma unroll
          for (int e = 0; e < kPart; ++e) {
            value[part + e] = v.v[e];
          }
        }
      } else {
#pragma unroll
        for (int e = 0; e < kPatchChunk; ++e) {
          if (channel + e < source.channels) {
            value[e] = p[e * source.strides.c];
          }
        }
      }
    }
    store_chunk<kPlanes>(to + pixel * rows.pitch + chunk * 16, rows.plane, value);
  }
}

// ---- products -----------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ void patch_mma(float (&d)[4],
                                          const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>) {
    ptx::mma_f16(d, a, b);
  } else {
    ptx::mma_bf16(d, a, b);
  }
}

// d[j] += a b[j]. Of split floats the products of parts i and j with i + j < kPlanes, the smallest
// first, in a sum of their own that joins d in float: tensor cores truncate when they add, and no
// chain of theirs is longer than these few products.
template <class T, int kPlanes, int kColumns>
__device__ __forceinline__ void multiply(float (&d)[kColumns][4],
                                         const uint32_t (&a)[kPlanes][4],
                                         const uint32_t (&b)[kPlanes][kColumns][2]) {
  if constexpr (kPlanes == 1) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      patch_mma<T>(d[j], a[0], b[0][j]);
    }
  } else {
    float sum[kColumns][4] = {};
#pragma unroll
    for (int order = kPlanes - 1; order >= 0; --order) {
#pragma unroll
      for (int part = order; part >= 0; --part) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          patch_mma<T>(sum[j], a[part], b[order - part][j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        d[j][v] += sum[j][v];
      }
    }
  }
}

// ---- host ---------------------------------------------------------------------------------------

// Calls fn.operator()<T, kPlanes>() for the types and planes that plans name.
template <class F>
cudaError_t dispatch_patch(Dtype dtype, int planes, F&& fn) {
  switch (dtype) {
    case Dtype::kFloat16:
      return fn.template operator()<__half, 1>();
    case Dtype::kBFloat16:
      return fn.template operator()<__nv_bfloat16, 1>();
    case Dtype::kFloat32:
      return planes == 3 ? fn.template operator()<float, 3>() : fn.template operator()<float, 2>();
    case Dtype::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace dilseg::cuda
