// SPDX-License-Identifier: Apache-2.0
//
// Bilinear upsampling plus skip and its gradient, on the CPU; the kernels are in
// upsample_add_kernels.h, once per instruction set.
#include "dilseg/upsample_add.h"

#include "dilseg/upsample_index.h"

#define DILSEG_KERNELS "cpu/upsample_add_kernels.h"
#include "cpu/instruction_sets.h"

namespace dilseg::cpu {

void upsample_add(const UpsampleAddParams& params, const ParallelFor& pool) {
  DILSEG_BEST(upsample_add, params, pool);
}

void upsample_add_backward(const UpsampleAddBackwardParams& params, const ParallelFor& pool) {
  DILSEG_BEST(upsample_add_backward, params, pool);
}

}  // namespace dilseg::cpu
