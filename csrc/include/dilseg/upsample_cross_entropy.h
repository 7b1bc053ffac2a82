// SPDX-License-Identifier: Apache-2.0
//
// Softmax cross-entropy of bilinearly upsampled logits, without the upsampled logits, and its
// gradient at low resolution. Torch-free contract. "acc" is double for double logits and float for
// all others.
#pragma once

#include "dilseg/cross_entropy.h"
#include "dilseg/types.h"
#include "dilseg/upsample_add.h"

#include <cstddef>
#include <cstdint>

namespace dilseg {

// What forward and backward share. The pixels [n, h_out, w_out] are those of the labels.
struct UpsampleCrossEntropyProblem {
  Dtype dtype;  // of input
  IndexType target_type;
  Reduction reduction;
  UpsampleGeometry geometry;
  int64_t ignore_index;
  double label_smoothing;  // in [0, 1]
  const void* input;       // [n, c, h_in, w_in] logits
  Strides4 input_strides;
  const void* target;  // [n, h_out, w_out] dense
  const void* weight;  // [c] dense, acc; null weighs every class 1
};

struct UpsampleCrossEntropyParams {
  UpsampleCrossEntropyProblem problem;
  void* loss;          // kNone: [n, h_out, w_out] dense, acc; else one acc
  void* total_weight;  // one acc: the summed class weights of the labelled pixels
  // [n, c, h_in, w_in] dense, acc: gradient of the sum of the losses, every element is written;
  // null: not wanted. Scaling it gives the gradient of "sum" and "mean".
  void* sum_grad;
  void* workspace;  // CUDA: upsample_cross_entropy_workspace(problem, sum_grad != null) bytes
};

struct UpsampleCrossEntropyBackwardParams {
  UpsampleCrossEntropyProblem problem;
  const void* grad_output;   // like loss
  const void* total_weight;  // from forward
  void* grad_input;          // [n, c, h_in, w_in], dtype; every element is written
  Strides4 grad_input_strides;
  void* workspace;  // CUDA: upsample_cross_entropy_workspace(problem, true) bytes
};

namespace cpu {
// After a LabelError the outputs are incomplete.
LabelError upsample_cross_entropy(const UpsampleCrossEntropyParams& params,
                                  const ParallelFor& pool);
LabelError upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardParams& params,
                                           const ParallelFor& pool);
}  // namespace cpu

namespace cuda {
// Bytes of device memory that a launch needs besides its arguments.
size_t upsample_cross_entropy_workspace(const UpsampleCrossEntropyProblem& problem, bool gradient);

// A label out of range prints a line and traps.
Status launch_upsample_cross_entropy(const UpsampleCrossEntropyParams& params, Stream stream);
Status launch_upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardParams& params,
                                              Stream stream);
}  // namespace cuda

}  // namespace dilseg
