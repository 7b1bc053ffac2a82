// SPDX-License-Identifier: Apache-2.0
//
// What the CPU implementation runs on. Torch-free contract.
#pragma once

#include <cstddef>

namespace dilseg::cpu {

// Vectors of 16, 32 and 64 bytes. kBaseline is what the compiler assumes of every processor.
enum class InstructionSet { kBaseline, kAvx2, kAvx512 };

// The best one of this processor, or a lesser one named by the environment variable
// DILSEG_CPU_INSTRUCTION_SET (baseline, avx2, avx512); read once.
InstructionSet instruction_set();
const char* instruction_set_name();

// Asks for huge pages behind a large, freshly allocated buffer, before its first write: the 44 MB
// of a 2x21x512x512 result otherwise take 10752 page faults, which cost several times the writing.
// Does nothing where the system has no such pages.
void prefer_huge_pages(void* data, size_t bytes);

}  // namespace dilseg::cpu
