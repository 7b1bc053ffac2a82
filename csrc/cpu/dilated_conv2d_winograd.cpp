// SPDX-License-Identifier: Apache-2.0
//
// The transforms of Winograd's convolution, on the CPU; the kernels are in
// dilated_conv2d_winograd_kernels.h, once per instruction set.
#include "cpu/dilated_conv2d_winograd.h"

#include <atomic>

#define DILSEG_KERNELS "cpu/dilated_conv2d_winograd_kernels.h"
#include "cpu/instruction_sets.h"

namespace dilseg::cpu {

WinogradPlan winograd_plan(const WinogradParams& params) { return baseline::plan_of(params); }

void winograd_weight(const WinogradParams& params, float* u, const ParallelFor& pool) {
  DILSEG_BEST(winograd_weight, params, u, pool);
}

void winograd_input(const WinogradParams& params,
                    const WinogradPlan& plan,
                    int64_t first_piece,
                    int64_t pieces,
                    const WinogradMatrix& v,
                    const ParallelFor& pool) {
  DILSEG_BEST(winograd_input, params, plan, first_piece, pieces, v, pool);
}

bool winograd_output(const WinogradParams& params,
                     const WinogradPlan& plan,
                     int64_t first_piece,
                     int64_t pieces,
                     const WinogradMatrix& m,
                     const ParallelFor& pool) {
  return DILSEG_BEST(winograd_output, params, plan, first_piece, pieces, m, pool);
}

}  // namespace dilseg::cpu
