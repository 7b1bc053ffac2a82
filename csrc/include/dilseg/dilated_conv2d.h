// SPDX-License-Identifier: Apache-2.0
//
// Two-dimensional convolution (cross-correlation) with stride, zero padding, dilation and groups:
//
//   output[n, o, y, x] = act(bias[o] + sum_{c, i, j} weight[o, c, i, j] *
//       input[n, g*c_in/groups + c, y*stride_h - pad_top  + i*dil_h,
//                                   x*stride_w - pad_left + j*dil_w])
//
// with g = o / (c_out/groups), where input is zero outside the map. The gradients with respect to
// input, weight and bias are launchers of their own. Tensors may have any strides.
#pragma once

#include "dilseg/types.h"

namespace dilseg {

// How products of float32 tensors are formed on tensor cores. kIeee: as exact as float32 arithmetic
// (three bfloat16 parts of each number, six products, sums promoted to float32); kBf16x3: two parts
// and three products, relative error about 4e-6; kTf32: inputs rounded to 11 bits, about 3e-4.
enum class Float32Precision { kIeee, kBf16x3, kTf32 };

// Sizes of one problem; padding at the bottom and on the right is implied by h_out and w_out.
struct DilatedConv2dShape {
  int64_t n, c_in, h_in, w_in;
  int64_t c_out, h_out, w_out;
  int64_t k_h, k_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;
  int64_t dil_h, dil_w;
  int64_t groups;
};

struct DilatedConv2dParams {
  DilatedConv2dShape shape;
  Dtype dtype;         // of every tensor
  const void* input;   // [n, c_in, h_in, w_in]
  const void* weight;  // [c_out, c_in/groups, k_h, k_w]
  const void* bias;    // [c_out], contiguous, or null
  void* output;        // [n, c_out, h_out, w_out]
  Strides4 input_strides;
  Strides4 weight_strides;
  Strides4 output_strides;
  bool relu;  // output = max(output, 0) before the rounding; nan stays nan
  Float32Precision precision;
  void* workspace;  // of the plan's size
};

struct DilatedConv2dGradInputParams {
  DilatedConv2dShape shape;
  Dtype dtype;
  const void* grad_output;  // [n, c_out, h_out, w_out]
  const void* weight;       // [c_out, c_in/groups, k_h, k_w]
  void* grad_input;         // [n, c_in, h_in, w_in]
  Strides4 grad_output_strides;
  Strides4 weight_strides;
  Strides4 grad_input_strides;
  Float32Precision precision;
  void* workspace;
};

struct DilatedConv2dGradWeightParams {
  DilatedConv2dShape shape;
  Dtype dtype;
  const void* grad_output;  // [n, c_out, h_out, w_out]
  const void* input;        // [n, c_in, h_in, w_in]
  void* grad_weight;        // [c_out, c_in/groups, k_h, k_w]
  void* grad_bias;          // [c_out], contiguous, or null
  Strides4 grad_output_strides;
  Strides4 input_strides;
  Strides4 grad_weight_strides;
  Float32Precision precision;
  void* workspace;
};

namespace cuda {

struct DilatedConv2dPlan;  // cuda/dilated_conv2d/select.h

// Each runs the plan that `plan_dilated_conv2d` made for the parameters (without the workspace),
// writes every element of its outputs (an empty sum is zero), allocates nothing and does not wait
// for the GPU.
Status launch_dilated_conv2d(const DilatedConv2dParams& params,
                             const DilatedConv2dPlan& plan,
                             Stream stream);
Status launch_dilated_conv2d_grad_input(const DilatedConv2dGradInputParams& params,
                                        const DilatedConv2dPlan& plan,
                                        Stream stream);
Status launch_dilated_conv2d_grad_weight(const DilatedConv2dGradWeightParams& params,
                                         const DilatedConv2dPlan& plan,
                                         Stream stream);

}  // namespace cuda

namespace cpu {

// Whether the functions below compute this problem, and without more zeros than pixels: one input
// channel per group, few output channels for each, and a window that is not much larger than the
// map.
constexpr bool fits_dilated_conv2d_depthwise(const DilatedConv2dShape& s) {
  return s.groups == s.c_in && s.c_out <= 4 * s.c_in && (s.k_h - 1) * s.dil_h <= 4 * s.h_in + 16 &&
         (s.k_w - 1) * s.dil_w <= 4 * s.w_in + 16;
}

// Each writes every element of its outputs, which must hold at least one, as must the other
// tensors. They return false where a weight, or a gradient that they computed, is not finite: they
// multiply zeros beyond the map, which then may have put nan where there should be none.
bool dilated_conv2d_depthwise(const DilatedConv2dParams& params, const ParallelFor& pool);
bool dilated_conv2d_depthwise_grad_input(const DilatedConv2dGradInputParams& params,
                                         const ParallelFor& pool);
bool dilated_conv2d_depthwise_grad_weight(const DilatedConv2dGradWeightParams& params,
                                          const ParallelFor& pool);

}  // namespace cpu
}  // namespace dilseg
