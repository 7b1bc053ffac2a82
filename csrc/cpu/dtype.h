// SPDX-License-Identifier: Apache-2.0
//
// Element types on the CPU: double computes in double, everything else in float. The 16-bit types
// are widened without loss and rounded once, to nearest even; both conversions are integer
// arithmetic and selects only, so that loops over them vectorise, and do not change under
// flush-to-zero.
#pragma once

#include "dilseg/types.h"

#include <bit>
#include <cstdint>

namespace dilseg::cpu {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};

// The type in which values of T are added and multiplied.
template <class T>
using acc_t = typename AccumulateIn<T>::type;

inline double load(const double* p) { return *p; }
inline float load(const float* p) { return *p; }

inline float load(const BFloat16* p) {
  return std::bit_cast<float>(static_cast<uint32_t>(p->bits) << 16);
}

inline float load(const Half* p) {
  const uint32_t half = p->bits;
  const uint32_t magnitude = half & 0x7fffu;
  // Rebias the exponent from 15 to 127; inf and nan need the same step once more to reach 255.
  constexpr uint32_t kRebias = (127u - 15u) << 23;
  const uint32_t normal = (magnitude << 13) + kRebias + (magnitude >= 0x7c00u ? kRebias : 0u);
  // A subnormal is its mantissa times 2^-24.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return std::bit_cast<float>((magnitude < 0x0400u ? subnormal : normal) | (half & 0x8000u) << 16);
}

inline void store(double* p, double value) { *p = value; }
inline void store(float* p, float value) { *p = value; }

inline void store(BFloat16* p, float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  p->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}

inline void store(Half* p, float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  constexpr uint32_t kRebias = (127u - 15u) << 23;
  const uint32_t normal = (magnitude - kRebias + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 puts the last bit of the float at 2^-24, the step of half subnormals: the addition
  // itself rounds.
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  constexpr uint32_t kSmallestNormal = 0x38800000u;  // 2^-14
  constexpr uint32_t kOverflow = 0x477ff000u;        // 65520, rounds to 2^16
  uint32_t result = magnitude < kSmallestNormal ? subnormal : normal;
  result = magnitude >= kOverflow ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  p->bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
}

// Calls fn.operator()<T>() with the C++ type of `dtype`.
template <class F>
auto dispatch_dtype(Dtype dtype, F&& fn) {
  switch (dtype) {
    case Dtype::kFloat64:
      return fn.template operator()<double>();
    case Dtype::kFloat16:
      return fn.template operator()<Half>();
    case Dtype::kBFloat16:
      return fn.template operator()<BFloat16>();
    case Dtype::kFloat32:
      break;
  }
  return fn.template operator()<float>();
}

}  // namespace dilseg::cpu
