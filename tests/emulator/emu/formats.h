// SPDX-License-Identifier: Apache-2.0
//
// The number formats of the device, bit by bit: conversions with the device's roundings and its
// canonical nans, and the truncating sum of the tensor cores. Portable and free of branches where
// it matters, so that g++ vectorises loops over them and every host gives the same bits.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace emu {

inline constexpr uint32_t kFloatSign = 0x80000000u;
inline constexpr uint32_t kFloatInfinity = 0x7f800000u;
inline constexpr uint32_t kFloatNan = 0x7fffffffu;
inline constexpr uint16_t kHalfNan = 0x7fff;  // of bfloat16 as well

inline float half_to_float(uint16_t half) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t magnitude = (half & 0x7fffu) << 13;
  const uint32_t normal = magnitude + kRebias;
  // As a float with an implicit one, a subnormal is too large by exactly that one.
  const uint32_t one = kRebias + (1u << 23);
  const uint32_t subnormal =
      std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude + one) - std::bit_cast<float>(one));
  const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t special = magnitude > (0x7c00u << 13) ? kFloatNan : (sign | kFloatInfinity);
  return std::bit_cast<float>(magnitude >= (0x7c00u << 13) ? special : (sign | finite));
}

// Rounds to nearest even.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & ~kFloatSign;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > kFloatInfinity) {
    return kHalfNan;
  }
  if (magnitude >= (127 + 16) << 23) {
    return static_cast<uint16_t>(sign | 0x7c00u);
  }
  if (magnitude < (127 - 14) << 23) {
    // A subnormal half counts units of 2^-24, which is the last place of a float in [1/2, 1): the
    // float adder does the rounding.
    const float units = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(units) & 0xffffu));
  }
  // Rounding may carry into the exponent, up to infinity; that is right as it stands.
  const uint32_t odd = (magnitude >> 13) & 1;
  const uint32_t rounded = magnitude - ((127 - 15) << 23) + 0xfff + odd;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

// Rounds toward zero: a finite value stays finite.
inline uint16_t float_to_half_rz(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & ~kFloatSign;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  if (magnitude > kFloatInfinity) {
    return kHalfNan;
  }
  if (magnitude >= (127 + 16) << 23) {
    return static_cast<uint16_t>(sign | (magnitude == kFloatInfinity ? 0x7c00u : 0x7bffu));
  }
  if (magnitude < (127 - 14) << 23) {
    const float units = std::bit_cast<float>(magnitude) * 0x1p24f;
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(units));
  }
  return static_cast<uint16_t>(sign | ((magnitude - ((127 - 15) << 23)) >> 13));
}

inline float bfloat16_to_float(uint16_t value) {
  return std::bit_cast<float>(static_cast<uint32_t>(value) << 16);
}

// Rounds to nearest even.
inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return (bits & ~kFloatSign) > kFloatInfinity ? kHalfNan : static_cast<uint16_t>(rounded);
}

// Rounds toward zero.
inline uint16_t float_to_bfloat16_rz(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits & ~kFloatSign) > kFloatInfinity ? kHalfNan : static_cast<uint16_t>(bits >> 16);
}

// cvt.rna.tf32.f32: to nearest, ties away from zero; the low 13 bits are zero except in a nan.
inline uint32_t float_to_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return (bits & ~kFloatSign) > kFloatInfinity ? kFloatNan : (bits + 0x1000u) & ~0x1fffu;
}

// What a tensor core sees of a 32-bit register: the low 13 bits are not wired.
inline float tf32_truncated(uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); }

// a + b rounded to odd: toward zero, with the last bit set if anything was lost. Rounding the
// result to a format at least two bits shorter gives what rounding the exact sum would give.
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  const double b_taken = sum - a;
  const double lost = (a - (sum - b_taken)) + (b - b_taken);  // Knuth's two-sum: exact
  const int64_t bits = std::bit_cast<int64_t>(sum);
  // The comparisons are false for the nan that infinities leave in `lost`.
  const bool outward = (lost > 0 && sum > 0) || (lost < 0 && sum < 0);
  const bool inward = (lost > 0 && sum < 0) || (lost < 0 && sum > 0);
  const int64_t step = (bits & 1) != 0 ? 0 : (outward ? 1 : 0) - (inward ? 1 : 0);
  return std::bit_cast<double>(bits + step);
}

// The exact sum rounded toward zero. A finite sum out of range gives the largest finite float.
inline float add_truncated(float a, double b) {
  const double sum = add_to_odd(a, b);
  const float nearest = static_cast<float>(sum);
  const uint32_t too_far = std::fabs(static_cast<double>(nearest)) > std::fabs(sum) ? 1 : 0;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(nearest) - too_far);
}

// double to float, rounded to odd as above.
inline float double_to_float_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double reached = std::fabs(static_cast<double>(nearest));
  const uint32_t bits = std::bit_cast<uint32_t>(nearest);
  if ((bits & 1) != 0 || std::isnan(value) || reached == std::fabs(value)) {
    return nearest;
  }
  return std::bit_cast<float>(reached > std::fabs(value) ? bits - 1 : bits + 1);
}

inline uint16_t double_to_half(double value) { return float_to_half(double_to_float_odd(value)); }

inline uint16_t double_to_bfloat16(double value) {
  return float_to_bfloat16(double_to_float_odd(value));
}

// a * b + c of half or bfloat16 values, such that the conversions above round the exact result
// once: the product of two such values is exact in a double.
inline double fma_to_odd(float a, float b, float c) {
  return add_to_odd(static_cast<double>(a) * static_cast<double>(b), c);
}

// max.f32 and min.f32: a nan loses to a number, and -0 is below +0.
inline float maximum(float a, float b) {
  if (std::isnan(a) || std::isnan(b)) {
    return std::isnan(a) ? b : a;
  }
  const uint32_t both = std::bit_cast<uint32_t>(a) & std::bit_cast<uint32_t>(b);
  return a == b ? std::bit_cast<float>(both) : (a > b ? a : b);
}

inline float minimum(float a, float b) { return -maximum(-a, -b); }

}  // namespace emu
