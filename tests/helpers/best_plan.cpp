// SPDX-License-Identifier: Apache-2.0
//
// Plans of convolutions: reads one problem per line from the standard input,
//   n c_in c_out size kernel dilation groups channels_last float32 arch multiprocessors
// (stride 1, padded to keep the size, float32 as exact as float32), and writes the modelled
// microseconds of forward, grad_input and grad_weight. Compiled by helpers/best_plan.py.
#include "cuda/dilated_conv2d/select.h"

#include <cstdio>

using namespace dilseg;
using namespace dilseg::cuda;

static Strides4 dense(const Sizes4& s, bool channels_last) {
  return channels_last ? Strides4{s.h * s.w * s.c, 1, s.w * s.c, s.c}
                       : Strides4{s.c * s.h * s.w, s.h * s.w, s.w, 1};
}

int main() {
  long n, c_in, c_out, size, k, d, groups;
  int last, floats, arch, multiprocessors;
  while (std::scanf("%ld %ld %ld %ld %ld %ld %ld %d %d %d %d",
                    &n,
                    &c_in,
                    &c_out,
                    &size,
                    &k,
                    &d,
                    &groups,
                    &last,
                    &floats,
                    &arch,
                    &multiprocessors) == 11) {
    const long pad = d * (k - 1) / 2;
    const DilatedConv2dShape s = {.n = n,
                                  .c_in = c_in,
                                  .h_in = size,
                                  .w_in = size,
                                  .c_out = c_out,
                                  .h_out = size,
                                  .w_out = size,
                                  .k_h = k,
                                  .k_w = k,
                                  .stride_h = 1,
                                  .stride_w = 1,
                                  .pad_top = pad,
                                  .pad_left = pad,
                                  .dil_h = d,
                                  .dil_w = d,
                                  .groups = groups};
    const Gpu gpu = {arch, multiprocessors, shared_bytes_of(arch), arch == 90};
    const Dtype dtype = floats != 0 ? Dtype::kFloat32 : Dtype::kBFloat16;
    const Strides4 in = dense(input_sizes(s), last != 0);
    const Strides4 out = dense(output_sizes(s), last != 0);
    const Strides4 weight = dense(weight_sizes(s), last != 0);
    const DilatedConv2dParams forward = {.shape = s,
                                         .dtype = dtype,
                                         .input = nullptr,
                                         .weight = nullptr,
                                         .bias = nullptr,
                                         .output = nullptr,
                                         .input_strides = in,
                                         .weight_strides = weight,
                                         .output_strides = out,
                                         .relu = false,
                                         .precision = Float32Precision::kIeee,
                                         .workspace = nullptr};
    const DilatedConv2dGradInputParams grad_input = {.shape = s,
                                                     .dtype = dtype,
                                                     .grad_output = nullptr,
                                                     .weight = nullptr,
                                                     .grad_input = nullptr,
                                                     .grad_output_strides = out,
                                                     .weight_strides = weight,
                                                     .grad_input_strides = in,
                                                     .precision = Float32Precision::kIeee,
                                                     .workspace = nullptr};
    const DilatedConv2dGradWeightParams grad_weight = {.shape = s,
                                                       .dtype = dtype,
                                                       .grad_output = nullptr,
                                                       .input = nullptr,
                                                       .grad_weight = nullptr,
                                                       .grad_bias = nullptr,
                                                       .grad_output_strides = out,
                                                       .input_strides = in,
                                                       .grad_weight_strides = weight,
                                                       .precision = Float32Precision::kIeee,
                                                       .workspace = nullptr};
    std::printf("%.17g %.17g %.17g\n",
                plan_dilated_conv2d(forward, gpu).microseconds,
                plan_dilated_conv2d(grad_input, gpu).microseconds,
                plan_dilated_conv2d(grad_weight, gpu).microseconds);
  }
}
