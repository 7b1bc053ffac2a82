// SPDX-License-Identifier: Apache-2.0
//
// The class of every pixel of bilinearly upsampled logits, and its softmax probability, without the
// upsampled logits. Torch-free contract. "acc" is double for double logits and float for all
// others.
#pragma once

#include "dilseg/types.h"
#include "dilseg/upsample_add.h"

#include <cstdint>

namespace dilseg {

struct UpsampleArgmaxParams {
  Dtype dtype;  // of input
  IndexType label_type;
  UpsampleGeometry geometry;
  const void* input;  // [n, c, h_in, w_in] logits
  Strides4 input_strides;
  // [n, h_out, w_out] dense: the first class with the largest logit; the first nan, if there is one
  void* label;
  void* confidence;  // [n, h_out, w_out] dense, acc: softmax of that class; null: not wanted
};

namespace cpu {
void upsample_argmax(const UpsampleArgmaxParams& params, const ParallelFor& pool);
}  // namespace cpu

namespace cuda {
Status launch_upsample_argmax(const UpsampleArgmaxParams& params, Stream stream);
}  // namespace cuda

}  // namespace dilseg
