// SPDX-License-Identifier: Apache-2.0
//
// The class of every upsampled pixel, on the CPU; the kernel is in upsample_argmax_kernels.h, once
// per instruction set.
#include "dilseg/upsample_argmax.h"

#include "dilseg/upsample_index.h"

#define DILSEG_KERNELS "cpu/upsample_argmax_kernels.h"
#include "cpu/instruction_sets.h"

namespace dilseg::cpu {

void upsample_argmax(const UpsampleArgmaxParams& params, const ParallelFor& pool) {
  DILSEG_BEST(upsample_argmax, params, pool);
}

}  // namespace dilseg::cpu
