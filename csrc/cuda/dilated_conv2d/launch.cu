// SPDX-License-Identifier: Apache-2.0
//
// Runs the kernels that a plan names.
#include "cuda/dilated_conv2d/select.h"

#include <cuda_runtime.h>

namespace dilseg::cuda {
namespace {

template <class P>
Status run(const P& params, const DilatedConv2dPlan& plan, Stream stream) {
  switch (plan.kernel) {
    case ConvKernel::kDirect:
      return launch_direct(params, stream);
    case ConvKernel::kGemm:
      return launch_gemm(params, plan.gemm, stream);
    case ConvKernel::kPatch:
      return launch_patch(params, plan.patch, stream);
    case ConvKernel::kDepthwise:
      return launch_depthwise(params, plan.depthwise, stream);
    case ConvKernel::kWgmma:
      return launch_wgmma(params, plan.wgmma, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

Status launch_dilated_conv2d(const DilatedConv2dParams& params,
                             const DilatedConv2dPlan& plan,
                             Stream stream) {
  return run(params, plan, stream);
}
Status launch_dilated_conv2d_grad_input(const DilatedConv2dGradInputParams& params,
                                        const DilatedConv2dPlan& plan,
                                        Stream stream) {
  return run(params, plan, stream);
}
Status launch_dilated_conv2d_grad_weight(const DilatedConv2dGradWeightParams& params,
                                         const DilatedConv2dPlan& plan,
                                         Stream stream) {
  return run(params, plan, stream);
}

}  // namespace dilseg::cuda
