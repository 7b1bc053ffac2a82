// SPDX-License-Identifier: Apache-2.0
//
// The kernels for few channels, of any count: which problems they run and how those are cut, as
// pure functions without CUDA. See docs/kernels/dilated_conv2d.md, "Small and odd channels".
#pragma once

#include "cuda/common/gpu.h"
#include "cuda/dilated_conv2d/model.h"
#include "dilseg/dilated_conv2d.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace dilseg::cuda {

constexpr int kPatchMaxChannels = 96;
// Channels that lie together in shared memory: 16 bytes of a 16-bit type, one row of ldmatrix.
constexpr int kPatchChunk = 8;
// Pixels that one tensor-core product takes, along m (forward) or k (weight gradient).
constexpr int kPatchStep = 16;

// forward and grad_input: warps along the pixels of a tile; along the channels there are 1 or 2.
constexpr int kPatchWarps = 4;
constexpr int kPatchMaxThreads = 2 * 32 * kPatchWarps;
// Blocks of that size that an SM must be able to hold: 128 registers per thread. Without the bound
// ptxas aims lower and spills.
constexpr int kPatchBlocks = 2;
// 16-row products of a warp: two share the weights they load, but with split floats the second set
// of sums takes their registers.
constexpr int patch_rows(int planes) { return planes == 1 ? 2 : 1; }
constexpr int patch_pixels(int planes) { return kPatchStep * patch_rows(planes) * kPatchWarps; }

// grad_weight: a block owns kPatchGradRows * 16 output channels and a share of the columns (tap,
// chunk of input channels), kPatchGradColumns of them per warp.
constexpr int kPatchGradPixels = 128;
constexpr int kPatchGradWarps = 8;
constexpr int kPatchGradThreads = 32 * kPatchGradWarps;
constexpr int kPatchGradRows = 3;
constexpr int kPatchGradColumns = 4;
constexpr int kPatchGradChannels = kPatchGradRows * kPatchStep;
// The block's columns; one is kept for grad_bias, whose "input" is 1.
constexpr int kPatchGradTaps = kPatchGradWarps * kPatchGradColumns - 1;
// Adding the splits: 32 neighbouring sums by 8 slices of the splits.
constexpr int kPatchSumLanes = 32;
constexpr int kPatchSumThreads = 256;

// A stride-1 convolution from `src` to `dst`: the forward pass, or the gradient of the input with
// reversed taps and the padding that makes them meet the same pixels, which may be negative.
struct PatchGeometry {
  int64_t n;
  int c_src, h_src, w_src;
  int c_dst, h_dst, w_dst;
  int k_h, k_w;
  int pad_top, pad_left;
  int dil_h, dil_w;
};

// How the dst map is cut into tiles. Rows and columns with the same remainder by the dilation (a
// phase) form a map of their own, on which the convolution is not dilated. A tile is tile_h rows of
// one phase by tile_x columns of each of `phases` neighbouring phases; its patch of src has
// k_h - 1 rows and (k_w - 1) * phases columns more, whatever the dilation.
struct PatchTiling {
  int tile_h, tile_x, phases;
  int tile_w;  // tile_x * phases
  int patch_h, patch_w;
  int phases_h, phases_w;  // of the map; phases_w in groups of `phases`
  int tiles_h, tiles_w;    // per phase
  int64_t tiles;           // all of them, of all images
};

struct PatchPlan {
  PatchTiling tiling;
  int planes;  // 16-bit parts of an element
  int chunks;  // of kPatchChunk channels of src: all, or those of a grad_weight block
  // forward, grad_input
  int columns;  // 8-channel columns of dst of one warp: 3 or 6
  int warps_n;
  int group;      // chunks of weights in shared memory at a time, along (tap, chunk)
  bool resident;  // they are all there, and loaded once
  // grad_weight
  int taps;  // of one block
  int64_t groups_m, groups_c, groups_t, splits;

  unsigned blocks;
  size_t shared_bytes;
  size_t workspace_bytes;
  double microseconds;  // modelled
};

// Pitch of `chunks` chunks in bytes: an odd number of 16-byte words, so that eight neighbouring
// rows begin in different banks.
constexpr int64_t patch_pitch(int64_t chunks) { return 16 * (chunks | 1); }

// Pitch of a channel in the staged output, in elements: the eight pixels by eight channels that a
// warp writes at once fall into different banks.
constexpr int patch_stage_pitch(int pixels, int64_t bytes) {
  return pixels + static_cast<int>(16 / bytes);
}

// ---- the parts of a plan ------------------------------------------------------------------------

namespace patch {

constexpr int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// kTf32 runs as kBf16x3, which is more exact than it asks for: no kernels of its own.
inline int planes(Dtype dtype, Float32Precision precision) {
  return dtype != Dtype::kFloat32 ? 1 : precision == Float32Precision::kIeee ? 3 : 2;
}

inline bool covers(const DilatedConv2dShape& s, Dtype dtype, const Gpu& gpu) {
  // Coordinates stay far from 2^31 in every sum that the kernels form.
  constexpr int64_t kLargest = 1 << 24;
  return gpu.arch >= 80 && dtype != Dtype::kFloat64 && s.groups == 1 && s.stride_h == 1 &&
         s.stride_w == 1 &&
         std::min({s.n, s.c_in, s.c_out, s.h_in, s.w_in, s.h_out, s.w_out}) >= 1 &&
         std::max(s.c_in, s.c_out) <= kPatchMaxChannels && std::max(s.k_h, s.k_w) <= 64 &&
         std::max(
             {s.n, s.h_in, s.w_in, s.h_out, s.w_out, s.dil_h, s.dil_w, s.pad_top, s.pad_left}) <=
             kLargest;
}

// For a covered shape.
inline PatchGeometry geometry(const DilatedConv2dShape& s) {
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  return {s.n,
          narrow(s.c_in),
          narrow(s.h_in),
          narrow(s.w_in),
          narrow(s.c_out),
          narrow(s.h_out),
          narrow(s.w_out),
          narrow(s.k_h),
          narrow(s.k_w),
          narrow(s.pad_top),
          narrow(s.pad_left),
          // A single tap has no dilation, and so no phases.
          s.k_h == 1 ? 1 : narrow(s.dil_h),
          s.k_w == 1 ? 1 : narrow(s.dil_w)};
}

inline PatchGeometry reversed(const PatchGeometry& g) {
  return {g.n,
          g.c_dst,
          g.h_dst,
          g.w_dst,
          g.c_src,
          g.h_src,
          g.w_src,
          g.k_h,
          g.k_w,
          (g.k_h - 1) * g.dil_h - g.pad_top,
          (g.k_w - 1) * g.dil_w - g.pad_left,
          g.dil_h,
          g.dil_w};
}

inline bool channels_inner(const Strides4& s, int64_t channels) { return channels > 1 && s.c == 1; }

// Whether every chunk of channels is whole and can be loaded in 16-byte vectors.
inline bool has_vectors(const void* p, const Strides4& s, int64_t channels, int64_t bytes) {
  const int64_t step = 16 / bytes;
  return channels % kPatchChunk == 0 && s.c == 1 && reinterpret_cast<uintptr_t>(p) % 16 == 0 &&
         s.n % step == 0 && s.h % step == 0 && s.w % step == 0;
}

inline PatchTiling tiling(const PatchGeometry& g, int tile_h, int tile_x, int phases) {
  PatchTiling t{};
  t.tile_h = tile_h;
  t.tile_x = tile_x;
  t.phases = phases;
  t.tile_w = tile_x * phases;
  t.patch_h = tile_h + g.k_h - 1;
  t.patch_w = t.tile_w + (g.k_w - 1) * phases;
  t.phases_h = std::min(g.dil_h, g.h_dst);
  t.phases_w = static_cast<int>(up(std::min(g.dil_w, g.w_dst), phases));
  t.tiles_h = static_cast<int>(up(up(g.h_dst, g.dil_h), tile_h));
  t.tiles_w = static_cast<int>(up(up(g.w_dst, g.dil_w), tile_x));
  t.tiles = g.n * t.phases_h * t.phases_w * t.tiles_h * t.tiles_w;
  return t;
}

// Loads of src that a tile asks for, with what they waste of 32-byte sectors: a run of neighbouring
// pixels begins anywhere. Where channels are innermost, the chunks of a pixel are one run.
inline double patch_loads(const PatchGeometry& g, const PatchTiling& t, bool inner, int64_t bytes) {
  constexpr double kLost = 31;
  const bool dense = t.phases == std::min(g.dil_w, g.w_dst);
  const double run = static_cast<double>((inner ? g.c_src : dense ? t.patch_w : t.phases) * bytes);
  return (1 + kLost / run) * t.patch_h * t.patch_w;
}

// Blocks step through the tiles in 32 bits.
constexpr int64_t kMostTiles = 1 << 30;

// The tiling that loads least: of at most `pixels` pixels per tile and `most` in the patch.
inline std::optional<PatchTiling> best_tiling(
    const PatchGeometry& g, int pixels, int64_t most, bool inner, int64_t bytes) {
  const int columns = static_cast<int>(up(g.w_dst, g.dil_w));
  const int rows = static_cast<int>(up(g.h_dst, g.dil_h));
  const int phases_w = std::min(g.dil_w, g.w_dst);
  std::optional<PatchTiling> best;
  double least = 0;
  const auto consider = [&](int x, int phases) {
    const int tile_w = x * phases;
    if (tile_w > pixels) {
      return;
    }
    const PatchTiling t = tiling(g, std::min(pixels / tile_w, rows), x, phases);
    // Two rows of a product in one bank cost a second access.
    const double conflicts = t.tile_w % kPatchChunk == 0 ? 1 : 1.25;
    const double cost =
        static_cast<double>(t.tiles) * (patch_loads(g, t, inner, bytes) + pixels * conflicts);
    if (int64_t{t.patch_h} * t.patch_w <= most && t.tiles <= kMostTiles &&
        (!best || cost < least)) {
      best = t;
      least = cost;
    }
  };
  for (int phases = 1;; phases = std::min(2 * phases, phases_w)) {
    for (int x = 1;; x = std::min(2 * x, columns)) {
      consider(x, phases);
      if (x >= columns || x > pixels) {
        break;
      }
    }
    if (phases >= phases_w || phases > pixels) {
      break;
    }
  }
  return best;
}

inline int products(int planes) { return planes * (planes + 1) / 2; }

// bytes of global memory, flops of tensor cores in 16-bit types, and elements gathered one at a
// time, of which a multiprocessor loads about 16 per clock.
inline double model(const Gpu& gpu, double bytes, double flops, double gathered) {
  // Of a warp's products half share an operand: the rest of the time goes to reading them.
  constexpr double kEfficiency = 0.55;
  const double rate = kEfficiency * mma_flops(gpu, Dtype::kBFloat16, Float32Precision::kIeee);
  const double gather = gathered / (gpu.multiprocessors * 16.0 * 1.5e3);
  return kLaunchMicroseconds + std::max({bytes / copy_bytes(gpu), flops / rate, gather});
}

inline int64_t resident_blocks(const Gpu& gpu, size_t shared_bytes, int threads) {
  // An SM has 1 KB more than a block may ask for, and keeps 1 KB of every block to itself.
  const int64_t by_memory = (gpu.shared_bytes + 1024) / (static_cast<int64_t>(shared_bytes) + 1024);
  return std::clamp<int64_t>(by_memory, 1, kPatchBlocks * kPatchMaxThreads / threads);
}

// Shared memory of forward and grad_input; patch_forward.cu lays it out.
struct ForwardLayout {
  int pitch_weights, pitch;
  int64_t weights, plane;  // bytes of one plane of each
  int64_t table, offsets, pixels;
  int64_t total;
};
inline ForwardLayout forward_layout(const PatchGeometry& g,
                                    const PatchTiling& t,
                                    int planes,
                                    int chunks,
                                    int rows_n,
                                    int group,
                                    int64_t bytes) {
  ForwardLayout l{};
  const int tile = patch_pixels(planes);
  l.pitch_weights = static_cast<int>(patch_pitch(group + 1));  // one of zeros behind them
  l.pitch = static_cast<int>(patch_pitch(chunks));
  l.weights = int64_t{rows_n} * l.pitch_weights;
  l.plane = int64_t{t.patch_h} * t.patch_w * l.pitch;
  // 16 bytes of zeros, then the offsets of a tile's pixels, then the list of its chunks.
  l.offsets = l.weights * planes + 16;
  l.table = l.offsets + 8 * tile;
  l.pixels = l.table + 8 * (up(int64_t{g.k_h} * g.k_w * chunks, 2) * 2);
  l.pixels = up(l.pixels, 16) * 16;
  const int64_t stage =
      std::max(int64_t{patch_stage_pitch(tile, bytes)}, int64_t{tile}) * g.c_dst * bytes;
  l.total = l.pixels + std::max(l.plane * planes, stage);
  return l;
}

inline std::optional<PatchPlan> plan_forward(
    const PatchGeometry& g, Dtype dtype, Float32Precision precision, bool inner, const Gpu& gpu) {
  PatchPlan plan{};
  const int64_t bytes = size_of(dtype);
  plan.planes = planes(dtype, precision);
  plan.chunks = static_cast<int>(up(g.c_src, kPatchChunk));
  plan.columns = g.c_dst <= 24 ? 3 : 6;
  plan.warps_n = g.c_dst <= 48 ? 1 : 2;
  const int rows_n = 8 * plan.columns * plan.warps_n;
  const int all = g.k_h * g.k_w * plan.chunks;
  const int64_t budget = gpu.shared_bytes;
  const int64_t most = budget * 5 / 8 / (plan.planes * patch_pitch(plan.chunks));
  const auto tiling = best_tiling(g, patch_pixels(plan.planes), most, inner, bytes);
  if (!tiling) {
    return {};
  }
  plan.tiling = *tiling;
  const auto total = [&](int group) {
    return forward_layout(g, plan.tiling, plan.planes, plan.chunks, rows_n, group, bytes).total;
  };
  plan.group = all;
  plan.resident = total(all) <= budget;
  if (!plan.resident) {
    const int64_t free = budget - total(0);
    // Even, and the pitch of group + 1 chunks may round up by one.
    plan.group = static_cast<int>(free / (int64_t{16} * rows_n * plan.planes)) / 2 * 2;
    if (plan.group < 4) {
      return {};
    }
  }
  plan.shared_bytes = static_cast<size_t>(total(plan.group));
  const int threads = 32 * kPatchWarps * plan.warps_n;
  const int64_t most_blocks =
      gpu.multiprocessors * resident_blocks(gpu, plan.shared_bytes, threads);
  plan.blocks = static_cast<unsigned>(std::min(plan.tiling.tiles, most_blocks));

  const auto tiles = static_cast<double>(plan.tiling.tiles);
  const double pixels_src = static_cast<double>(g.n) * g.h_src * g.w_src;
  const double pixels_dst = static_cast<double>(g.n) * g.h_dst * g.w_dst;
  const double weights = static_cast<double>(rows_n) * all * kPatchChunk;
  plan.microseconds =
      model(gpu,
            static_cast<double>(bytes) * (pixels_src * g.c_src + pixels_dst * g.c_dst),
            2 * tiles * patch_pixels(plan.planes) * rows_n * static_cast<double>(up(all, 2) * 16) *
                products(plan.planes),
            tiles * patch_loads(g, plan.tiling, inner, bytes) * plan.chunks * kPatchChunk +
                weights * (plan.resident ? plan.blocks : tiles));
  return plan;
}

// Shared memory of grad_weight.
struct GradLayout {
  int pitch_src, pitch_dst;
  int64_t plane_src, plane_dst;  // bytes of one plane
  int64_t constants, rows, src, total;
};
inline GradLayout grad_layout(const PatchTiling& t, int planes, int chunks_src, int chunks_dst) {
  GradLayout l{};
  l.pitch_dst = static_cast<int>(patch_pitch(chunks_dst));
  l.pitch_src = static_cast<int>(patch_pitch(chunks_src));
  l.plane_dst = int64_t{kPatchGradPixels} * l.pitch_dst;
  l.plane_src = int64_t{t.patch_h} * t.patch_w * l.pitch_src;
  l.src = l.plane_dst * planes;
  l.constants = l.src + l.plane_src * planes;  // a row of ones, a row of zeros
  l.rows = l.constants + 32;
  l.total = l.rows + 4 * kPatchGradPixels;
  return l;
}

// Chunks of grad_output that a block holds, whole 16-row products.
inline int grad_chunks_dst(const PatchGeometry& g) {
  return static_cast<int>(2 * std::min<int64_t>(kPatchGradRows, up(g.c_dst, kPatchStep)));
}

inline std::optional<PatchPlan> plan_grad_weight(const PatchGeometry& g,
                                                 Dtype dtype,
                                                 Float32Precision precision,
                                                 bool src_inner,
                                                 bool bias,
                                                 const Gpu& gpu) {
  PatchPlan plan{};
  const int64_t bytes = size_of(dtype);
  plan.planes = planes(dtype, precision);
  const int all_chunks = static_cast<int>(up(g.c_src, kPatchChunk));
  const int all_taps = g.k_h * g.k_w;
  // A block takes all taps of as many channels as it has columns for.
  const int widest = std::clamp(kPatchGradTaps / all_taps, 1, all_chunks);
  plan.groups_c = up(all_chunks, widest);
  plan.chunks = static_cast<int>(up(all_chunks, plan.groups_c));
  plan.groups_t = up(all_taps, kPatchGradTaps / plan.chunks);
  plan.taps = static_cast<int>(up(all_taps, plan.groups_t));
  plan.groups_m = up(g.c_dst, kPatchGradChannels);
  const int chunks_dst = grad_chunks_dst(g);
  const int64_t budget = gpu.shared_bytes;
  const int64_t fixed = grad_layout(PatchTiling{}, plan.planes, plan.chunks, chunks_dst).total;
  const int64_t most = (budget - fixed) / (plan.planes * patch_pitch(plan.chunks));
  const auto tiling = best_tiling(g, kPatchGradPixels, most, src_inner, bytes);
  if (!tiling) {
    return {};
  }
  plan.tiling = *tiling;
  plan.shared_bytes =
      static_cast<size_t>(grad_layout(plan.tiling, plan.planes, plan.chunks, chunks_dst).total);
  // Two blocks per SM; and no sum in one chain over more than 2^16 pixels, unless the partial sums
  // took more than 256 MB.
  const int64_t groups = plan.groups_m * plan.groups_c * plan.groups_t;
  constexpr int64_t kChain = (1 << 16) / kPatchGradPixels;
  constexpr int64_t kMostPartials = INT64_C(256) << 20;
  const int64_t sums = g.c_dst * (int64_t{all_taps} * g.c_src + (bias ? 1 : 0));
  const int64_t wanted =
      std::max<int64_t>(2 * gpu.multiprocessors / groups, up(plan.tiling.tiles, kChain));
  plan.splits =
      std::clamp<int64_t>(std::min(wanted, kMostPartials / (4 * sums)), 1, plan.tiling.tiles);
  const int64_t blocks = groups * plan.splits;
  if (blocks > INT64_C(2147483647)) {
    return {};
  }
  plan.blocks = static_cast<unsigned>(blocks);
  plan.workspace_bytes = static_cast<size_t>(4 * plan.splits * sums);

  const auto tiles = static_cast<double>(plan.tiling.tiles);
  const double pixels_src = static_cast<double>(g.n) * g.h_src * g.w_src;
  const double pixels_dst = static_cast<double>(g.n) * g.h_dst * g.w_dst;
  const double loads =
      patch_loads(g, plan.tiling, src_inner, bytes) * plan.chunks + kPatchGradPixels * chunks_dst;
  plan.microseconds =
      kLaunchMicroseconds +
      model(gpu,
            static_cast<double>(bytes) * (pixels_src * g.c_src + pixels_dst * g.c_dst) +
                2.0 * static_cast<double>(plan.workspace_bytes),
            2 * tiles * kPatchGradPixels * static_cast<double>(groups) * chunks_dst * 8 *
                (kPatchGradTaps + 1) * 8 * products(plan.planes),
            tiles * loads * static_cast<double>(groups) * kPatchChunk);
  return plan;
}

}  // namespace patch

// ---- plans and launches -------------------------------------------------------------------------
// No plan: another family must run the problem.

inline std::optional<PatchPlan> plan_patch(const DilatedConv2dParams& p, const Gpu& gpu) {
  if (!patch::covers(p.shape, p.dtype, gpu)) {
    return {};
  }
  const PatchGeometry g = patch::geometry(p.shape);
  return patch::plan_forward(
      g, p.dtype, p.precision, patch::channels_inner(p.input_strides, g.c_src), gpu);
}

inline std::optional<PatchPlan> plan_patch(const DilatedConv2dGradInputParams& p, const Gpu& gpu) {
  if (!patch::covers(p.shape, p.dtype, gpu)) {
    return {};
  }
  const PatchGeometry g = patch::reversed(patch::geometry(p.shape));
  return patch::plan_forward(
      g, p.dtype, p.precision, patch::channels_inner(p.grad_output_strides, g.c_src), gpu);
}

inline std::optional<PatchPlan> plan_patch(const DilatedConv2dGradWeightParams& p, const Gpu& gpu) {
  if (!patch::covers(p.shape, p.dtype, gpu)) {
    return {};
  }
  const PatchGeometry g = patch::geometry(p.shape);
  return patch::plan_grad_weight(g,
                                 p.dtype,
                                 p.precision,
                                 patch::channels_inner(p.input_strides, g.c_src),
                                 p.grad_bias != nullptr,
                                 gpu);
}

Status launch_patch(const DilatedConv2dParams& params, const PatchPlan& plan, Stream stream);
Status launch_patch(const DilatedConv2dGradInputParams& params,
                    const PatchPlan& plan,
                    Stream stream);
Status launch_patch(const DilatedConv2dGradWeightParams& params,
                    const PatchPlan& plan,
                    Stream stream);

}  // namespace dilseg::cuda
