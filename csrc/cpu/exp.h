// SPDX-License-Identifier: Apache-2.0
//
// exp for the softmax loops. std::exp is a call per element; the float version here is
// straight-line code that a compiler vectorises.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace dilseg::cpu {

// For x <= 88. Within 1 unit in the last place; results below 2^-126 become 0; nan stays nan.
// exp(x) = 2^n * exp(r) with n = round(x / ln 2), |r| <= ln(2) / 2 (Cody and Waite), and the
// degree-7 polynomial of the Cephes library (expf) for exp(r).
inline float softmax_exp(float x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kRound = 0x1.8p23f;       // adding it leaves round(z) in the low mantissa bits
  constexpr float kLn2High = 0.693359375f;  // 9 bits: n * kLn2High is exact
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kSmallest = -87.33654f;  // ln 2^-126
  const float shifted = x * kLog2e + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float series = (p * r) * r + r + 1.0f;
  // The shift drops kRound's own bits and leaves n at the exponent.
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  // A mask, not a branch: a branch around the arithmetic would keep the loop from vectorising.
  const uint32_t mask = x < kSmallest ? 0u : ~0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(series * power) & mask);
}

inline double softmax_exp(double x) { return std::exp(x); }

}  // namespace dilseg::cpu
