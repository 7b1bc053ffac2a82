// SPDX-License-Identifier: Apache-2.0
//
// A plan in words, for people.
#pragma once

#include "cuda/dilated_conv2d/select.h"

#include <string>

namespace dilseg::cuda {

inline std::string by(int64_t a, int64_t b) { return std::to_string(a) + "x" + std::to_string(b); }

inline std::string describe_splits(int64_t splits) {
  return splits <= 1 ? ""
                     : ", the sum in " + std::to_string(splits) +
                           " parts that a second kernel adds in a fixed order, since the tiles "
                           "alone would not fill the GPU";
}

inline std::string describe(const GemmPlan& plan) {
  const int size = gemm_tile_size(plan.tile);
  std::string words = "implicit GEMM on tensor cores, tiles of " + by(size, size);
  if (plan.box_h > 0) {
    words += " over boxes of " + by(plan.box_h, plan.box_w) + " pixels";
  }
  words += describe_splits(plan.splits);
  std::string packed;
  for (const auto& [wanted, name] : {std::pair(plan.pack_input, "the source"),
                                     std::pair(plan.pack_weight, "the weight"),
                                     std::pair(plan.pack_grad_output, "grad_output")}) {
    if (wanted) {
      packed += (packed.empty() ? "" : " and ") + std::string(name);
    }
  }
  return packed.empty() ? words
                        : words + "; first " + packed +
                              " is copied to channels_last with pixels at 16-byte boundaries";
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
  }
  return "direct, every result summed by a thread of its own (a weight's gradient by a block)";
}

}  // namespace dilseg::cuda
