// SPDX-License-Identifier: Apache-2.0
//
// What the depthwise kernels share: which results and sources a tile is, and how its sources get
// into shared memory.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/dilated_conv2d/depthwise.h"

namespace dilseg::cuda {

__device__ __forceinline__ int quotient(int i, const Reciprocal& by) {
  return by.factor == 0 ? i : static_cast<int>(__umulhi(static_cast<unsigned>(i), by.factor));
}

__device__ __forceinline__ Reciprocal make_reciprocal(int divisor) {
  const auto d = static_cast<unsigned>(divisor);
  return {d, d == 1 ? 0u : 0xffffffffu / d + 1u};
}

// Results of a tile along one axis, and the staged sources: result m meets, at a tap, the staged
// line (base + m * mul + tap * step) / div - low, if the division is whole and the line is one of
// `lines`; the others lie in the padding.
struct DepthwiseSpan {
  int first, count;   // results
  int source, lines;  // sources staged, from `source` on
  int base, low;
};

// Of `tile` results from `first` on, at most up to `size_r`; all sources if `whole`.
__device__ __forceinline__ DepthwiseSpan depthwise_span(
    const DepthwiseAxis& axis, int first, int tile, int size_r, int size_s, int taps, bool whole) {
  DepthwiseSpan span;
  span.first = first;
  span.count = min(tile, size_r - first);
  span.base = first * axis.mul + axis.off;
  const int last = span.base + (span.count - 1) * axis.mul + (taps - 1) * axis.step;
  const int begin = whole || span.base <= 0 ? 0 : (span.base + axis.div - 1) / axis.div;
  const int end = whole ? size_s : last < 0 ? 0 : min(size_s, last / axis.div + 1);
  span.low = span.source = begin;
  if (axis.div > 1) {  // lifted, so that what is divided is never negative
    const int lift = ((taps - 1) * axis.step + axis.div - 1) / axis.div;
    span.low += lift;
    span.base += lift * axis.div;
  }
  span.lines = max(end - begin, 0);
  return span;
}

// Rows of a tile whose results and sources are apart.
__device__ __forceinline__ DepthwiseSpan depthwise_phase(const DepthwiseWalk& w,
                                                         const DepthwiseTiling& t,
                                                         int phase,
                                                         int part) {
  DepthwiseSpan span;
  span.first = phase + part * t.tile_h * t.phases;
  span.count = min(t.tile_h, (w.h_r - span.first + t.phases - 1) / t.phases);
  const int row = span.first * w.y.mul + w.y.off;
  const int last = w.h_s - 1 - row;
  const int begin = row >= 0 ? 0 : (-row + w.y.step - 1) / w.y.step;
  const int end = last < 0 ? 0 : min((span.count - 1) * t.row_mul + w.k_h, last / w.y.step + 1);
  span.base = 0;
  span.low = begin;
  span.source = row + begin * w.y.step;
  span.lines = max(end - begin, 0);
  return span;
}

struct DepthwiseTile {
  int64_t n;
  int c, channels;  // of the result
  DepthwiseSpan y, x;
};

// Tile `index` of a map, with the channels from `c` on.
__device__ __forceinline__ DepthwiseTile depthwise_tile(
    const DepthwiseWalk& w, const DepthwiseTiling& t, int64_t n, int part_h, int part_w, int c) {
  DepthwiseTile tile;
  tile.n = n;
  tile.c = c;
  tile.channels = min(t.tile_c, w.channels - c);
  tile.x = depthwise_span(w.x, part_w * t.tile_w, t.tile_w, w.w_r, w.w_s, w.k_w, t.whole_rows);
  tile.y = t.phases > 1
               ? depthwise_phase(w, t, part_h % t.phases, part_h / t.phases)
               : depthwise_span(w.y, part_h * t.tile_h, t.tile_h, w.h_r, w.h_s, w.k_h, false);
  return tile;
}

// Copies [outer][middle][run] elements with the given steps, which agree modulo 16 bytes between
// both sides, as `to` and `from` do: packets of 16 bytes by cp.async, what is left of a run at its
// ends by single elements.
struct DepthwiseCopy {
  int run, middle, outer;
  int to_middle, to_outer;
  int from_middle, from_outer;
};

template <class T>
__device__ __forceinline__ void depthwise_copy(DepthwiseCopy copy, T* to, const T* from) {
  constexpr int kPacket = 16 / sizeof(T);
  // Runs that follow one another without a gap are one.
  if (copy.to_middle == copy.run && copy.from_middle == copy.run) {
    copy.run *= copy.middle;
    copy.middle = 1;
    if (copy.to_outer == copy.run && copy.from_outer == copy.run) {
      copy.run *= copy.outer;
      copy.outer = 1;
    }
  }
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
  const bool same_skew = copy.to_middle % kPacket == 0 && copy.to_outer % kPacket == 0;
  const int spread = same_skew || copy.middle * copy.outer == 1 ? skew : kPacket - 1;
  const int packets = (spread + copy.run + kPacket - 1) / kPacket;
  const Reciprocal by_packets = make_reciprocal(packets);
  const Reciprocal by_middle = make_reciprocal(copy.middle);
  const int total = packets * copy.middle * copy.outer;
  for (int i = static_cast<int>(threadIdx.x); i < total; i += kDepthwiseThreads) {
    const int segment = quotient(i, by_packets);
    const int outer = quotient(segment, by_middle);
    const int middle = segment - outer * copy.middle;
    const int at = middle * copy.to_middle + outer * copy.to_outer;
    T* target = to + at;
    const T* source = from + middle * copy.from_middle + outer * copy.from_outer;
    const int begin = (i - segment * packets) * kPacket - (skew + at) % kPacket;
    if (begin >= 0 && begin + kPacket <= copy.run) {
      ptx::cp_async_cg(ptx::shared_address(target + begin), source + begin);
    } else {
      for (int k = max(begin, 0); k < min(begin + kPacket, copy.run); ++k) {
        target[k] = source[k];
      }
    }
  }
}

// Starts to stage the sources of a tile at `shared`, which is aligned to 16 bytes, and returns
// where its first element lies. The copies have landed for a thread after ptx::cp_async_wait_all(),
// for the block after a barrier behind that.
template <class T>
__device__ __forceinline__ const T* depthwise_stage(const DepthwiseWalk& w,
                                                    const DepthwiseTiling& t,
                                                    const DepthwiseTile& tile,
                                                    const T* source,
                                                    T* shared) {
  const int channels = tile.channels / w.fan_r * w.fan_s;
  const T* from = source + tile.n * w.source.n +
                  static_cast<int64_t>(tile.c / w.fan_r * w.fan_s) * w.source.c +
                  tile.y.source * w.source.h + tile.x.source * w.source.w;
  T* to = shared + reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T);
  const int step_c = static_cast<int>(w.source.c);
  const int step_h = static_cast<int>(w.source.h) * t.row_unit;
  const int step_w = static_cast<int>(w.source.w);
  if (tile.y.lines > 0 && tile.x.lines > 0) {
    depthwise_copy(t.inner ? DepthwiseCopy{channels,
                                           tile.x.lines,
                                           tile.y.lines,
                                           t.pitch_w,
                                           t.pitch_h,
                                           step_w,
                                           step_h}
                           : DepthwiseCopy{tile.x.lines,
                                           tile.y.lines,
                                           channels,
                                           t.pitch_h,
                                           t.pitch_c,
                                           step_h,
                                           step_c},
                   to,
                   from);
  }
  return to;
}

// kVector values in the type of sums.
template <int kVector, class T>
__device__ __forceinline__ void load_sums(acc_t<T> (&to)[kVector], const T* from) {
  const auto packed = load_vec<kVector>(from);
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    to[v] = load(&packed.v[v]);
  }
}

}  // namespace dilseg::cuda
