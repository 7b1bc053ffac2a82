// SPDX-License-Identifier: Apache-2.0
//
// Softmax cross-entropy over [n, c, h, w] logits and its gradient, on the CPU; the kernels are in
// cross_entropy_kernels.h, once per instruction set.
#include "dilseg/cross_entropy.h"

#define DILSEG_KERNELS "cpu/cross_entropy_kernels.h"
#include "cpu/instruction_sets.h"

namespace dilseg::cpu {

LabelError cross_entropy(const CrossEntropyParams& params, const ParallelFor& pool) {
  return DILSEG_BEST(cross_entropy, params, pool);
}

LabelError cross_entropy_backward(const CrossEntropyBackwardParams& params,
                                  const ParallelFor& pool) {
  return DILSEG_BEST(cross_entropy_backward, params, pool);
}

}  // namespace dilseg::cpu
