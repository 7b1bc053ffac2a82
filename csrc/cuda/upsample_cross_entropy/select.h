// SPDX-License-Identifier: Apache-2.0
//
// How upsampled pixels are cut into tiles: pure functions of the problem, without CUDA, so that the
// choice never changes between runs and can be tested on any machine.
//
// A cell is the outputs of one axis that share their lower tap; outputs of cell i read inputs i and
// i + 1. Tiles are made of whole cells (or of pieces of one, where a cell is large), so a tile of
// q cells reads q + 1 inputs, and inputs between its outermost ones belong to no other tile.
#pragma once

#include "dilseg/upsample_add.h"
#include "dilseg/upsample_index.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace dilseg::cuda {

// A block takes kTileColumns columns of a few segments at a time, one thread each. A segment is up
// to `rows` output rows of one cell, the pixels of one thread.
constexpr int kTileColumns = 64;

// Sweep: a thread holds up to 8 pixels in registers and walks the classes. 4 segments.
constexpr int kSweepSegments = 4;
constexpr int kSweepThreads = kTileColumns * kSweepSegments;
// March: a thread holds all classes of one pixel in registers and walks its pixels. 2 segments: its
// registers leave room for few threads, and small blocks fill it best.
constexpr int kMarchSegments = 2;
constexpr int kMarchThreads = kTileColumns * kMarchSegments;
constexpr int kMarchRows = 16;
constexpr int kMarchMaxClasses = 32;

// More cells than this on one axis would make the patch large where the map shrinks.
constexpr int kTileMaxCells = 64;
// Dynamic shared memory that needs no attribute.
constexpr size_t kTileSharedBytes = 48 * 1024;
// Rows of column sums are this much longer than kTileColumns, which spreads classes over banks.
constexpr int kTilePitch = kTileColumns + 1;
// Most classes whose column sums are in shared memory at a time.
constexpr int kTileGroup = 8;

// Column sums are folded to cells first where a cell has about 4 columns or more.
constexpr int kTileFoldCells = 16;
constexpr size_t kTileFoldBytes = 9 * 1024;

enum class TileUse { kArgmax, kLoss, kGradient };

// The tiles of one axis.
struct TileAxis {
  int32_t first;   // lower tap of the first cell of tile 0; the cell may be empty
  int32_t cells;   // of a tile
  int32_t pieces;  // tiles that share one cell; 1 if cells > 1
  int32_t piece;   // outputs of such a tile; the last one takes what is left
  int32_t tiles;
};

struct TilePlan {
  TileAxis h, w;
  int64_t tiles;      // n * h.tiles * w.tiles
  bool march;         // or sweep
  int segments;       // of a round
  int rows;           // of a segment; 2, 4 or 8 in a sweep
  int patch;          // inputs of a tile: (h.cells + 1) * (w.cells + 1)
  int pitch;          // from class to class in the patch; odd, which spreads classes over banks
  int staged;         // classes in shared memory at a time
  int group;          // classes whose column sums are there at a time; 0 without a gradient
  size_t sums_bytes;  // of shared memory, column sums
  bool sums_losses;
  size_t shared_bytes;
  bool folds;  // whether column sums are folded to cells before they reach inputs

  int threads() const { return kTileColumns * segments; }
  // Sums of the threads lie before the column sums; no loss, no such sums.
  DILSEG_HOST_DEVICE size_t block_bytes() const {
    return sums_losses ? 2 * sizeof(double) * kTileColumns * segments : 0;
  }
  DILSEG_HOST_DEVICE int folded_values() const {
    return folds ? (h.cells + 1) * w.cells * 2 * group : 0;
  }
};

inline bool fits_tiles(const UpsampleGeometry& g) {
  return std::max({g.c, g.h_in, g.w_in, g.h_out, g.w_out}) <= kUpsampleMaxSize;
}

// Outputs of `cells` neighbouring cells.
template <class T>
int32_t cell_size(const UpsampleAxis<T>& axis, int64_t lower, int64_t cells = 1) {
  const int64_t end = std::min<int64_t>(lower + cells, INT64_C(1) << 30);
  return upsample_first(axis, static_cast<int32_t>(end)) -
         upsample_first(axis, static_cast<int32_t>(lower));
}

// Outputs of a cell away from the borders, at least 1.
template <class T>
int32_t typical_cell(const UpsampleAxis<T>& axis) {
  const double per_cell = 1.0 / static_cast<double>(axis.ratio);  // inf if all are in one cell
  return static_cast<int32_t>(
      std::clamp(std::ceil(per_cell - 1e-3), 1.0, static_cast<double>(std::max(axis.size_out, 1))));
}

// At most `wanted` cells a tile, as many as have about `outputs` outputs. The clamped border makes
// the first cell longer; the tiles are shifted by a cell or more if tile 0 would overflow.
template <class T>
TileAxis plan_tile_axis(const UpsampleAxis<T>& axis, int32_t wanted, int32_t outputs) {
  const int32_t lowest = upsample_lower(axis, upsample_source(axis, 0));
  const int32_t highest = upsample_lower(axis, upsample_source(axis, axis.size_out - 1));
  TileAxis plan{};
  plan.cells = std::clamp(wanted, 1, kTileMaxCells);
  plan.pieces = 1;
  plan.first = lowest;
  if (plan.cells == 1) {
    // Of an ordinary cell. A clamped border makes longer ones, whose last piece takes the rest.
    const int32_t typical = typical_cell(axis);
    plan.pieces = (typical - 1) / outputs + 1;
    plan.piece = (typical - 1) / plan.pieces + 1;
  } else {
    for (int32_t shift = 0; shift < std::min(plan.cells, 4); ++shift) {
      if (cell_size(axis, lowest, plan.cells - shift) <= outputs) {
        plan.first = lowest - shift;
        break;
      }
    }
  }
  const int64_t cells = int64_t{highest} - plan.first + 1;
  plan.tiles = static_cast<int32_t>((cells + plan.cells - 1) / plan.cells * plan.pieces);
  return plan;
}

// A: float or double, what is computed in. For a problem that is not empty.
template <class A>
TilePlan plan_tiles_by(const UpsampleGeometry& g,
                       const UpsampleAxis<A>& axis_h,
                       const UpsampleAxis<A>& axis_w,
                       TileUse use,
                       bool march) {
  TilePlan plan{};
  const int32_t cell_h = typical_cell(axis_h);
  plan.march = march;
  plan.segments = march ? kMarchSegments : kSweepSegments;
  plan.rows = march ? kMarchRows : sizeof(A) == 8 || cell_h <= 2 ? 2 : cell_h <= 4 ? 4 : 8;
  const int32_t segments = (cell_h - 1) / plan.rows + 1;  // of a cell
  if (march && segments > 1 && segments <= plan.segments) {
    plan.rows = (cell_h - 1) / segments + 1;
  }
  const double cells_w =
      std::min<double>(kTileMaxCells, std::floor(kTileColumns * double{axis_w.ratio} + 1e-3));
  plan.h = plan_tile_axis(axis_h, plan.segments / segments, plan.segments * plan.rows);
  plan.w = plan_tile_axis(axis_w, static_cast<int32_t>(cells_w), kTileColumns);
  plan.tiles = g.n * plan.h.tiles * plan.w.tiles;
  plan.patch = (plan.h.cells + 1) * (plan.w.cells + 1);
  plan.pitch = plan.patch | 1;

  const int64_t most = march ? kMarchMaxClasses : kTileGroup * 4 / int64_t{sizeof(A)};
  plan.group = use == TileUse::kGradient ? static_cast<int>(std::min<int64_t>(g.c, most)) : 0;
  const int64_t sums =
      int64_t{2} * plan.segments * kTilePitch * plan.group * static_cast<int64_t>(sizeof(A));
  plan.sums_bytes = static_cast<size_t>((sums + 15) / 16 * 16);
  plan.sums_losses = use != TileUse::kArgmax;
  plan.folds = plan.group > 0 && plan.w.cells <= kTileFoldCells &&
               (plan.h.cells + 1) * plan.w.cells * 2 * plan.group * sizeof(A) <= kTileFoldBytes;
  const size_t tables =
      static_cast<size_t>(2 * kTileColumns + 3 + plan.folded_values()) * sizeof(A) +
      sizeof(int32_t) * static_cast<size_t>(plan.w.cells + 2 * plan.h.cells + 3);
  const size_t per_class = static_cast<size_t>(plan.pitch) * sizeof(A);
  const size_t fit =
      (kTileSharedBytes - plan.block_bytes() - plan.sums_bytes - tables - 16) / per_class;
  plan.staged = static_cast<int>(std::min<int64_t>(g.c, static_cast<int64_t>(fit)));
  if (plan.group > 0 && plan.staged < g.c && plan.staged > plan.group) {
    plan.staged -= plan.staged % plan.group;
  }
  plan.shared_bytes = plan.block_bytes() + plan.sums_bytes + (tables + 15) / 16 * 16 +
                      static_cast<size_t>(plan.staged) * per_class;
  return plan;
}

// A march if the classes fit in registers and their patch in shared memory.
template <class A>
TilePlan plan_tiles(const UpsampleGeometry& g,
                    const UpsampleAxis<A>& axis_h,
                    const UpsampleAxis<A>& axis_w,
                    TileUse use) {
  if (sizeof(A) == 4 && use != TileUse::kArgmax && g.c <= kMarchMaxClasses) {
    const TilePlan plan = plan_tiles_by(g, axis_h, axis_w, use, true);
    if (plan.staged == g.c) {
      return plan;
    }
  }
  return plan_tiles_by(g, axis_h, axis_w, use, false);
}

}  // namespace dilseg::cuda
