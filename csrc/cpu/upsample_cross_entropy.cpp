// SPDX-License-Identifier: Apache-2.0
//
// Softmax cross-entropy of upsampled logits and its gradient, on the CPU; the kernels are in
// upsample_cross_entropy_kernels.h, once per instruction set.
#include "dilseg/upsample_cross_entropy.h"

#include "dilseg/upsample_index.h"

#define DILSEG_KERNELS "cpu/upsample_cross_entropy_kernels.h"
#include "cpu/instruction_sets.h"

namespace dilseg::cpu {

LabelError upsample_cross_entropy(const UpsampleCrossEntropyParams& params,
                                  const ParallelFor& pool) {
  return DILSEG_BEST(upsample_cross_entropy, params, pool);
}

LabelError upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardParams& params,
                                           const ParallelFor& pool) {
  return DILSEG_BEST(upsample_cross_entropy_backward, params, pool);
}

}  // namespace dilseg::cpu
