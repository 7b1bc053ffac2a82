// SPDX-License-Identifier: Apache-2.0
//
// Per-pixel softmax cross-entropy and its gradient. Torch-free contract.
// "acc" is double for double logits and float for all others.
#pragma once

#include "dilseg/types.h"

#include <cstdint>

namespace dilseg {

// Pixels whose losses are summed into one partial, in double and in a fixed order.
constexpr int64_t kCrossEntropyPixelsPerPartial = 256;

constexpr int64_t cross_entropy_partials(int64_t pixels) {
  return (pixels + kCrossEntropyPixelsPerPartial - 1) / kCrossEntropyPixelsPerPartial;
}

// What forward and backward share.
struct CrossEntropyProblem {
  Dtype dtype;  // of input
  IndexType target_type;
  Reduction reduction;
  int64_t n, c, h, w;
  int64_t ignore_index;
  double label_smoothing;  // in [0, 1]
  const void* input;       // [n, c, h, w] logits
  Strides4 input_strides;
  const void* target;  // [n, h, w] dense
  const void* weight;  // [c] dense, acc; null weighs every class 1
};

struct CrossEntropyParams {
  CrossEntropyProblem problem;
  void* loss;          // kNone: [n, h, w] dense, acc; else one acc
  void* logsumexp;     // [n, h, w] dense, acc; 0 at ignored pixels
  void* total_weight;  // one acc: the summed class weights of the labelled pixels
  double* partials;    // CUDA workspace [2, cross_entropy_partials(n * h * w)]; unused on the CPU
};

struct CrossEntropyBackwardParams {
  CrossEntropyProblem problem;
  const void* grad_output;   // like loss
  const void* logsumexp;     // from forward
  const void* total_weight;  // from forward
  void* grad_input;          // [n, c, h, w], dtype; every element is written
  Strides4 grad_input_strides;
};

// The first label outside [0, c) that is not ignore_index, in the order of the pixels [n, h, w].
struct LabelError {
  int64_t pixel = -1;  // -1: all labels are good
  int64_t label = 0;
};

namespace cpu {
// After a LabelError the outputs are incomplete.
LabelError cross_entropy(const CrossEntropyParams& params, const ParallelFor& pool);
LabelError cross_entropy_backward(const CrossEntropyBackwardParams& params,
                                  const ParallelFor& pool);
}  // namespace cpu

namespace cuda {
// A label out of range prints a line and traps.
Status launch_cross_entropy(const CrossEntropyParams& params, Stream stream);
Status launch_cross_entropy_backward(const CrossEntropyBackwardParams& params, Stream stream);
}  // namespace cuda

}  // namespace dilseg
