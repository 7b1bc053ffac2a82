// SPDX-License-Identifier: Apache-2.0
//
// Which kernels run a convolution: a pure function of the problem and the GPU, without CUDA, so
// that the choice never changes between runs and can be tested on any machine. Each family of
// kernels plans for itself, with a modelled time; the fastest plan wins.
#pragma once

#include "cuda/common/gpu.h"
#include "cuda/dilated_conv2d/depthwise.h"
#include "cuda/dilated_conv2d/direct.h"
#include "cuda/dilated_conv2d/gemm.h"
#include "cuda/dilated_conv2d/gemm_grad_weight.h"
#include "cuda/dilated_conv2d/patch.h"
#include "cuda/dilated_conv2d/wgmma.h"
#include "cuda/dilated_conv2d/wgmma_grad_weight.h"

#include <cstddef>
#include <optional>

namespace dilseg::cuda {

enum class ConvKernel { kDirect, kGemm, kPatch, kDepthwise, kWgmma };

struct DilatedConv2dPlan {
  ConvKernel kernel = ConvKernel::kDirect;
  size_t workspace_bytes = 0;
  double microseconds = 0;  // modelled
  // The one of the kernel counts.
  GemmPlan gemm = {};
  PatchPlan patch = {};
  DepthwisePlan depthwise = {};
  WgmmaPlan wgmma = {};
};

// P: any of the three parameter structs; addresses count for their alignment only. The fastest of
// the kernels that can run the problem, the direct ones being able to run all; `preferred` wins
// whatever its time, where it can run the problem.
template <class P>
DilatedConv2dPlan plan_dilated_conv2d(const P& params,
                                      const Gpu& gpu,
                                      std::optional<ConvKernel> preferred = {}) {
  DilatedConv2dPlan best;
  best.microseconds = direct_microseconds(params, gpu);
  if (preferred == ConvKernel::kDirect) {
    return best;
  }
  bool decided = false;
  const auto offer = [&](ConvKernel kernel, const auto& plan, auto DilatedConv2dPlan::* member) {
    if (!plan.has_value() || decided) {
      return;
    }
    decided = preferred == kernel;
    if (decided || plan->microseconds < best.microseconds) {
      best.kernel = kernel;
      best.workspace_bytes = plan->workspace_bytes;
      best.microseconds = plan->microseconds;
      best.*member = *plan;
    }
  };
  offer(ConvKernel::kDepthwise, plan_depthwise(params, gpu), &DilatedConv2dPlan::depthwise);
  offer(ConvKernel::kPatch, plan_patch(params, gpu), &DilatedConv2dPlan::patch);
  offer(ConvKernel::kGemm, plan_gemm(params, gpu), &DilatedConv2dPlan::gemm);
  offer(ConvKernel::kWgmma, plan_wgmma(params, gpu), &DilatedConv2dPlan::wgmma);
  return best;
}

}  // namespace dilseg::cuda
