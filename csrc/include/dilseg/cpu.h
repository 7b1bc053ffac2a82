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

// Memory for a large result, in whole huge pages: fresh memory in small ones costs several times
// what writing it does (44 MB are 10752 page faults). `data` is null where the system has no such
// memory to give.
struct PageBlock {
  void* data = nullptr;
  size_t bytes = 0;
};
// Results of this size are worth a block.
constexpr size_t kPageBlockBytes = size_t{1} << 20;

// A block of at least `bytes`, with anything in it. Any thread may call both.
PageBlock take_pages(size_t bytes);
// Keeps the block for a later result of about its size. The system may take its memory back at any
// time before that, and of all blocks kept at most DILSEG_CPU_RESULT_CACHE MiB (256 where the
// environment variable is not set; 0 keeps none; read once) count.
void give_pages(PageBlock block);

}  // namespace dilseg::cpu
