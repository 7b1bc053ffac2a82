// SPDX-License-Identifier: Apache-2.0
//
// How the weight gradient is cut into tiles and what that costs: pure functions, without CUDA. The
// kernels are in gemm_grad_weight.cu.
#pragma once

#include "cuda/dilated_conv2d/direct.h"
#include "cuda/dilated_conv2d/gemm.h"
#include "cuda/dilated_conv2d/meeting.h"
#include "cuda/dilated_conv2d/model.h"
#include "cuda/dilated_conv2d/packed_bias.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>

namespace dilseg::cuda {

constexpr int kGradWeightStages = 4;
// Of k in one stage and one row or column of the tile.
constexpr int kGradWeightStageBytes = 64;

// Blocks that fit one SM's registers. Sums that are promoted need two sets of accumulators.
constexpr int grad_weight_blocks(GemmTile tile, bool promotes) {
  if (tile == GemmTile::kLarge) {
    return promotes ? 1 : 2;
  }
  return promotes ? 3 : 4;
}

constexpr size_t grad_weight_shared_bytes(GemmTile tile) {
  return static_cast<size_t>(kGradWeightStages) * 2 * gemm_tile_size(tile) * kGradWeightStageBytes;
}

// Whether offsets inside an image fit 32 bits.
inline bool has_short_offsets(const Strides4& strides, const Sizes4& s) {
  const auto reach = [](int64_t size, int64_t stride) {
    return size > 1 ? (size - 1) * stride : 0;
  };
  return reach(s.h, strides.h) + reach(s.w, strides.w) + s.c < INT64_C(1) << 31;
}

// Partial sums are [split][group][tap][c_out / groups][pitch], in float.
struct GradWeightPartials {
  int64_t pitch;     // c_in / groups, even: sums are written in pairs
  int64_t elements;  // of one split
};

inline GradWeightPartials grad_weight_partials(const DilatedConv2dShape& s) {
  const int64_t pitch = (s.c_in / s.groups + 1) / 2 * 2;
  return {pitch, s.k_h * s.k_w * s.c_out * pitch};
}

// Adds the splits in order and writes the weight; float16 and bfloat16.
Status launch_grad_weight_sum(const DilatedConv2dGradWeightParams& params,
                              int splits,
                              float* partials,
                              Stream stream);

// Whether the sums are final and lie side by side in the weight: no partial sums then.
inline bool grad_weight_is_direct(const DilatedConv2dGradWeightParams& p, int splits) {
  return splits == 1 && (p.grad_weight_strides.c == 1 || p.shape.c_in == p.shape.groups);
}

// Where things are in the workspace, and its size. What is not packed takes no room.
struct GradWeightSpace {
  size_t grad_output, input, partials, bias, bytes;
};

inline GradWeightSpace grad_weight_space(const DilatedConv2dGradWeightParams& p,
                                         const GemmPlan& plan) {
  constexpr size_t kBoundary = 256;
  const auto round_up = [](size_t bytes) {
    return (bytes + kBoundary - 1) / kBoundary * kBoundary;
  };
  GradWeightSpace space{};
  if (plan.pack_grad_output) {
    space.input = round_up(packed_bytes(output_sizes(p.shape), p.dtype));
  }
  space.partials = space.input;
  if (plan.pack_input) {
    space.partials += round_up(packed_bytes(input_sizes(p.shape), p.dtype));
  }
  space.bias = space.partials;
  if (!grad_weight_is_direct(p, plan.splits)) {
    space.bias += round_up(sizeof(float) * static_cast<size_t>(plan.splits) *
                           static_cast<size_t>(grad_weight_partials(p.shape).elements));
  }
  space.bytes = space.bias;
  if (p.grad_bias != nullptr) {
    space.bytes += plan_packed_bias(output_sizes(p.shape), p.dtype).workspace_bytes;
  }
  return space;
}

// Output positions along one axis that meet the map, over the taps.
struct Meetings {
  double mean;
  int64_t most;
};

inline Meetings meetings(
    int64_t taps, int64_t dilation, int64_t stride, int64_t pad, int64_t in, int64_t out) {
  Meetings found{};
  for (int64_t i = 0; i < taps; ++i) {
    const Range range = meeting(static_cast<int>(i * dilation),
                                static_cast<int>(stride),
                                static_cast<int>(pad),
                                static_cast<int>(in),
                                static_cast<int>(out));
    const int64_t size = range.end - range.begin;
    found.mean += static_cast<double>(size) / static_cast<double>(taps);
    found.most = std::max(found.most, size);
  }
  return found;
}

// The main kernel: every block takes `steps` stages (`most` at most), those of one SM share its
// tensor cores and its part of the cache's rate, and a block alone waits for itself.
inline double grad_weight_microseconds(const DilatedConv2dGradWeightParams& p,
                                       const Gpu& gpu,
                                       GemmTile tile,
                                       double blocks,
                                       double steps,
                                       double most) {
  constexpr double kLatencyOfFourWarps = 0.15;
  // Warps of the small tile load (and split) their operands for half as many products.
  constexpr double kSmallCost = 1.15;
  const bool promotes = p.dtype == Dtype::kFloat32 && p.precision != Float32Precision::kTf32;
  const double latency = kLatencyOfFourWarps / (promotes && tile == GemmTile::kLarge ? 2 : 1);
  const double size = gemm_tile_size(tile);
  const double sms = gpu.multiprocessors;
  // An SM has 1 KB more than a block may ask for, and keeps 1 KB per block.
  const double by_memory =
      (gpu.shared_bytes + 1024) / static_cast<double>(grad_weight_shared_bytes(tile) + 1024);
  const double resident =
      std::clamp<double>(static_cast<int>(by_memory), 1, grad_weight_blocks(tile, promotes));
  const double depth = kGradWeightStageBytes / static_cast<double>(size_of(p.dtype));
  const double flops = 2 * size * size * depth * (tile == GemmTile::kSmall ? kSmallCost : 1) /
                       (mma_flops(gpu, p.dtype, p.precision) / sms);
  const double bytes = 2 * size * kGradWeightStageBytes / (cache_bytes(gpu) / sms);
  const auto step = [&](double shared_by) {
    return std::max({shared_by * flops, shared_by * bytes, flops + latency});
  };
  const double slots = resident * sms;
  const auto whole = static_cast<double>(static_cast<int64_t>(blocks / slots));
  const double rest = blocks - whole * slots;
  const auto last = static_cast<double>(static_cast<int64_t>((rest + sms - 1) / sms));
  const double time = steps * (whole * step(resident) + (last > 0 ? step(last) : 0));
  return std::max(time, most * step(whole > 0 ? resident : last));
}

inline std::optional<GemmPlan> plan_gemm(const DilatedConv2dGradWeightParams& p, const Gpu& gpu) {
  constexpr int64_t kMostBlocks = INT64_C(1) << 31;
  constexpr int64_t kMostPixels = INT64_C(1) << 34;  // their stages are counted in 32 bits
  constexpr int64_t kMostTaps = 1024;                // of an axis: the plan visits each
  constexpr int kMostSplits = 1024;
  constexpr double kFewestSteps = 4;       // of a split
  constexpr double kMostPartials = 256e6;  // bytes that splits may cost
  const DilatedConv2dShape& s = p.shape;
  const auto smallest =
      std::min({s.n, s.c_in, s.c_out, s.k_h, s.k_w, s.h_in, s.w_in, s.h_out, s.w_out});
  if (p.dtype == Dtype::kFloat64 || gpu.arch < 80 || smallest < 1 || s.n >= kMostBlocks ||
      !fits_dilated_conv2d(s) || std::max(s.k_h, s.k_w) > kMostTaps ||
      s.n > kMostPixels / (s.h_out * s.w_out)) {
    return {};
  }
  const int64_t chunk = 16 / size_of(p.dtype);
  const int64_t group_in = s.c_in / s.groups;
  const int64_t group_out = s.c_out / s.groups;
  if (s.groups > 1 && (group_in % chunk != 0 || group_out % chunk != 0)) {
    return {};
  }
  const Sizes4 in = input_sizes(s);
  const Sizes4 out = output_sizes(s);
  if (!has_short_offsets(packed_strides(in, p.dtype), in) ||
      !has_short_offsets(packed_strides(out, p.dtype), out)) {
    return {};
  }
  GemmPlan plan{};
  plan.pack_input =
      !is_packed(p.input, p.input_strides, in, p.dtype) || !has_short_offsets(p.input_strides, in);
  plan.pack_grad_output = !is_packed(p.grad_output, p.grad_output_strides, out, p.dtype) ||
                          !has_short_offsets(p.grad_output_strides, out);

  const auto copied = [&](double bytes) { return bytes / copy_bytes(gpu) + kLaunchMicroseconds; };
  const auto input_bytes = static_cast<double>(packed_bytes(in, p.dtype));
  const auto output_bytes = static_cast<double>(packed_bytes(out, p.dtype));
  double around = 0;
  around += plan.pack_input ? copied(2 * input_bytes) : 0;
  around += plan.pack_grad_output ? copied(2 * output_bytes) : 0;
  around += p.grad_bias != nullptr ? copied(output_bytes) + kLaunchMicroseconds : 0;

  const Meetings rows = meetings(s.k_h, s.dil_h, s.stride_h, s.pad_top, s.h_in, s.h_out);
  const Meetings columns = meetings(s.k_w, s.dil_w, s.stride_w, s.pad_left, s.w_in, s.w_out);
  const double stage = kGradWeightStageBytes / static_cast<double>(size_of(p.dtype));
  const double images = static_cast<double>(s.n) / stage;
  const double steps = images * rows.mean * columns.mean;
  const double most = images * static_cast<double>(rows.most * columns.most);
  const auto weights = static_cast<double>(s.c_out * group_in * s.k_h * s.k_w);
  const auto partials = static_cast<double>(grad_weight_partials(s).elements) * sizeof(float);

  bool found = false;
  for (const GemmTile tile : {GemmTile::kLarge, GemmTile::kSmall}) {
    const int64_t size = gemm_tile_size(tile);
    const int64_t tiles =
        s.groups * s.k_h * s.k_w * ((group_out + size - 1) / size) * ((group_in + size - 1) / size);
    for (int splits = 1; splits <= kMostSplits; splits = next_splits(splits)) {
      if (tiles * splits >= kMostBlocks ||
          (splits > 1 && (most < splits * kFewestSteps || splits * partials > kMostPartials))) {
        break;
      }
      double time = kLaunchMicroseconds + around +
                    grad_weight_microseconds(p,
                                             gpu,
                                             tile,
                                             static_cast<double>(tiles * splits),
                                             std::max(1., steps / splits),
                                             std::max(1., most / splits));
      const double written = weights * static_cast<double>(size_of(p.dtype));
      time += grad_weight_is_direct(p, splits) ? written / copy_bytes(gpu)
                                               : copied(2 * splits * partials + written);
      if (!found || time < plan.microseconds) {
        found = true;
        plan.tile = tile;
        plan.splits = splits;
        plan.microseconds = time;
      }
    }
  }
  if (!found) {
    return {};
  }
  plan.workspace_bytes = grad_weight_space(p, plan).bytes;
  return plan;
}

}  // namespace dilseg::cuda
