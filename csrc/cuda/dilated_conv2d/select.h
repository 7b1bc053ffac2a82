// SPDX-License-Identifier: Apache-2.0
//
// Which kernels run a convolution: a pure function of the problem and the GPU, without CUDA, so
// that the choice never changes between runs and can be tested on any machine. Each family of
// kernels plans for itself, with a modelled time; the fastest plan wins.
#pragma once

#include "cuda/common/gpu.h"
#include "cuda/dilated_conv2d/direct.h"
#include "cuda/dilated_conv2d/gemm.h"
#include "cuda/dilated_conv2d/gemm_grad_weight.h"

#include <cstddef>
#include <optional>
#include <type_traits>

namespace dilseg::cuda {

enum class ConvKernel { kDirect, kGemm };

struct DilatedConv2dPlan {
  ConvKernel kernel = ConvKernel::kDirect;
  size_t workspace_bytes = 0;
  double microseconds = 0;  // modelled
  GemmPlan gemm{};          // of kGemm
};

// P: any of the three parameter structs; addresses count for their alignment only. Of all kernels
// that can run the problem the fastest; with `only`, that one or none.
template <class P>
std::optional<DilatedConv2dPlan> plan_dilated_conv2d(const P& params,
                                                     const Gpu& gpu,
                                                     std::optional<ConvKernel> only = {}) {
  if constexpr (std::is_same_v<P, DilatedConv2dGradWeightParams>) {
    if (only != ConvKernel::kDirect) {
      if (const std::optional<GemmPlan> gemm = plan_gemm(params, gpu)) {
        return DilatedConv2dPlan{
            ConvKernel::kGemm, gemm->workspace_bytes, gemm->microseconds, *gemm};
      }
    }
  }
  if (only == ConvKernel::kGemm) {
    return {};
  }
  return DilatedConv2dPlan{};
}

}  // namespace dilseg::cuda
