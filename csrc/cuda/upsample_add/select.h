// SPDX-License-Identifier: Apache-2.0
//
// How an upsampling is cut into blocks: pure functions of the problem, without CUDA, so that the
// choice never changes between runs and can be tested on any machine.
#pragma once

#include "dilseg/upsample_add.h"
#include "dilseg/upsample_index.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>

namespace dilseg::cuda {

constexpr int kUpsampleThreads = 256;
// Blocks an SM must be able to hold: leaves 64 registers to a thread. Without the bound ptxas aims
// lower and spills in the double kernels.
constexpr int kUpsampleBlocks = 4;
// Output values per block in forward: 8 per thread pay for the row of taps computed first.
constexpr int kUpsampleForwardValues = 8 * kUpsampleThreads;
// Output rows whose weights backward holds in shared memory, and the terms of one chain of
// additions.
constexpr int kUpsampleChain = 32;

// A block computes `tile_c` channels of `tile_w` neighbouring pixels in one row of the tensor that
// is written; `channels_inner` says whether its threads follow channels or pixels first, as memory
// does.
struct UpsamplePlan {
  bool channels_inner;
  int tile_w, tile_c;
  int64_t tiles_w, tiles_c;
  int64_t tiles;  // n * rows * tiles_c * tiles_w
  int chunk_w;    // backward: columns of grad_output summed at a time
};

inline bool fits_upsample(const UpsampleGeometry& g) {
  return std::max({g.c, g.h_in, g.w_in, g.h_out, g.w_out}) <= kUpsampleMaxSize;
}

// The smallest equal tiles of at most `largest` that cover `size` in as many pieces.
constexpr int balanced_tile(int64_t size, int64_t largest) {
  const int64_t pieces = (size + largest - 1) / largest;
  return static_cast<int>((size + pieces - 1) / pieces);
}

inline UpsamplePlan finish_upsample_plan(
    UpsamplePlan plan, int64_t n, int64_t c, int64_t h, int64_t w) {
  plan.tiles_w = (w + plan.tile_w - 1) / plan.tile_w;
  plan.tiles_c = (c + plan.tile_c - 1) / plan.tile_c;
  plan.tiles = n * h * plan.tiles_c * plan.tiles_w;
  return plan;
}

// For a problem that is not empty.
inline UpsamplePlan plan_upsample_add(const UpsampleGeometry& g, const Strides4& output_strides) {
  UpsamplePlan plan{};
  plan.channels_inner = output_strides.c == 1 && g.c > 1;
  if (plan.channels_inner) {
    plan.tile_c = balanced_tile(g.c, kUpsampleThreads);
    plan.tile_w = balanced_tile(
        g.w_out, std::clamp(kUpsampleForwardValues / plan.tile_c, 1, kUpsampleThreads));
  } else {
    plan.tile_w = balanced_tile(g.w_out, kUpsampleThreads);
    plan.tile_c = balanced_tile(g.c, std::max(1, kUpsampleForwardValues / plan.tile_w));
  }
  return finish_upsample_plan(plan, g.n, g.c, g.h_out, g.w_out);
}

// A thread owns at most one (channel, input pixel) of the tile and one (channel, column) of the
// chunk, so tile_c * tile_w and tile_c * chunk_w stay within a block. Tiles span about two chunks:
// neighbouring tiles read their common columns twice, and wider tiles would leave too few blocks
// for a large scale.
inline UpsamplePlan plan_upsample_add_backward(const UpsampleGeometry& g,
                                               const Strides4& grad_input_strides) {
  constexpr int64_t kThreads = kUpsampleThreads;
  constexpr int64_t kChannelLanes = 32;
  const int64_t step = std::max<int64_t>(1, (g.w_out + g.w_in - 1) / g.w_in);
  UpsamplePlan plan{};
  plan.channels_inner = grad_input_strides.c == 1 && g.c > 1;
  if (plan.channels_inner) {
    plan.tile_c = balanced_tile(g.c, kChannelLanes);
    plan.chunk_w = static_cast<int>(kThreads / plan.tile_c);
    const int64_t widest = std::clamp<int64_t>(2 * plan.chunk_w / step, 1, plan.chunk_w);
    plan.tile_w = balanced_tile(g.w_in, widest);
  } else {
    plan.tile_w = balanced_tile(g.w_in, std::clamp<int64_t>(2 * kThreads / step, 1, kThreads));
    const int64_t columns = std::max<int64_t>(1, std::min(g.w_out, (plan.tile_w + 2) * step));
    plan.chunk_w = static_cast<int>(std::min(columns, kThreads));
    plan.tile_c = balanced_tile(g.c, kThreads / std::max(plan.chunk_w, plan.tile_w));
  }
  return finish_upsample_plan(plan, g.n, g.c, g.h_in, g.w_in);
}

// ---- the fast kernels ---------------------------------------------------------------------------
// They cover magnification of dense maps in float and the half types, and see both memory formats
// as planes of rows of w * channels neighbouring values: a channels_last map is n planes of c
// channels, a contiguous one n * c planes of one channel.

// Longest axis and farthest origin. Coordinates are floats: up to here src is off by less than
// 1/64, which the bounds below allow for.
constexpr int64_t kUpsampleFastSize = 1 << 16;
// Dynamic shared memory that every device grants without being asked.
constexpr int64_t kUpsampleSharedBytes = 48 * 1024;
// Blocks that fill a device of 132 SMs well, nearly twice, and once. Cutting a map more often costs
// bytes at the cuts, so kernels ask for as many as their blocks are small.
constexpr int64_t kUpsampleManyBlocks = 4 * 132;
constexpr int64_t kUpsampleSomeBlocks = 256;
constexpr int64_t kUpsampleFewBlocks = 132;

// Steps between planes and between rows, in elements; 0 where there is only one.
struct UpsampleRows {
  int64_t plane, row;
};

struct UpsampleSize {
  int64_t n, c, h, w;
};

// Whether a tensor of this size and these strides consists of such rows.
inline bool has_upsample_rows(const UpsampleSize& size, const Strides4& s, bool channels_inner) {
  if (channels_inner) {
    return s.c == 1 && (size.w == 1 || s.w == size.c);
  }
  return (size.w == 1 || s.w == 1) && (size.c == 1 || size.n == 1 || s.n == size.c * s.c);
}

// For a tensor that has them.
inline UpsampleRows upsample_rows(const UpsampleSize& size,
                                  const Strides4& s,
                                  bool channels_inner) {
  const int64_t row = size.h == 1 ? 0 : s.h;
  if (channels_inner || size.c == 1) {
    return {size.n == 1 ? 0 : s.n, row};
  }
  return {s.c, row};
}

// Whether every row begins at a multiple of `count` elements of `bytes` bytes.
inline bool rows_aligned(const void* p, const UpsampleRows& rows, int64_t bytes, int64_t count) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes * count) == 0 &&
         rows.plane % count == 0 && rows.row % count == 0;
}

// Whether the fast kernels' bounds hold for this axis and it is not shrunk.
inline bool is_fast_axis(const UpsampleAxis<float>& axis) {
  return axis.size_in <= kUpsampleFastSize && axis.size_out <= kUpsampleFastSize &&
         axis.origin >= -kUpsampleFastSize && axis.origin <= kUpsampleFastSize && axis.ratio > 0 &&
         axis.ratio <= 1;
}

inline UpsampleAxis<float> upsample_axis_h(const UpsampleGeometry& g) {
  return make_upsample_axis<float>(
      g.h_in, g.h_out, g.origin_h, g.scale_h, g.align_corners, g.border);
}
inline UpsampleAxis<float> upsample_axis_w(const UpsampleGeometry& g) {
  return make_upsample_axis<float>(
      g.w_in, g.w_out, g.origin_w, g.scale_w, g.align_corners, g.border);
}

// Most neighbouring inputs that `outputs` neighbouring outputs read.
inline int64_t most_upsample_inputs(const UpsampleAxis<float>& axis, int64_t outputs) {
  const auto steps = static_cast<double>(outputs - 1) * static_cast<double>(axis.ratio);
  return std::min<int64_t>(axis.size_in, static_cast<int64_t>(steps + 0.125) + 3);
}

// How the forward kernel cuts the output: a block computes tile_h rows of tile_w pixels of tile_c
// channels in one plane.
struct UpsampleTiledPlan {
  int vector;  // elements of an access; 0: the generic kernel
  int channels;
  int tile_c, tile_w, tile_h;
  int patch_w, patch_h;  // most input columns and rows that a tile reads
  int64_t tiles_c, tiles_w, tiles_h;
  int64_t tiles;
  int64_t shared_bytes;
  UpsampleAxis<float> axis_h, axis_w;
  UpsampleRows input, skip, output;
};

inline int64_t upsample_tiled_shared_bytes(const UpsampleTiledPlan& plan, int64_t tile_h) {
  const int64_t patch_h = most_upsample_inputs(plan.axis_h, tile_h);
  const int64_t line = static_cast<int64_t>(plan.tile_w) * plan.tile_c;
  const int64_t patch_line = static_cast<int64_t>(plan.patch_w) * plan.tile_c;
  return 4 * ((patch_h + 1) * line + patch_h * patch_line) +
         tile_h * static_cast<int64_t>(sizeof(UpsampleTaps<float>));
}

// For a problem that is not empty and elements of `bytes` bytes; `skip` is at the crop offset.
inline UpsampleTiledPlan plan_upsample_add_tiled(const UpsampleAddParams& p,
                                                 const void* skip,
                                                 int64_t bytes) {
  const UpsampleGeometry& g = p.geometry;
  UpsampleTiledPlan plan{};
  if (bytes > 4) {
    return plan;
  }
  plan.axis_h = upsample_axis_h(g);
  plan.axis_w = upsample_axis_w(g);
  const bool inner = g.c > 1 && p.output_strides.c == 1;
  const UpsampleSize size_in{g.n, g.c, g.h_in, g.w_in};
  const UpsampleSize size_out{g.n, g.c, g.h_out, g.w_out};
  if (!is_fast_axis(plan.axis_h) || !is_fast_axis(plan.axis_w) ||
      !has_upsample_rows(size_in, p.input_strides, inner) ||
      !has_upsample_rows(size_out, p.output_strides, inner) ||
      (skip != nullptr && !has_upsample_rows(size_out, p.skip_strides, inner))) {
    return plan;
  }
  plan.input = upsample_rows(size_in, p.input_strides, inner);
  plan.output = upsample_rows(size_out, p.output_strides, inner);
  plan.skip = skip == nullptr ? UpsampleRows{} : upsample_rows(size_out, p.skip_strides, inner);

  // A block takes channels of two sectors, to read whole ones, and many pixels, to share the border
  // of its patch.
  constexpr int64_t kWholeChannels = 32;
  constexpr int64_t kValues = 256;
  constexpr int64_t kRows = 64;
  constexpr int64_t kFewestRows = 16;
  const int64_t channels = inner ? g.c : 1;
  const int64_t wide = 16 / bytes;
  const bool whole = channels <= kWholeChannels;
  const bool vectors = (whole ? g.w_out * channels : channels) % wide == 0 &&
                       rows_aligned(p.output, plan.output, bytes, wide) &&
                       rows_aligned(skip, plan.skip, bytes, wide);
  const int64_t vector = vectors ? wide : 1;
  plan.vector = static_cast<int>(vector);
  plan.channels = static_cast<int>(channels);
  plan.tile_c = static_cast<int>(
      whole ? channels : vector * balanced_tile(channels / vector, 64 / bytes / vector));
  // Tiles begin at a vector.
  const int64_t step = whole ? vector / std::gcd(vector, channels) : 1;
  const int64_t widest = std::min(std::clamp<int64_t>(kValues / plan.tile_c, 16, 128),
                                  kUpsampleThreads * vector / plan.tile_c);
  plan.tile_w = static_cast<int>(
      step * balanced_tile((g.w_out + step - 1) / step, std::max<int64_t>(1, widest / step)));
  plan.patch_w = static_cast<int>(most_upsample_inputs(plan.axis_w, plan.tile_w));
  plan.tiles_c = (channels + plan.tile_c - 1) / plan.tile_c;
  plan.tiles_w = (g.w_out + plan.tile_w - 1) / plan.tile_w;
  const int64_t columns = (inner ? g.n : g.n * g.c) * plan.tiles_c * plan.tiles_w;
  int64_t rows = std::min(kRows, g.h_out);
  while (rows > kFewestRows && columns * ((g.h_out + rows - 1) / rows) < kUpsampleSomeBlocks) {
    rows = (rows + 1) / 2;
  }
  while (upsample_tiled_shared_bytes(plan, rows) > kUpsampleSharedBytes) {
    --rows;
  }
  plan.tile_h = balanced_tile(g.h_out, rows);
  plan.patch_h = static_cast<int>(most_upsample_inputs(plan.axis_h, plan.tile_h));
  plan.tiles_h = (g.h_out + plan.tile_h - 1) / plan.tile_h;
  plan.tiles = columns * plan.tiles_h;
  plan.shared_bytes = upsample_tiled_shared_bytes(plan, plan.tile_h);
  return plan;
}

// Whether the gradient has rows in both tensors, and which.
struct UpsampleBackwardRows {
  bool inner;  // channels_last
  bool valid;
  UpsampleRows output, input;
};

inline UpsampleBackwardRows upsample_backward_rows(const UpsampleAddBackwardParams& p) {
  const UpsampleGeometry& g = p.geometry;
  // Of the larger tensor: one pixel is contiguous in both formats.
  const bool inner = g.c > 1 && p.grad_output_strides.c == 1;
  const UpsampleSize size_in{g.n, g.c, g.h_in, g.w_in};
  const UpsampleSize size_out{g.n, g.c, g.h_out, g.w_out};
  return {inner,
          has_upsample_rows(size_out, p.grad_output_strides, inner) &&
              has_upsample_rows(size_in, p.grad_input_strides, inner),
          upsample_rows(size_out, p.grad_output_strides, inner),
          upsample_rows(size_in, p.grad_input_strides, inner)};
}

// Backward on contiguous maps. A block takes `lanes` planes, a strip of tile_w input columns and a
// segment of tile_h input rows; a thread sums one vector of output columns.
constexpr int kUpsampleRowsHeld = 128;  // rows whose weights are in shared memory

// Threads of a block, at most, and rows of grad_output that each of them loads at once.
constexpr int upsample_column_threads(int64_t vector) { return vector == 1 ? 256 : 128; }
constexpr int upsample_column_batch(int64_t vector) { return vector == 1 ? 16 : 8; }

struct UpsampleColumnsPlan {
  int vector;  // elements of an access; 0: another kernel
  int lanes, vectors;
  int tile_w, tile_h;
  int64_t planes, strips, segments;
  int64_t tiles;
  int threads;
  int64_t shared_bytes;
  UpsampleAxis<float> axis_h, axis_w;
  UpsampleRows output, input;
};

// One float in 32 is skipped, so that threads which step by a power of two meet few bank conflicts.
DILSEG_HOST_DEVICE int upsample_padded(int i) { return i + (i >> 5); }

// Columns of grad_output that read the inputs [begin, end).
inline int64_t upsample_columns(const UpsampleAxis<float>& axis, int64_t begin, int64_t end) {
  return upsample_first(axis, static_cast<int32_t>(end)) -
         upsample_first(axis, static_cast<int32_t>(begin - 1));
}

// The most outputs of any strip of `tile` inputs. Beyond a clamped border lie any number of them,
// with the lower tap 0 or size_in - 1, so the outer strips are counted, and the second, which reads
// the lower tap 0 if a strip is one pixel; the others are bounded.
inline int64_t most_upsample_columns(const UpsampleAxis<float>& axis, int64_t tile) {
  const int64_t size = axis.size_in;
  const int64_t last = (size - 1) / tile * tile;
  const auto between =
      static_cast<int64_t>((static_cast<double>(tile) + 1.25) / static_cast<double>(axis.ratio)) +
      2;
  int64_t most =
      std::max(upsample_columns(axis, 0, std::min(tile, size)), upsample_columns(axis, last, size));
  if (last > tile) {
    most = std::max(
        {most, upsample_columns(axis, tile, 2 * tile), std::min<int64_t>(between, axis.size_out)});
  }
  return most;
}

// How many segments of at least `fewest_rows` a map of `rows` input rows is cut into, so that
// `blocks` blocks become `wanted`. A segment reads the outputs between it and the one above again,
// a share of one in its rows.
inline int64_t upsample_segments(int64_t rows,
                                 int64_t blocks,
                                 int64_t wanted,
                                 int64_t fewest_rows) {
  return std::clamp<int64_t>(
      (wanted + blocks - 1) / blocks, 1, std::max<int64_t>(1, rows / fewest_rows));
}

inline UpsampleColumnsPlan plan_upsample_backward_columns(const UpsampleAddBackwardParams& p,
                                                          int64_t bytes) {
  const UpsampleGeometry& g = p.geometry;
  const UpsampleBackwardRows rows = upsample_backward_rows(p);
  UpsampleColumnsPlan plan{};
  if (bytes > 4 || rows.inner || !rows.valid) {
    return plan;
  }
  plan.axis_h = upsample_axis_h(g);
  plan.axis_w = upsample_axis_w(g);
  if (!is_fast_axis(plan.axis_h) || !is_fast_axis(plan.axis_w)) {
    return plan;
  }
  plan.output = rows.output;
  plan.input = rows.input;
  plan.planes = g.n * g.c;

  const int64_t wide = 16 / bytes;
  const int64_t vector =
      g.w_out % wide == 0 && rows_aligned(p.grad_output, rows.output, bytes, wide) ? wide : 1;
  const int64_t most_threads = upsample_column_threads(vector);
  const int64_t capacity = most_threads * vector;
  int64_t columns = g.w_out;
  int64_t tile_w = g.w_in;
  if (std::max(g.w_out, g.w_in) > capacity) {
    // A strip begins at a vector, up to vector - 1 columns early.
    const auto widest = static_cast<int64_t>(
        static_cast<double>(capacity - vector - 2) * static_cast<double>(plan.axis_w.ratio) - 1.25);
    if (widest < 1) {
      return plan;
    }
    tile_w = balanced_tile(g.w_in, widest);
    columns = most_upsample_columns(plan.axis_w, tile_w) + vector - 1;
    if (columns > capacity) {
      return plan;
    }
  }
  plan.vector = static_cast<int>(vector);
  plan.tile_w = static_cast<int>(tile_w);
  plan.strips = (g.w_in + tile_w - 1) / tile_w;
  plan.vectors = static_cast<int>(std::max<int64_t>(1, (columns + vector - 1) / vector));

  // Blocks come first from cuts that are cheap, then from fewer planes to a block, then from more
  // cuts.
  constexpr int64_t kCheapRows = 16;
  constexpr int64_t kFewestRows = 8;
  int64_t lanes = std::min<int64_t>(plan.planes, most_threads / plan.vectors);
  const auto blocks = [&] { return plan.strips * ((plan.planes + lanes - 1) / lanes); };
  const auto cheap_segments = [&] {
    return upsample_segments(g.h_in, blocks(), kUpsampleManyBlocks, kCheapRows);
  };
  while (lanes > 1 && lanes * plan.vectors > 32 &&
         blocks() * cheap_segments() < kUpsampleFewBlocks) {
    lanes = (lanes + 1) / 2;
  }
  plan.lanes = static_cast<int>(lanes);
  int64_t segments = cheap_segments();
  if (blocks() * segments < kUpsampleFewBlocks) {
    segments = upsample_segments(g.h_in, blocks(), kUpsampleFewBlocks, kFewestRows);
  }
  plan.tile_h = static_cast<int>((g.h_in + segments - 1) / segments);
  plan.segments = (g.h_in + plan.tile_h - 1) / plan.tile_h;
  plan.tiles = blocks() * plan.segments;
  plan.threads = static_cast<int>((lanes * plan.vectors + 31) / 32 * 32);
  const int64_t line = upsample_padded(static_cast<int>(plan.vectors * vector));
  plan.shared_bytes = upsample_column_batch(vector) * plan.threads * vector * bytes +
                      4 * (3 * kUpsampleRowsHeld + 2 * line + 2 * lanes * line + tile_w + 2);
  return plan;
}

// Backward on channels_last maps. A block takes tile_c channels of tile_h * tile_w input pixels in
// one image; a thread sums the outputs between four neighbouring pixels, for a vector of channels.
constexpr int64_t kUpsampleCellSide = 48;    // most outputs of a cell, along an axis
constexpr int64_t kUpsampleCellRows = 1024;  // most rows of a tile, of both maps together

// Threads of a block, at most.
constexpr int upsample_cell_threads(int64_t vector) { return vector == 1 ? 384 : 256; }

struct UpsampleCellsPlan {
  int vector;  // elements of an access; 0: another kernel
  int channels;
  int tile_c, tile_w, tile_h;
  int most_rows, most_columns;  // of grad_output that a block reads
  int64_t tiles_c, tiles_w, tiles_h;
  int64_t tiles;
  int threads;
  int64_t shared_bytes;
  UpsampleAxis<float> axis_h, axis_w;
  UpsampleRows output, input;
};

// The most outputs with the same lower tap.
inline int64_t most_upsample_cell(const UpsampleAxis<float>& axis) {
  const auto step = 1.0 / static_cast<double>(axis.ratio);
  const auto between = static_cast<int64_t>(1.125 * step) + 1;
  return std::max<int64_t>({upsample_first(axis, 1),
                            axis.size_out - upsample_first(axis, axis.size_in - 1),
                            std::min<int64_t>(between, axis.size_out)});
}

inline int64_t upsample_cells_shared_bytes(
    int64_t tile_c, int64_t tile_h, int64_t tile_w, int64_t rows, int64_t columns) {
  return 4 * (6 * (tile_w + 1) * tile_c + 2 * rows + 2 * columns + tile_h + 2 + tile_w + 2);
}

inline UpsampleCellsPlan plan_upsample_backward_cells(const UpsampleAddBackwardParams& p,
                                                      int64_t bytes) {
  const UpsampleGeometry& g = p.geometry;
  const UpsampleBackwardRows rows = upsample_backward_rows(p);
  UpsampleCellsPlan plan{};
  if (bytes > 4 || !rows.inner || !rows.valid) {
    return plan;
  }
  plan.axis_h = upsample_axis_h(g);
  plan.axis_w = upsample_axis_w(g);
  if (!is_fast_axis(plan.axis_h) || !is_fast_axis(plan.axis_w) ||
      std::max(most_upsample_cell(plan.axis_h), most_upsample_cell(plan.axis_w)) >
          kUpsampleCellSide) {
    return plan;
  }
  plan.output = rows.output;
  plan.input = rows.input;

  constexpr int64_t kWholeChannels = 24;
  constexpr int64_t kChannels = 16;
  constexpr int64_t kSmallestSide = 8;
  const int64_t wide = 16 / bytes;
  const int64_t vector = g.c % wide == 0 && rows_aligned(p.grad_output, rows.output, bytes, wide) &&
                                 rows_aligned(p.grad_input, rows.input, bytes, wide)
                             ? wide
                             : 1;
  plan.vector = static_cast<int>(vector);
  plan.channels = static_cast<int>(g.c);
  plan.tile_c = static_cast<int>(
      g.c <= kWholeChannels ? g.c : vector * balanced_tile(g.c / vector, kChannels / vector));
  plan.tiles_c = (g.c + plan.tile_c - 1) / plan.tile_c;

  int64_t h = g.h_in;
  int64_t w = g.w_in;
  const auto rows_of = [&](int64_t tile) { return most_upsample_columns(plan.axis_h, tile); };
  const auto columns_of = [&](int64_t tile) { return most_upsample_columns(plan.axis_w, tile); };
  // Every cut lets two blocks read the outputs between them, but shared memory has an end.
  while (h > 1 && h + rows_of(h) > kUpsampleCellRows) {
    h = (h + 1) / 2;
  }
  while (w > 1 && upsample_cells_shared_bytes(plan.tile_c, h, w, rows_of(h), columns_of(w)) >
                      kUpsampleSharedBytes) {
    w = (w + 1) / 2;
  }
  const auto blocks = [&] {
    return g.n * plan.tiles_c * ((g.h_in + h - 1) / h) * ((g.w_in + w - 1) / w);
  };
  while (std::max(h, w) > kSmallestSide && blocks() < kUpsampleSomeBlocks) {
    (h >= w ? h : w) = (std::max(h, w) + 1) / 2;
  }
  plan.tile_h = static_cast<int>(h);
  plan.tile_w = static_cast<int>(w);
  plan.most_rows = static_cast<int>(rows_of(h));
  plan.most_columns = static_cast<int>(columns_of(w));
  plan.tiles_h = (g.h_in + h - 1) / h;
  plan.tiles_w = (g.w_in + w - 1) / w;
  plan.tiles = blocks();
  plan.threads =
      (balanced_tile((w + 1) * plan.tile_c / vector, upsample_cell_threads(vector)) + 31) / 32 * 32;
  plan.shared_bytes =
      upsample_cells_shared_bytes(plan.tile_c, h, w, plan.most_rows, plan.most_columns);
  if (plan.shared_bytes > kUpsampleSharedBytes) {
    plan.vector = 0;
  }
  return plan;
}

}  // namespace dilseg::cuda
