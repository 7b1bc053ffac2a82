// SPDX-License-Identifier: Apache-2.0
//
// Stand-in for the toolkit's header of this name: the types and the part of the functions that
// kernels use, with the toolkit's meaning. Arithmetic rounds once, as the device's does: sums,
// products and quotients of halves survive the detour through float, and fma takes care of itself.
#pragma once

#include "cuda_runtime.h"
#include "emu/formats.h"

#include <cmath>
#include <concepts>

struct alignas(2) __half_raw {
  unsigned short x;
};

struct alignas(2) __half {
  __half() = default;
  __half(const __half_raw& raw) : bits_(raw.x) {}
  __half(float value) : bits_(emu::float_to_half(value)) {}
  __half(double value) : bits_(emu::double_to_half(value)) {}
  template <std::integral T>
  __half(T value) : bits_(emu::double_to_half(static_cast<double>(value))) {}

  operator __half_raw() const { return {bits_}; }
  operator float() const { return emu::half_to_float(bits_); }

 private:
  unsigned short bits_;
};

struct alignas(4) __half2 {
  __half2() = default;
  __half2(const __half& low, const __half& high) : x(low), y(high) {}

  __half x;
  __half y;
};

using half = __half;
using half2 = __half2;

inline unsigned short __half_as_ushort(__half h) { return static_cast<__half_raw>(h).x; }
inline short __half_as_short(__half h) { return static_cast<short>(__half_as_ushort(h)); }
inline __half __ushort_as_half(unsigned short bits) { return __half_raw{bits}; }
inline __half __short_as_half(short bits) {
  return __ushort_as_half(static_cast<unsigned short>(bits));
}

inline float __half2float(__half h) { return h; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline __half __float2half_rz(float value) {
  return __ushort_as_half(emu::float_to_half_rz(value));
}
inline __half __double2half(double value) { return value; }

inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half2 __half2half2(__half both) { return {both, both}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline __half2 __low2half2(__half2 v) { return {v.x, v.x}; }
inline __half2 __high2half2(__half2 v) { return {v.y, v.y}; }
inline __half2 __lowhigh2highlow(__half2 v) { return {v.y, v.x}; }

inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline __half2 __floats2half2_rn(float low, float high) { return {low, high}; }
inline __half2 __float2half2_rn(float both) { return {both, both}; }

inline __half __hadd(__half a, __half b) { return __half2float(a) + __half2float(b); }
inline __half __hsub(__half a, __half b) { return __half2float(a) - __half2float(b); }
inline __half __hmul(__half a, __half b) { return __half2float(a) * __half2float(b); }
inline __half __hdiv(__half a, __half b) { return __half2float(a) / __half2float(b); }
inline __half __hfma(__half a, __half b, __half c) { return emu::fma_to_odd(a, b, c); }
inline __half __hneg(__half a) {
  return __ushort_as_half(static_cast<unsigned short>(__half_as_ushort(a) ^ 0x8000));
}
inline __half __habs(__half a) {
  return __ushort_as_half(static_cast<unsigned short>(__half_as_ushort(a) & 0x7fff));
}
inline __half __hmax(__half a, __half b) { return emu::maximum(a, b); }
inline __half __hmin(__half a, __half b) { return emu::minimum(a, b); }
inline bool __hisnan(__half a) { return std::isnan(__half2float(a)); }
inline int __hisinf(__half a) {
  return std::isinf(__half2float(a)) ? (__half2float(a) < 0 ? -1 : 1) : 0;
}

inline bool __heq(__half a, __half b) { return __half2float(a) == __half2float(b); }
inline bool __hne(__half a, __half b) {
  return __half2float(a) < __half2float(b) || __half2float(a) > __half2float(b);
}
inline bool __hlt(__half a, __half b) { return __half2float(a) < __half2float(b); }
inline bool __hle(__half a, __half b) { return __half2float(a) <= __half2float(b); }
inline bool __hgt(__half a, __half b) { return __half2float(a) > __half2float(b); }
inline bool __hge(__half a, __half b) { return __half2float(a) >= __half2float(b); }

inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline __half2 __h2div(__half2 a, __half2 b) { return {__hdiv(a.x, b.x), __hdiv(a.y, b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
inline __half2 __hneg2(__half2 a) { return {__hneg(a.x), __hneg(a.y)}; }
inline __half2 __habs2(__half2 a) { return {__habs(a.x), __habs(a.y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
inline __half2 __hmin2(__half2 a, __half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }

inline __half operator+(const __half& a, const __half& b) { return __hadd(a, b); }
inline __half operator-(const __half& a, const __half& b) { return __hsub(a, b); }
inline __half operator*(const __half& a, const __half& b) { return __hmul(a, b); }
inline __half operator/(const __half& a, const __half& b) { return __hdiv(a, b); }
inline __half operator-(const __half& a) { return __hneg(a); }
inline __half& operator+=(__half& a, const __half& b) { return a = a + b; }
inline __half& operator-=(__half& a, const __half& b) { return a = a - b; }
inline __half& operator*=(__half& a, const __half& b) { return a = a * b; }
inline __half& operator/=(__half& a, const __half& b) { return a = a / b; }
inline bool operator==(const __half& a, const __half& b) { return __heq(a, b); }
inline bool operator!=(const __half& a, const __half& b) { return !__heq(a, b); }
inline bool operator<(const __half& a, const __half& b) { return __hlt(a, b); }
inline bool operator<=(const __half& a, const __half& b) { return __hle(a, b); }
inline bool operator>(const __half& a, const __half& b) { return __hgt(a, b); }
inline bool operator>=(const __half& a, const __half& b) { return __hge(a, b); }

inline __half2 operator+(const __half2& a, const __half2& b) { return __hadd2(a, b); }
inline __half2 operator-(const __half2& a, const __half2& b) { return __hsub2(a, b); }
inline __half2 operator*(const __half2& a, const __half2& b) { return __hmul2(a, b); }
inline __half2 operator/(const __half2& a, const __half2& b) { return __h2div(a, b); }
inline __half2 operator-(const __half2& a) { return __hneg2(a); }
inline __half2& operator+=(__half2& a, const __half2& b) { return a = a + b; }
inline __half2& operator-=(__half2& a, const __half2& b) { return a = a - b; }
inline __half2& operator*=(__half2& a, const __half2& b) { return a = a * b; }
inline __half2& operator/=(__half2& a, const __half2& b) { return a = a / b; }
