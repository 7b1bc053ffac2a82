// SPDX-License-Identifier: Apache-2.0
//
// Bilinear upsampling with a fused skip addition, and its gradient. Torch-free contract.
#pragma once

#include "dilseg/types.h"

#include <cstdint>

namespace dilseg {

// Longest axis and farthest origin. Axes are indexed in 32 bits, and loops may step past an end;
// offsets are 64-bit.
constexpr int64_t kUpsampleMaxSize = INT64_C(1) << 30;

// Sizes and index rule, see upsample_index.h.
struct UpsampleGeometry {
  int64_t n, c;
  int64_t h_in, w_in;
  int64_t h_out, w_out;     // the window that is computed
  double scale_h, scale_w;  // 0: the step follows from the sizes
  bool align_corners;
  Border border;
  int64_t origin_h, origin_w;  // where the window lies in the full output; may be negative
};

struct UpsampleAddParams {
  Dtype dtype;
  UpsampleGeometry geometry;
  const void* input;  // [n, c, h_in, w_in]
  Strides4 input_strides;
  const void* skip;  // [n, c, >= offset_h + h_out, >= offset_w + w_out]; null adds nothing
  Strides4 skip_strides;
  int64_t offset_h, offset_w;
  void* output;  // [n, c, h_out, w_out]
  Strides4 output_strides;
};

struct UpsampleAddBackwardParams {
  Dtype dtype;
  UpsampleGeometry geometry;
  const void* grad_output;  // [n, c, h_out, w_out]
  Strides4 grad_output_strides;
  void* grad_input;  // [n, c, h_in, w_in], every element is written
  Strides4 grad_input_strides;
};

namespace cpu {
void upsample_add(const UpsampleAddParams& params, const ParallelFor& pool);
void upsample_add_backward(const UpsampleAddBackwardParams& params, const ParallelFor& pool);
}  // namespace cpu

namespace cuda {
Status launch_upsample_add(const UpsampleAddParams& params, Stream stream);
Status launch_upsample_add_backward(const UpsampleAddBackwardParams& params, Stream stream);
}  // namespace cuda

}  // namespace dilseg
