// SPDX-License-Identifier: Apache-2.0
//
// The steps of a 3x3 convolution by Winograd's F(2x2, 3x3), in float; the products of matrices
// between them are the caller's. See cpu/dilated_conv2d_winograd_kernels.h.
#pragma once

#include "dilseg/types.h"

namespace dilseg::cpu {

// Tiles of a band, which stay in the level-1 cache.
constexpr int64_t kWinogradBand = 512;

// result[n, o, y, x] = act(bias[o] + sum_cij weight[o, c, i, j] source[n, c, y - pad_top + i*dil_h,
// x - pad_left + j*dil_w]) with i, j < 3. Padding and strides may be negative.
struct WinogradParams {
  int64_t n, c_in, h_in, w_in;
  int64_t c_out, h_out, w_out;
  int64_t pad_top, pad_left;
  int64_t dil_h, dil_w;
  const float* source;
  const float* weight;
  const float* bias;  // or null
  float* result;
  Strides4 source_strides;
  Strides4 weight_strides;
  Strides4 result_strides;
  bool relu;
};

// How the results are cut into pieces of rows * columns tiles.
struct WinogradPlan {
  int64_t phases_h, phases_w;
  int64_t bands;
  int64_t rows, columns;

  int64_t tiles() const { return rows * columns; }
  int64_t pieces(int64_t n) const { return n * phases_h * phases_w * bands; }
};

// 16 matrices whose rows are channels: element (k, c, t) lies at data + k*matrix + c*row + t.
struct WinogradMatrix {
  float* data;
  int64_t matrix, row;
};
// Values that winograd_input writes beyond the last row of a matrix, at most.
constexpr int64_t kWinogradSlack = 16;

WinogradPlan winograd_plan(const WinogradParams& params);
// `u` is [16][c_out][c_in].
void winograd_weight(const WinogradParams& params, float* u, const ParallelFor& pool);
void winograd_input(const WinogradParams& params,
                    const WinogradPlan& plan,
                    int64_t first_piece,
                    int64_t pieces,
                    const WinogradMatrix& v,
                    const ParallelFor& pool);
// False where a result is not finite: then others of its tile may be nan that should not.
bool winograd_output(const WinogradParams& params,
                     const WinogradPlan& plan,
                     int64_t first_piece,
                     int64_t pieces,
                     const WinogradMatrix& m,
                     const ParallelFor& pool);

}  // namespace dilseg::cpu
