// SPDX-License-Identifier: Apache-2.0
//
// The processor's instruction sets.
#include "dilseg/cpu.h"

#include <cstdlib>
#include <string_view>

namespace dilseg::cpu {
namespace {

InstructionSet supported() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
               ? InstructionSet::kAvx512
               : InstructionSet::kAvx2;
  }
#endif
  return InstructionSet::kBaseline;
}

InstructionSet choose() {
  const InstructionSet best = supported();
  const char* named = std::getenv("DILSEG_CPU_INSTRUCTION_SET");
  const std::string_view wanted = named == nullptr ? "" : named;
  if (wanted == "baseline") {
    return InstructionSet::kBaseline;
  }
  if (wanted == "avx2" && best == InstructionSet::kAvx512) {
    return InstructionSet::kAvx2;
  }
  return best;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const char* instruction_set_name() {
  switch (instruction_set()) {
    case InstructionSet::kAvx512:
      return "avx512";
    case InstructionSet::kAvx2:
      return "avx2";
    case InstructionSet::kBaseline:
      break;
  }
  return "baseline";
}

}  // namespace dilseg::cpu
