// SPDX-License-Identifier: Apache-2.0
//
// Convolution as implicit GEMM on the tensor cores of sm_80 and newer: which tiles run a problem,
// as pure functions without CUDA. Every group is a GEMM of its own,
//   forward      pixels of the output x c_out,  k = taps x c_in
//   grad_input   pixels of the input  x c_in,   k = taps x c_out
//   grad_weight  c_out x c_in for every tap,    k = pixels of the output
// over tensors packed as pack.h says.
#pragma once

#include "cuda/common/gpu.h"
#include "cuda/dilated_conv2d/pack.h"
#include "dilseg/dilated_conv2d.h"

#include <cstddef>
#include <cstdint>
#include <optional>

namespace dilseg::cuda {

enum class GemmTile { kLarge, kSmall };

// Rows and columns of a block's tile.
constexpr int gemm_tile_size(GemmTile tile) { return tile == GemmTile::kLarge ? 128 : 64; }

struct GemmPlan {
  GemmTile tile;
  // Parts of the sum over k, each a block of its own; more than one go through the workspace.
  int splits;
  // Pixels of a tile as a box of the map; 0 x 0 for runs in memory order.
  int box_h, box_w;
  bool pack_input;        // or grad_output, in grad_input
  bool pack_weight;       // forward and grad_input
  bool pack_grad_output;  // grad_weight
  size_t workspace_bytes;
  double microseconds;  // modelled
};

std::optional<GemmPlan> plan_gemm(const DilatedConv2dParams& params, const Gpu& gpu);
std::optional<GemmPlan> plan_gemm(const DilatedConv2dGradInputParams& params, const Gpu& gpu);
std::optional<GemmPlan> plan_gemm(const DilatedConv2dGradWeightParams& params, const Gpu& gpu);

Status launch_gemm(const DilatedConv2dParams& params, const GemmPlan& plan, Stream stream);
Status launch_gemm(const DilatedConv2dGradInputParams& params, const GemmPlan& plan, Stream stream);
Status launch_gemm(const DilatedConv2dGradWeightParams& params,
                   const GemmPlan& plan,
                   Stream stream);

}  // namespace dilseg::cuda
