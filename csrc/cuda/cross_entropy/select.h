// SPDX-License-Identifier: Apache-2.0
//
// Which cross-entropy kernel runs and how it is launched: pure functions of the problem, without
// CUDA, so that the choice never changes between runs and can be tested on any machine. Every
// choice gives the same losses and gradients up to rounding, and sums losses in the same order.
#pragma once

#include "dilseg/cross_entropy.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace dilseg::cuda {

// The pixels of one partial sum, which is the work of one block at a time.
constexpr int kCrossEntropyTile = static_cast<int>(kCrossEntropyPixelsPerPartial);
constexpr int kWarp = 32;

// The generic kernels: one thread per pixel of a tile. Blocks an SM must be able to hold: leaves 85
// registers to a thread; with 64 the double gradient spills.
constexpr int kCrossEntropyThreads = kCrossEntropyTile;
constexpr int kCrossEntropyBlocks = 3;

// Warps that may share the classes of a pixel, each holding up to 32 of them: leaves 168 registers
// to a thread, or 80 where two such blocks shall fit on an SM.
constexpr int kCrossEntropySlices = 12;
// What every GPU from sm_80 on gives a block, of 99 KB, so that two fit on an SM of most.
constexpr int kSharedBytes = 64 << 10;
constexpr int64_t kLargestGrid = 2147483647;  // blocks; the register kernels have no tile loop
// Numbers that slices exchange per pixel; the last is what the first slice has read for all.
constexpr int kExchanged = 6;

// kGeneric: any strides, any number of classes, any dtype; a thread sweeps the classes of a pixel.
// kPlanar: the pixels of a class follow one another; a thread holds the logits of `vector` pixels.
// kStaged: the classes of a pixel follow one another, and so do the pixels; through shared memory.
enum class CrossEntropyPath { kGeneric, kPlanar, kStaged };

// Pixels count over [n, rows, width]. Rows that follow one another in memory are joined into one.
struct CrossEntropyPlan {
  CrossEntropyPath path = CrossEntropyPath::kGeneric;
  int64_t pixels, tiles;  // a tile is one partial sum
  int64_t rows, width;
  Strides4 input, grad_input;  // h: from row to row, w: from pixel to pixel
  int vector = 1;              // neighbouring pixels of a thread: 1, 2 or 4
  int held = 0;                // registers for logits per pixel: 12, 24 or 32
  int slices = 1;              // warps that share the classes of a pixel
  int slice_classes = 0;       // classes of each but the last
  int groups = 1;              // sets of 32 * vector pixels that a block works on at a time
  int pitch = 0;               // kStaged: floats from pixel to pixel in shared memory
  bool word_copies = false;    // kStaged: memory is aligned for copies of 4 bytes

  int threads() const {
    return path == CrossEntropyPath::kGeneric ? kCrossEntropyThreads : kWarp * slices * groups;
  }
  int exchange_floats() const { return slices > 1 ? kExchanged * slices * kWarp * vector : 0; }
  int stage_floats() const { return groups * kWarp * pitch; }
};

// A tensor that is read or written at every pixel and class.
struct CrossEntropyView {
  const void* data;
  Strides4 strides;
};

inline bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

// Whether the rows of an image follow one another like the pixels of a row.
inline bool rows_join(const CrossEntropyProblem& p, const Strides4& s) {
  return p.h == 1 || p.w == 1 || s.h == p.w * s.w;
}

// Whether `v` pixels that start at a multiple of `v` are one aligned vector in every class.
inline bool vectors_fit(const CrossEntropyPlan& plan,
                        const CrossEntropyProblem& p,
                        const CrossEntropyView& view,
                        int v) {
  const Strides4& s = view.strides;
  return plan.width % v == 0 && is_aligned(view.data, v * size_of(p.dtype)) &&
         (p.c == 1 || s.c % v == 0) && (p.n == 1 || s.n % v == 0) &&
         (plan.rows == 1 || s.h % v == 0);
}

inline CrossEntropyPlan plan_cross_entropy(const CrossEntropyProblem& p,
                                           std::initializer_list<CrossEntropyView> tensors,
                                           std::initializer_list<const void*> per_pixel) {
  CrossEntropyPlan plan{};
  plan.pixels = p.n * p.h * p.w;
  plan.tiles = cross_entropy_partials(plan.pixels);
  const bool join = std::all_of(tensors.begin(), tensors.end(), [&](const CrossEntropyView& t) {
    return rows_join(p, t.strides);
  });
  plan.rows = join ? 1 : p.h;
  plan.width = join ? p.h * p.w : p.w;

  CrossEntropyView views[2] = {};  // logits, gradients
  const auto count = static_cast<int>(tensors.size());
  std::copy(tensors.begin(), tensors.end(), views);
  bool planar = true, staged = p.c > 1 && plan.rows == 1;
  for (int i = 0; i < count; ++i) {
    Strides4& s = views[i].strides;
    if (join && p.w == 1) {
      s.w = s.h;  // the stride of an axis of one element means nothing
    }
    planar = planar && (plan.width == 1 || s.w == 1);
    staged = staged && s.c == 1 && (plan.width == 1 || s.w == p.c) &&
             (p.n == 1 || s.n == plan.width * p.c);
  }
  plan.input = views[0].strides;
  plan.grad_input = views[count - 1].strides;
  if (p.dtype == Dtype::kFloat64 || plan.pixels == 0 || p.c > kCrossEntropySlices * kWarp ||
      plan.tiles > kLargestGrid || !(planar || staged)) {
    return plan;
  }

  plan.held = kWarp;
  plan.slices = static_cast<int>((p.c + kWarp - 1) / kWarp);
  plan.slice_classes = static_cast<int>((p.c + plan.slices - 1) / plan.slices);
  if (staged) {
    plan.path = CrossEntropyPath::kStaged;
    plan.pitch = static_cast<int>(p.c) | 1;  // odd: 32 pixels are in 32 banks
    plan.word_copies = true;
    for (int i = 0; i < count; ++i) {
      plan.word_copies = plan.word_copies && is_aligned(views[i].data, 4);
    }
  } else {
    plan.path = CrossEntropyPath::kPlanar;
    const auto fits = [&](int v) {
      return std::all_of(views,
                         views + count,
                         [&](const CrossEntropyView& t) { return vectors_fit(plan, p, t, v); }) &&
             std::all_of(per_pixel.begin(), per_pixel.end(), [&](const void* data) {
               return is_aligned(data, v * 4);
             });
    };
    if (p.c <= 24 && fits(4)) {
      plan.vector = 4;
      plan.held = p.c <= 12 ? 12 : 24;
    } else if (fits(2)) {
      plan.vector = 2;
    }
  }
  // Slices meet at barriers of the block, so they leave no room for a second group.
  plan.groups = plan.slices > 1 ? 1 : kCrossEntropyTile / (kWarp * plan.vector);
  const int floats = plan.exchange_floats() + plan.stage_floats();
  if (plan.path == CrossEntropyPath::kStaged && floats * 4 > kSharedBytes - 1024) {
    plan.path = CrossEntropyPath::kGeneric;
  }
  return plan;
}

}  // namespace dilseg::cuda
