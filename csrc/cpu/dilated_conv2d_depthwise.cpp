// SPDX-License-Identifier: Apache-2.0
//
// Depthwise dilated convolution and its gradients, on the CPU; the kernels are in
// dilated_conv2d_depthwise_kernels.h, once per instruction set.
#include "dilseg/dilated_conv2d.h"

#include <atomic>

#define DILSEG_KERNELS "cpu/dilated_conv2d_depthwise_kernels.h"
#include "cpu/instruction_sets.h"

namespace dilseg::cpu {

bool dilated_conv2d_depthwise(const DilatedConv2dParams& params, const ParallelFor& pool) {
  return DILSEG_BEST(depthwise, params, pool);
}

bool dilated_conv2d_depthwise_grad_input(const DilatedConv2dGradInputParams& params,
                                         const ParallelFor& pool) {
  return DILSEG_BEST(depthwise_grad_input, params, pool);
}

bool dilated_conv2d_depthwise_grad_weight(const DilatedConv2dGradWeightParams& params,
                                          const ParallelFor& pool) {
  return DILSEG_BEST(depthwise_grad_weight, params, pool);
}

}  // namespace dilseg::cpu
