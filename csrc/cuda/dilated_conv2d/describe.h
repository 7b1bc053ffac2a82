// SPDX-License-Identifier: Apache-2.0
//
// A plan in words, for people.
#pragma once

#include "cuda/dilated_conv2d/select.h"

#include <initializer_list>
#include <string>
#include <utility>

namespace dilseg::cuda {

inline std::string by(int64_t a, int64_t b) { return std::to_string(a) + "x" + std::to_string(b); }

inline std::string describe_splits(int64_t splits) {
  return splits <= 1 ? ""
                     : ", the sum in " + std::to_string(splits) +
                           " parts that a second kernel adds in a fixed order, since the tiles "
                           "alone would not fill the GPU";
}

inline std::string describe_packing(std::initializer_list<std::pair<bool, const char*>> operands) {
  std::string packed;
  for (const auto& [wanted, name] : operands) {
    if (wanted) {
      packed += (packed.empty() ? "" : " and ") + std::string(name);
    }
  }
  return packed.empty() ? ""
                        : "; first " + packed +
                              " is copied to channels_last with pixels at 16-byte boundaries";
}

inline std::string describe(const GemmPlan& plan) {
  const int size = gemm_tile_size(plan.tile);
  std::string words = "implicit GEMM on tensor cores, tiles of " + by(size, size);
  if (plan.box_h > 0) {
    words += " over boxes of " + by(plan.box_h, plan.box_w) + " pixels";
  }
  return words + describe_splits(plan.splits) +
         describe_packing({{plan.pack_input, "the source"},
                           {plan.pack_weight, "the weight"},
                           {plan.pack_grad_output, "grad_output"}});
}

inline std::string describe(const WgmmaPlan& plan) {
  std::string words = "implicit GEMM by wgmma and TMA, tiles of " + by(kWgmmaTileM, plan.tile_n);
  if (plan.box_h > 0) {
    words += " over boxes of " + by(plan.box_h, plan.box_w) + " pixels";
  }
  if (plan.planes > 1) {
    words += ", each float in " + std::to_string(plan.planes) + " bfloat16 parts";
  }
  if (plan.cluster > 1) {
    words += ", pairs of blocks share an operand that they load";
  }
  return words + describe_splits(plan.splits) +
         describe_packing({{plan.pack_input, "the source"},
                           {plan.pack_weight, "the weight"},
                           {plan.pack_grad_output, "grad_output"}});
}

inline std::string describe(const PatchPlan& plan) {
  const PatchTiling& t = plan.tiling;
  std::string words = "few channels on tensor cores, tiles of " + by(t.tile_h, t.tile_w) +
                      " pixels from patches of " + by(t.patch_h, t.patch_w) + " of all channels";
  if (plan.planes > 1) {
    words += ", each float in " + std::to_string(plan.planes) + " bfloat16 parts";
  }
  if (plan.columns > 0) {  // not grad_weight
    words += plan.resident ? "; the weights of all taps stay in shared memory"
                           : "; the weights pass through shared memory, for every tile again";
  }
  return words + describe_splits(plan.splits);
}

inline std::string describe(const DepthwisePlan& plan) {
  const DepthwiseTiling& t = plan.tiling;
  std::string words = "depthwise, every tap from one read, tiles of " + std::to_string(t.tile_c) +
                      " channels and " + by(t.tile_h, t.tile_w) + " pixels";
  if (t.phases > 1) {
    words += " whose rows are " + std::to_string(t.phases) + " apart";
  }
  return words + describe_splits(plan.slices);
}

inline std::string describe(const DilatedConv2dPlan& plan) {
  switch (plan.kernel) {
    case ConvKernel::kDirect:
      break;
    case ConvKernel::kGemm:
      return describe(plan.gemm);
    case ConvKernel::kPatch:
      return describe(plan.patch);
    case ConvKernel::kDepthwise:
      return describe(plan.depthwise);
    case ConvKernel::kWgmma:
      return describe(plan.wgmma);
  }
  return "direct, every result summed by a thread of its own (a weight's gradient by a block)";
}

}  // namespace dilseg::cuda
