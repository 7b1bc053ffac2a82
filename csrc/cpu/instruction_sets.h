// SPDX-License-Identifier: Apache-2.0
//
// Compiles the file named by DILSEG_KERNELS once per instruction set, each time in a namespace of
// its own, and lets `best` call the one for this processor:
//
//   #define DILSEG_KERNELS "cpu/<op>_kernels.h"
//   #include "cpu/instruction_sets.h"
//   void op(const Params& p) { DILSEG_BEST(op, p); }
//
// The sources are plain C++ over vectors of DILSEG_VECTOR_BYTES (simd.h). Headers that such a file
// needs from elsewhere are included before this one: a function of the standard library must not be
// compiled for an instruction set that the next user of it may not have.
// Results are equal on every run and for every number of threads; between instruction sets they
// may differ in the last bit, since those with fused multiply-add round once where others round
// twice.
#pragma once

#ifndef DILSEG_KERNELS
#error "define DILSEG_KERNELS before including cpu/instruction_sets.h"
#endif

#include "cpu/dtype.h"
#include "dilseg/cpu.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define DILSEG_X86_64 1
#include <immintrin.h>
#else
#define DILSEG_X86_64 0
#endif

#define DILSEG_PRAGMA(...) _Pragma(#__VA_ARGS__)
#ifdef __clang__
#define DILSEG_BEGIN_TARGET(features) \
  DILSEG_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define DILSEG_END_TARGET DILSEG_PRAGMA(clang attribute pop)
#else
#define DILSEG_BEGIN_TARGET(features) \
  DILSEG_PRAGMA(GCC push_options) DILSEG_PRAGMA(GCC target(features))
#define DILSEG_END_TARGET DILSEG_PRAGMA(GCC pop_options)
#endif

#define DILSEG_VECTOR_BYTES 16
namespace dilseg::cpu::baseline {
#include "cpu/simd.h"
#include DILSEG_KERNELS
}  // namespace dilseg::cpu::baseline
#undef DILSEG_VECTOR_BYTES

#if DILSEG_X86_64
DILSEG_BEGIN_TARGET("avx2,fma,f16c")
#define DILSEG_VECTOR_BYTES 32
namespace dilseg::cpu::avx2 {
#include "cpu/simd.h"
#include DILSEG_KERNELS
}  // namespace dilseg::cpu::avx2
#undef DILSEG_VECTOR_BYTES
DILSEG_END_TARGET

DILSEG_BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define DILSEG_VECTOR_BYTES 64
namespace dilseg::cpu::avx512 {
#include "cpu/simd.h"
#include DILSEG_KERNELS
}  // namespace dilseg::cpu::avx512
#undef DILSEG_VECTOR_BYTES
DILSEG_END_TARGET
#endif

#if DILSEG_X86_64
#define DILSEG_BEST(function, ...)                                            \
  (::dilseg::cpu::instruction_set() == ::dilseg::cpu::InstructionSet::kAvx512 \
       ? ::dilseg::cpu::avx512::function(__VA_ARGS__)                         \
   : ::dilseg::cpu::instruction_set() == ::dilseg::cpu::InstructionSet::kAvx2 \
       ? ::dilseg::cpu::avx2::function(__VA_ARGS__)                           \
       : ::dilseg::cpu::baseline::function(__VA_ARGS__))
#else
#define DILSEG_BEST(function, ...) ::dilseg::cpu::baseline::function(__VA_ARGS__)
#endif
