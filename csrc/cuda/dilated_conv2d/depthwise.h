// SPDX-License-Identifier: Apache-2.0
//
// The depthwise kernels, one input channel per group: their view of a problem and how they cut it
// into blocks. Pure functions, without CUDA. See docs/kernels/dilated_conv2d.md.
#pragma once

#include "cuda/common/gpu.h"
#include "cuda/dilated_conv2d/model.h"
#include "dilseg/dilated_conv2d.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>

namespace dilseg::cuda {

constexpr int kDepthwiseThreads = 256;
// Rows of the result that a thread takes at once, sliding over the taps of a column: more for
// single channels, which have the registers, to share what a thread does per tap column.
constexpr int depthwise_rows(int vector) { return vector == 1 ? 8 : 4; }
// Blocks of an SM that must fit its registers. In the sum a thread holds a column of taps, in
// grad_weight the sums of a window.
constexpr int depthwise_sum_blocks(int taps, int vector, int sum_bytes) {
  return taps == 3 || (vector == 1 && sum_bytes == 4) ? 3 : 2;
}
constexpr int depthwise_grad_weight_blocks(int box, int vector, int sum_bytes) {
  return box == 3 && vector == 1 && sum_bytes == 4 ? 3 : 2;
}

// i / divisor for i * divisor < 2^32: the upper half of i * factor; a factor of 0 divides by 1.
struct Reciprocal {
  unsigned divisor, factor;
};
constexpr Reciprocal reciprocal(int64_t divisor) {
  const auto d = static_cast<unsigned>(divisor);
  return {d, d == 1 ? 0u : 0xffffffffu / d + 1u};
}

// Along one axis, result u meets source (u * mul + off + tap * step) / div at a tap, if that is
// whole. A convolution has div 1; its gradient mul 1 and the taps in reverse.
struct DepthwiseAxis {
  int mul, off, step, div;
};

// Both directions as one: a result is a sum over taps of a source.
struct DepthwiseWalk {
  int64_t n;
  int channels;      // of the result
  int fan_r, fan_s;  // channels of a group in the result and in the source; one of them is 1
  int h_s, w_s, h_r, w_r;
  int k_h, k_w;
  DepthwiseAxis y, x;
  Strides4 source, result;
};

// A block owns `tile_c` channels of tile_h x tile_w results in one image. It stages the part of the
// source that these read in shared memory, as [c][row][column] with the steps `pitch`, which agree
// with those in memory modulo 16 bytes, so that one alignment holds for both sides of every copy.
struct DepthwiseTiling {
  bool inner;   // channels innermost in memory
  bool slides;  // neighbouring results of a thread are one tap apart: rows are loaded once
  int vector;   // neighbouring channels of a thread
  // Rows of a tile are `phases` apart, where they share taps; staged rows are `row_unit` apart.
  int phases, row_unit;
  int tile_c, tile_h, tile_w;
  int tiles_c, tiles_h, tiles_w;
  bool whole_rows;        // every column is staged
  int row_mul, row_step;  // staged rows between neighbouring results, and between taps
  int gap;                // between the rows of a thread's results
  int groups;             // of depthwise_rows rows
  Reciprocal by_lanes, by_width, by_groups, by_gap, by_fan, by_div_y, by_div_x;
  int pitch_c, pitch_h, pitch_w;
};

struct DepthwisePlan {
  DepthwiseWalk walk;
  DepthwiseTiling tiling;
  int64_t tiles;         // of one result
  int taps;              // the kernel's compiled window; 0: any
  int slices;            // grad_weight: parts that the tiles of one channel are cut into
  int boxes_h, boxes_w;  // grad_weight: windows of taps that cover the kernel
  int shared_bytes;
  size_t workspace_bytes;
  double microseconds;  // modelled
};

namespace depthwise {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }
constexpr int sum_bytes(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

// The strides of axes with one element say nothing; here they are those of a dense tensor.
inline Strides4 plain_strides(Strides4 s, int64_t n, int64_t c, int64_t h, int64_t w) {
  if (w == 1) {
    s.w = c > 1 && s.c == 1 ? c : 1;
  }
  if (h == 1) {
    s.h = w * s.w;
  }
  if (n == 1) {
    s.n = 0;
  }
  if (c == 1) {
    s.c = h * s.h;
  }
  return s;
}

// Whether offsets inside one image fit 31 bits.
inline bool image_fits(const Strides4& s, int64_t c, int64_t h, int64_t w) {
  return (c - 1) * s.c + (h - 1) * s.h + (w - 1) * s.w < (INT64_C(1) << 31);
}

inline bool aligned(const void* p, const Strides4& s, int64_t vector, int64_t bytes) {
  return s.c == 1 && s.n % vector == 0 && s.h % vector == 0 && s.w % vector == 0 &&
         reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(vector * bytes) == 0;
}

inline bool supports(const DilatedConv2dShape& s, const Gpu& gpu) {
  // Reciprocals divide coordinates by strides exactly within these bounds.
  constexpr int64_t kFar = INT64_C(1) << 22;
  constexpr int64_t kLongestStride = 256;
  const int64_t reach_h = s.h_out * s.stride_h + s.k_h * s.dil_h + s.h_in + s.pad_top;
  const int64_t reach_w = s.w_out * s.stride_w + s.k_w * s.dil_w + s.w_in + s.pad_left;
  return gpu.arch >= 80 && s.groups == s.c_in && s.n * s.c_out * s.h_out * s.w_out > 0 &&
         s.h_in * s.w_in * s.k_h * s.k_w > 0 && std::max(reach_h, reach_w) < kFar &&
         std::max(s.stride_h, s.stride_w) <= kLongestStride && s.c_out < kFar;
}

inline DepthwiseWalk forward_walk(const DilatedConv2dShape& s,
                                  const Strides4& input,
                                  const Strides4& output) {
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  return {s.n,
          i(s.c_out),
          i(s.c_out / s.groups),
          1,
          i(s.h_in),
          i(s.w_in),
          i(s.h_out),
          i(s.w_out),
          i(s.k_h),
          i(s.k_w),
          {i(s.stride_h), i(-s.pad_top), i(s.dil_h), 1},
          {i(s.stride_w), i(-s.pad_left), i(s.dil_w), 1},
          plain_strides(input, s.n, s.c_in, s.h_in, s.w_in),
          plain_strides(output, s.n, s.c_out, s.h_out, s.w_out)};
}

inline DepthwiseWalk grad_input_walk(const DilatedConv2dShape& s,
                                     const Strides4& grad_output,
                                     const Strides4& grad_input) {
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  return {s.n,
          i(s.c_in),
          1,
          i(s.c_out / s.groups),
          i(s.h_out),
          i(s.w_out),
          i(s.h_in),
          i(s.w_in),
          i(s.k_h),
          i(s.k_w),
          {1, i(s.pad_top - (s.k_h - 1) * s.dil_h), i(s.dil_h), i(s.stride_h)},
          {1, i(s.pad_left - (s.k_w - 1) * s.dil_w), i(s.dil_w), i(s.stride_w)},
          plain_strides(grad_output, s.n, s.c_out, s.h_out, s.w_out),
          plain_strides(grad_input, s.n, s.c_in, s.h_in, s.w_in)};
}

// What a plan is made for, beside the walk.
struct Request {
  Dtype dtype;
  int vector;         // most neighbouring channels of a thread, 1 where they are not aligned
  bool keeps_weight;  // in shared memory, with the bias
  bool fixed_lanes;   // a thread keeps its channels
  int reads_result;   // passes over the result
  int resident;       // blocks of an SM that the registers allow
};

// Most source elements that `tile` neighbouring results read along an axis of `size`.
inline int64_t extent(const DepthwiseAxis& a, int64_t taps, int64_t size, int64_t tile) {
  const int64_t last = (tile - 1) * a.mul + (taps - 1) * a.step;
  return std::min(size, last / a.div + 1 + (a.div > 1 ? 1 : 0));
}

// Elements of the taps of one tap column in shared memory: scalar threads load four at a time.
constexpr int64_t weight_column(int64_t k_h, int64_t vector) {
  return vector == 1 ? round_up(k_h, 4) : k_h;
}

// The cut of a walk into tiles of a given shape: what it needs, and its modelled time. The tile
// covers `groups_c` groups of channels.
struct Cut {
  DepthwiseTiling tiling;
  int64_t tiles, shared_bytes;
  double microseconds;
};

inline std::optional<Cut> cut(const DepthwiseWalk& w,
                              const Request& request,
                              const Gpu& gpu,
                              bool inner,
                              int64_t phases,
                              int64_t tile_c,
                              int64_t tile_h,
                              int64_t tile_w) {
  const int64_t bytes = size_of(request.dtype);
  const int64_t packet = 16 / bytes;
  const int64_t staged_c = tile_c / w.fan_r * w.fan_s;
  DepthwiseTiling t{};
  t.inner = inner;
  t.vector = request.vector;
  t.phases = static_cast<int>(phases);
  t.tile_c = static_cast<int>(tile_c);
  t.tile_h = static_cast<int>(tile_h);
  t.tile_w = static_cast<int>(tile_w);
  const int64_t rows_of_phase = ceil_div(w.h_r, phases);
  const int64_t cuts_h = ceil_div(rows_of_phase, tile_h);
  t.tiles_c = static_cast<int>(ceil_div(w.channels, tile_c));
  t.tiles_h = static_cast<int>(phases * cuts_h);
  t.tiles_w = static_cast<int>(ceil_div(w.w_r, tile_w));
  t.whole_rows = t.tiles_w == 1;

  int64_t rows = 0;
  if (phases > 1) {
    t.row_unit = w.y.step;
    t.row_mul = static_cast<int>(phases * w.y.mul / w.y.step);
    t.row_step = 1;
    rows = std::min((tile_h - 1) * t.row_mul + w.k_h, ceil_div(w.h_s, w.y.step));
  } else {
    t.row_unit = 1;
    t.row_mul = w.y.mul;
    t.row_step = w.y.step;
    rows = extent(w.y, w.k_h, w.h_s, tile_h);
  }
  t.slides = w.y.div == 1 && t.row_step % t.row_mul == 0;
  // Rows of a thread share their taps: one tap apart, or one division apart.
  t.gap = t.slides ? t.row_step / t.row_mul : w.y.div;
  const int64_t per_thread = depthwise_rows(t.vector);
  t.groups =
      static_cast<int>(tile_h <= t.gap ? tile_h : ceil_div(tile_h, per_thread * t.gap) * t.gap);
  const int64_t columns = t.whole_rows ? w.w_s : extent(w.x, w.k_w, w.w_s, tile_w);

  // The smallest step of at least `need` elements that agrees with the one in memory.
  const auto pitch = [&](int64_t need, int64_t stride) {
    return need + ((stride - need) % packet + packet) % packet;
  };
  int64_t staged = 0;
  int64_t run = 0;  // neighbouring elements that are staged together
  if (inner) {
    const int64_t pitch_w = pitch(staged_c, w.source.w);
    const int64_t pitch_h = pitch(columns * pitch_w, w.source.h * t.row_unit);
    t.pitch_c = 1;
    t.pitch_w = static_cast<int>(pitch_w);
    t.pitch_h = static_cast<int>(pitch_h);
    staged = rows * pitch_h;
    run = staged_c == w.source.w ? staged_c * columns : staged_c;
  } else {
    const int64_t pitch_h = pitch(columns, w.source.h * t.row_unit);
    const int64_t pitch_c = pitch(rows * pitch_h, w.source.c);
    t.pitch_w = 1;
    t.pitch_h = static_cast<int>(pitch_h);
    t.pitch_c = static_cast<int>(pitch_c);
    staged = staged_c * pitch_c;
    run = columns == w.source.h * t.row_unit ? columns * rows : columns;
  }
  const int64_t lanes = tile_c / t.vector;
  const int64_t items = lanes * tile_w * t.groups;
  const int64_t weights =
      request.keeps_weight ? tile_c * (1 + w.fan_s * w.k_w * weight_column(w.k_h, t.vector)) : 0;
  const int64_t shared =
      round_up(weights * sum_bytes(request.dtype), 16) + round_up((staged + packet) * bytes, 16);
  // Whether a Reciprocal divides every number below `dividends` exactly.
  const auto exact = [](int64_t dividends, int64_t divisor) {
    return dividends * divisor >> 32 == 0;
  };
  const int64_t middle = inner ? columns : rows;  // of a copy, whose runs are `segments`
  const int64_t segments = rows * (inner ? columns : staged_c);
  if (shared > gpu.shared_bytes || !exact(items, std::max({lanes, tile_w, int64_t{t.groups}})) ||
      !exact(std::max<int64_t>(tile_h, t.groups), t.gap) || !exact(tile_c, w.fan_r) ||
      !exact(segments, middle) || (request.fixed_lanes && lanes > kDepthwiseThreads)) {
    return std::nullopt;
  }
  t.by_lanes = reciprocal(lanes);
  t.by_width = reciprocal(tile_w);
  t.by_groups = reciprocal(t.groups);
  t.by_gap = reciprocal(t.gap);
  t.by_fan = reciprocal(w.fan_r);
  t.by_div_y = reciprocal(w.y.div);
  t.by_div_x = reciprocal(w.x.div);

  const int64_t tiles = w.n * t.tiles_c * t.tiles_h * t.tiles_w;
  // Rows and columns between two tiles are read by both.
  const double seams_h =
      static_cast<double>(cuts_h - 1) * static_cast<double>(phases) *
      std::max<double>(
          0, static_cast<double>(rows) - static_cast<double>(tile_h * t.row_mul) / w.y.div);
  const double seams_w =
      static_cast<double>(t.tiles_w - 1) *
      std::max<double>(
          0, static_cast<double>(columns) - static_cast<double>(tile_w * w.x.mul) / w.x.div);
  const double planes = static_cast<double>(w.n) * static_cast<double>(w.channels);
  const double source = planes / w.fan_r * w.fan_s * (w.h_s + seams_h) * (w.w_s + seams_w);
  const double result = planes * w.h_r * w.w_r * request.reads_result;
  // What a short run wastes of its sectors, and a row of results that threads do not follow.
  const double run_bytes = static_cast<double>(run * bytes);
  const bool even = inner && run % packet == 0 && w.source.w % packet == 0;
  const double waste = even ? (run_bytes < 64 ? 1.1 : 1.0) : 1.0 + 32.0 / run_bytes;
  const bool followed = inner ? w.result.c == 1 : w.result.w == 1;
  const double moved =
      static_cast<double>(bytes) * (source * waste + result * (followed ? 1.0 : 32.0 / bytes));
  // Blocks of an SM overlap staging with sums, and what they stage must cover the latency of
  // memory; few blocks leave SMs idle, small ones threads.
  const int64_t resident =
      std::min<int64_t>(request.resident, (gpu.shared_bytes + 1024) / (shared + 1024));
  const double alone = resident >= 3 ? 1.0 : resident == 2 ? 1.15 : 1.6;
  constexpr double kLatency = 2;
  const double bandwidth = copy_bytes(gpu);
  // Seams do not count as bytes in flight.
  const double once = w.h_s / (w.h_s + seams_h) * (w.w_s / (w.w_s + seams_w));
  const double flight = kLatency * bandwidth / gpu.multiprocessors /
                        (static_cast<double>(resident * staged * bytes) * once);
  const double share = static_cast<double>(gpu.multiprocessors) / static_cast<double>(tiles);
  const double fill = share > 1 ? 0.5 + share : 1 + share / 2;
  const double rounds = static_cast<double>(ceil_div(items, kDepthwiseThreads));
  const double idle = rounds * kDepthwiseThreads / static_cast<double>(items);
  // Taps that meet a source: all, or one in div.
  const double taps_h = static_cast<double>(w.k_h) / w.y.div;
  const double taps_w = static_cast<double>(w.k_w) / w.x.div;
  const double per_item = static_cast<double>(tile_h) / t.groups;
  const double sums = per_item * t.vector;
  const double loads = t.slides ? per_item + w.k_h - 1 : per_item * taps_h;
  const double item =
      60 + w.fan_s * (8 * w.k_w + taps_w * (10 + w.k_h + loads * (2 + t.vector) + taps_h * sums));
  const double issued = static_cast<double>(tiles) * rounds * (kDepthwiseThreads / 32) * item;
  constexpr double kIssuedPerMicrosecond = 4 * 0.6 * 1700;
  const double streamed =
      moved / bandwidth * fill * alone * std::clamp(flight, 1.0, 4.0) * (0.9 + 0.1 * idle);
  const double computed = issued / (kIssuedPerMicrosecond * gpu.multiprocessors) * fill;
  constexpr double kBlock = 0.1;  // of an SM, to start a block and to fetch its taps
  const double started = kBlock * static_cast<double>(tiles) / gpu.multiprocessors;
  return Cut{t, tiles, shared, kLaunchMicroseconds + started + std::max(streamed, computed)};
}

// The best cut; of equals the first.
inline std::optional<Cut> best_cut(const DepthwiseWalk& w, const Request& request, const Gpu& gpu) {
  const int64_t channels_s = w.channels / w.fan_r * w.fan_s;
  const bool inner = channels_s > 1 && w.source.c == 1;
  if ((!inner && w.source.w != 1) || !image_fits(w.source, channels_s, w.h_s, w.w_s) ||
      !image_fits(w.result, w.channels, w.h_r, w.w_r)) {
    return std::nullopt;
  }
  const int64_t bytes = size_of(request.dtype);
  const int64_t groups = w.channels / w.fan_r;
  std::optional<Cut> best;
  // Returns whether the tile could run.
  const auto consider = [&](int64_t phases, int64_t tile_c, int64_t tile_h, int64_t tile_w) {
    const auto found = cut(w, request, gpu, inner, phases, tile_c, tile_h, tile_w);
    if (found && (!best || found->microseconds < best->microseconds)) {
      best = found;
    }
    return found.has_value();
  };
  const auto rows_of = [&](int64_t phases, int64_t tile_c, int64_t tile_w) {
    bool any = false;
    const int64_t rows = ceil_div(w.h_r, phases);
    for (int64_t pieces = 1;; pieces = pieces < 4 ? pieces + 1 : pieces + pieces / 2) {
      const int64_t tile_h = ceil_div(rows, std::min(pieces, rows));
      any |= consider(phases, tile_c, tile_h, tile_w);
      if (tile_h <= depthwise_rows(request.vector)) {
        return any;
      }
    }
  };
  const auto columns_of = [&](int64_t phases, int64_t tile_c) {
    // Cuts along a row cost seams, so only as many as shared memory asks for, and twice that.
    for (int64_t pieces = 1; pieces <= w.w_r; pieces *= 2) {
      if (rows_of(phases, tile_c, ceil_div(w.w_r, pieces))) {
        if (inner && pieces * 2 <= w.w_r) {
          rows_of(phases, tile_c, ceil_div(w.w_r, pieces * 2));
        }
        return;
      }
    }
  };
  const int64_t apart = w.y.div == 1 ? w.y.step / std::gcd(w.y.mul, w.y.step) : 1;
  for (int64_t phases = 1; phases <= std::min<int64_t>(apart, w.h_r);
       phases = phases == apart ? apart + 1 : apart) {
    if (inner) {
      constexpr std::array<int64_t, 4> kRunBytes = {64, 32, 128, 256};
      for (const int64_t run : kRunBytes) {
        const int64_t c = std::max<int64_t>(
            round_up(std::max<int64_t>(run / bytes / w.fan_s, 1), request.vector * w.fan_r) /
                w.fan_r,
            1);
        if (c < groups) {
          columns_of(phases, c * w.fan_r);
        }
      }
      constexpr int64_t kWholeBytes = 512;
      if (channels_s * bytes <= kWholeBytes) {
        columns_of(phases, groups * w.fan_r);
      }
    } else {
      // Several planes only where they are small.
      constexpr int64_t kResults = 16384;
      const int64_t plane = int64_t{w.h_r} * w.w_r;
      for (int64_t c = 1;
           c < 2 * groups && c <= kDepthwiseThreads && (c == 1 || c * plane <= kResults);
           c *= 2) {
        columns_of(phases, std::min(c, groups) * w.fan_r);
      }
    }
  }
  return best;
}

inline DepthwisePlan finish(const DepthwiseWalk& w, const Cut& cut) {
  DepthwisePlan plan{};
  plan.walk = w;
  plan.tiling = cut.tiling;
  plan.tiles = cut.tiles;
  plan.slices = plan.boxes_h = plan.boxes_w = 1;
  plan.shared_bytes = static_cast<int>(cut.shared_bytes);
  plan.microseconds = cut.microseconds;
  return plan;
}

// Neighbouring channels that a thread of the forward kernel takes: 16 bytes of sums.
inline int vector_of(
    const DepthwiseWalk& w, Dtype dtype, const void* source, const void* result, int64_t widest) {
  const int64_t bytes = size_of(dtype);
  for (int64_t vector = widest; vector > 1; vector /= 2) {
    if (w.fan_r == 1 && w.fan_s == 1 && w.channels % vector == 0 &&
        aligned(source, w.source, vector, bytes) && aligned(result, w.result, vector, bytes)) {
      return static_cast<int>(vector);
    }
  }
  return 1;
}

inline std::optional<DepthwisePlan> plan_sum(
    const DepthwiseWalk& w, Dtype dtype, const void* source, const void* result, const Gpu& gpu) {
  // The kernels know this vector and 1.
  const int widest = 16 / sum_bytes(dtype);
  const int vector = vector_of(w, dtype, source, result, widest) == widest ? widest : 1;
  const bool slides = w.y.div == 1 && w.y.step % w.y.mul == 0;
  const bool compiled = w.k_h == 3 || w.k_h == 5 || w.k_h == 7;
  const int taps = slides && compiled ? w.k_h : 0;
  const int resident = depthwise_sum_blocks(taps, vector, sum_bytes(dtype));
  const auto cut = best_cut(w, {dtype, vector, true, false, 1, resident}, gpu);
  constexpr int64_t kMostBlocks = 2147483647;
  if (!cut || cut->tiles > kMostBlocks) {
    return std::nullopt;
  }
  DepthwisePlan plan = finish(w, *cut);
  plan.taps = taps;
  return plan;
}

}  // namespace depthwise

// The plan of the depthwise kernels, or none where they cannot run the problem: a GPU without
// asynchronous copies, more than one input
// channel per group, nothing to compute, rows (or, in channels_last, pixels) that are not dense, or
// a window that does not fit shared memory.
inline std::optional<DepthwisePlan> plan_depthwise(const DilatedConv2dParams& p, const Gpu& gpu) {
  if (!depthwise::supports(p.shape, gpu)) {
    return std::nullopt;
  }
  return depthwise::plan_sum(depthwise::forward_walk(p.shape, p.input_strides, p.output_strides),
                             p.dtype,
                             p.input,
                             p.output,
                             gpu);
}

inline std::optional<DepthwisePlan> plan_depthwise(const DilatedConv2dGradInputParams& p,
                                                   const Gpu& gpu) {
  if (!depthwise::supports(p.shape, gpu)) {
    return std::nullopt;
  }
  return depthwise::plan_sum(
      depthwise::grad_input_walk(p.shape, p.grad_output_strides, p.grad_input_strides),
      p.dtype,
      p.grad_output,
      p.grad_input,
      gpu);
}

// The result here is grad_output, which is read. A thread keeps the sums of a window of taps for
// its channels in registers; a larger kernel is covered by several windows.
inline std::optional<DepthwisePlan> plan_depthwise(const DilatedConv2dGradWeightParams& p,
                                                   const Gpu& gpu) {
  if (!depthwise::supports(p.shape, gpu)) {
    return std::nullopt;
  }
  const DepthwiseWalk w = depthwise::forward_walk(p.shape, p.input_strides, p.grad_output_strides);
  const int sum = depthwise::sum_bytes(p.dtype);
  const int64_t longest = std::max(w.k_h, w.k_w);
  // Larger windows than 3 x 3 are compiled for sliding threads only.
  const bool slides = w.y.step % w.y.mul == 0;
  // 49 sums in double do not fit the registers of a thread.
  const int largest = !slides ? 3 : p.dtype == Dtype::kFloat64 ? 5 : 7;
  const int box = longest <= 3 ? 3 : longest <= 5 ? std::min(5, largest) : largest;
  const int widest = box == 3 ? 16 / sum : box == 5 ? 8 / sum : 1;
  const int boxes_h = static_cast<int>(depthwise::ceil_div(w.k_h, box));
  const int boxes_w = static_cast<int>(depthwise::ceil_div(w.k_w, box));
  const int vector =
      depthwise::vector_of(w, p.dtype, p.input, p.grad_output, widest) == widest ? widest : 1;
  const auto cut = depthwise::best_cut(w,
                                       {p.dtype,
                                        vector,
                                        false,
                                        true,
                                        boxes_h * boxes_w,
                                        depthwise_grad_weight_blocks(box, vector, sum)},
                                       gpu);
  if (!cut) {
    return std::nullopt;
  }
  DepthwisePlan plan = depthwise::finish(w, *cut);
  plan.boxes_h = boxes_h;
  plan.boxes_w = boxes_w;
  plan.taps = box;
  // The sums of a block go through shared memory, at least one tap at a time.
  const int64_t one_tap = int64_t{kDepthwiseThreads} * plan.tiling.vector * sum;
  plan.shared_bytes =
      static_cast<int>(std::max<int64_t>(plan.shared_bytes, depthwise::round_up(one_tap, 16)));
  constexpr int64_t kBlocksPerMultiprocessor = 6;
  const int64_t parts = p.shape.n * plan.tiling.tiles_h * plan.tiling.tiles_w;
  const int64_t columns = int64_t{plan.tiling.tiles_c} * boxes_h * boxes_w;
  const int64_t entries = int64_t{w.channels} * (w.k_h * w.k_w + 1);
  // As many slices as fill the GPU, unless the workspace became a sixteenth of the traffic.
  const int64_t elements =
      w.n * (int64_t{w.channels} * w.h_r * w.w_r + int64_t{w.channels / w.fan_r} * w.h_s * w.w_s);
  const int64_t most = elements * size_of(p.dtype) / (16 * entries * sum);
  const int64_t wanted = std::clamp<int64_t>(
      depthwise::ceil_div(kBlocksPerMultiprocessor * gpu.multiprocessors, columns),
      1,
      std::max<int64_t>(most, 1));
  const int64_t per_slice = depthwise::ceil_div(parts, std::min(wanted, parts));
  plan.slices = static_cast<int>(depthwise::ceil_div(parts, per_slice));
  plan.workspace_bytes = static_cast<size_t>(plan.slices * entries * sum);
  plan.microseconds *= boxes_h * boxes_w;
  constexpr double kSecondLaunch = 2;
  plan.microseconds +=
      kSecondLaunch + 2.0 * static_cast<double>(plan.workspace_bytes) / copy_bytes(gpu);
  constexpr int64_t kMostBlocks = 2147483647;
  if (columns * plan.slices > kMostBlocks) {
    return std::nullopt;
  }
  return plan;
}

Status launch_depthwise(const DilatedConv2dParams& params,
                        const DepthwisePlan& plan,
                        Stream stream);
Status launch_depthwise(const DilatedConv2dGradInputParams& params,
                        const DepthwisePlan& plan,
                        Stream stream);
Status launch_depthwise(const DilatedConv2dGradWeightParams& params,
                        const DepthwisePlan& plan,
                        Stream stream);

}  // namespace dilseg::cuda
