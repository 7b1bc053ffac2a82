// SPDX-License-Identifier: Apache-2.0
//
// Stand-in for the toolkit's header of this name: lets a host compiler build .cu files as they are.
// The language (__global__, threadIdx, __shared__), the intrinsics, and cudaLaunchKernelEx.
#pragma once

#include "cuda_runtime_api.h"
#include "emu/device.h"
#include "emu/launch.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <tuple>
#include <type_traits>
#include <utility>

// ---- the language -------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// One copy per thread of the operating system, hence per block: what a group of blocks would share
// by mistake, so blocks of a cluster must use dynamic shared memory.
#define __shared__ thread_local

constexpr int warpSize = 32;

// Text printed by kernels also goes into the report of a trap.
inline constexpr auto& emu_printf = ::emu::device_printf;
namespace std {
using ::emu_printf;
}
#define printf emu_printf

// ---- types --------------------------------------------------------------------------------------

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using uint3 = ::emu::Index3;

#define EMU_VECTOR(name, type)                                                                \
  struct name##1 { type x; };                                                                 \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                    \
  struct name##3 { type x, y, z; };                                                           \
  struct alignas(4 * sizeof(type) > 16 ? 16 : 4 * sizeof(type)) name##4 { type x, y, z, w; }; \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTOR(char, signed char)
EMU_VECTOR(uchar, unsigned char)
EMU_VECTOR(short, short)
EMU_VECTOR(ushort, unsigned short)
EMU_VECTOR(int, int)
EMU_VECTOR(float, float)
EMU_VECTOR(double, double)
EMU_VECTOR(longlong, long long)
EMU_VECTOR(ulonglong, unsigned long long)
#undef EMU_VECTOR
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- intrinsics ---------------------------------------------------------------------------------

inline void __syncthreads() { ::emu::sync_threads(); }
inline int __syncthreads_count(int p) { return static_cast<int>(::emu::sync_threads_votes(p)); }
inline int __syncthreads_or(int p) { return ::emu::sync_threads_votes(p != 0) != 0; }
inline int __syncthreads_and(int p) { return ::emu::sync_threads_votes(p == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::emu::sync_warp(mask); }
inline void __threadfence() { ::emu::preempt(); }
inline void __threadfence_block() { ::emu::preempt(); }
inline void __threadfence_system() { ::emu::preempt(); }
inline void __nanosleep(unsigned) { ::emu::nanosleep(); }
inline long long clock64() { return ::emu::clock_cycles(); }
[[noreturn]] inline void __trap() { ::emu::trap(); }

#define EMU_SHUFFLE(name, kind, Argument)                                                       \
  template <class T>                                                                            \
  T name(unsigned mask, T value, Argument argument, int width = warpSize) {                     \
    return ::emu::from_bits<T>(::emu::shuffle(                                                  \
        ::emu::Shuffle::kind, mask, ::emu::to_bits(value), static_cast<int>(argument), width)); \
  }
EMU_SHUFFLE(__shfl_sync, kIndex, int)
EMU_SHUFFLE(__shfl_up_sync, kUp, unsigned)
EMU_SHUFFLE(__shfl_down_sync, kDown, unsigned)
EMU_SHUFFLE(__shfl_xor_sync, kXor, int)
#undef EMU_SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int p) { return ::emu::ballot(mask, p != 0); }
inline int __any_sync(unsigned mask, int p) { return ::emu::ballot(mask, p != 0) != 0; }
inline int __all_sync(unsigned mask, int p) { return ::emu::ballot(mask, p == 0) == 0; }
inline unsigned __activemask() { return ::emu::current->cta->warps[::emu::current->warp()].live; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  return ::emu::match_any(mask, ::emu::to_bits(value));
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all) {
  const unsigned same = ::emu::match_any(mask, ::emu::to_bits(value));
  *all = same == mask;
  return *all ? mask : 0;
}

#define EMU_REDUCE(name, kind)                                                     \
  inline int name(unsigned mask, int value) {                                      \
    return static_cast<int>(::emu::reduce(::emu::Reduce::kind, mask, value));      \
  }                                                                                \
  inline unsigned name(unsigned mask, unsigned value) {                            \
    return static_cast<unsigned>(::emu::reduce(::emu::Reduce::kind, mask, value)); \
  }
EMU_REDUCE(__reduce_add_sync, kAdd)
EMU_REDUCE(__reduce_min_sync, kMin)
EMU_REDUCE(__reduce_max_sync, kMax)
EMU_REDUCE(__reduce_and_sync, kAnd)
EMU_REDUCE(__reduce_or_sync, kOr)
EMU_REDUCE(__reduce_xor_sync, kXor)
#undef EMU_REDUCE

// Integer atomics only: floating-point ones add in an order that differs from run to run.
#define EMU_ATOMIC(name, kind)                                                                     \
  template <class T>                                                                               \
  T name(T* p, std::type_identity_t<T> value) {                                                    \
    static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));                    \
    return static_cast<T>(::emu::atomic(                                                           \
        ::emu::Atomic::kind, p, sizeof(T), std::is_signed_v<T>, static_cast<uint64_t>(value), 0)); \
  }
EMU_ATOMIC(atomicAdd, kAdd)
EMU_ATOMIC(atomicMin, kMin)
EMU_ATOMIC(atomicMax, kMax)
EMU_ATOMIC(atomicAnd, kAnd)
EMU_ATOMIC(atomicOr, kOr)
EMU_ATOMIC(atomicXor, kXor)
EMU_ATOMIC(atomicExch, kExchange)
#undef EMU_ATOMIC
template <class T>
T atomicSub(T* p, std::type_identity_t<T> value) {
  return atomicAdd(p, static_cast<T>(T(0) - value));
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  return static_cast<T>(::emu::atomic(::emu::Atomic::kCompareAndSwap,
                                      p,
                                      sizeof(T),
                                      std::is_signed_v<T>,
                                      static_cast<uint64_t>(value),
                                      static_cast<uint64_t>(compare)));
}

// Cache hints change no value.
#define EMU_LOAD(name) \
  template <class T>   \
  T name(const T* p) { \
    return *p;         \
  }
EMU_LOAD(__ldg)
EMU_LOAD(__ldca)
EMU_LOAD(__ldcg)
EMU_LOAD(__ldcs)
EMU_LOAD(__ldlu)
#undef EMU_LOAD
#define EMU_STORE(name)                            \
  template <class T>                               \
  void name(T* p, std::type_identity_t<T> value) { \
    *p = value;                                    \
  }
EMU_STORE(__stwb)
EMU_STORE(__stcg)
EMU_STORE(__stcs)
EMU_STORE(__stwt)
#undef EMU_STORE

// ---- arithmetic ---------------------------------------------------------------------------------

using std::max;
using std::min;

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) {
    r |= (v >> i & 1u) << (31 - i);
  }
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __mul24(int a, int b) { return a * b; }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7)) & 0xff);
    byte = (pick & 8) != 0 ? ((byte & 0x80) != 0 ? 0xffu : 0u) : byte;
    result |= byte << (8 * i);
  }
  return result;
}

inline float __int_as_float(int v) { return ::emu::from_bits<float>(::emu::to_bits(v)); }
inline float __uint_as_float(unsigned v) { return ::emu::from_bits<float>(v); }
inline int __float_as_int(float v) { return ::emu::from_bits<int>(::emu::to_bits(v)); }
inline unsigned __float_as_uint(float v) { return ::emu::from_bits<unsigned>(::emu::to_bits(v)); }
inline long long __double_as_longlong(double v) {
  return ::emu::from_bits<long long>(::emu::to_bits(v));
}
inline double __longlong_as_double(long long v) {
  return ::emu::from_bits<double>(::emu::to_bits(v));
}
inline float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return ::sqrtf(a); }
// The hardware's approximations are within 2 ulp or so of these.
inline float __expf(float a) { return ::expf(a); }
inline float __logf(float a) { return ::logf(a); }
inline float __log2f(float a) { return ::log2f(a); }
inline float rsqrtf(float a) { return 1.0f / ::sqrtf(a); }
inline float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }
inline int __float2int_rn(float a) { return static_cast<int>(::nearbyintf(a)); }
inline int __float2int_rz(float a) { return static_cast<int>(a); }
inline int __float2int_rd(float a) { return static_cast<int>(::floorf(a)); }

// ---- launching ----------------------------------------------------------------------------------

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
  cudaLaunchAttributePriority = 8,
};
union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
  int priority;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emu {

LaunchRequest to_request(const cudaLaunchConfig_t& config);

// Copies the parameters from the launch, as the hardware copies them from constant memory; not an
// access of the kernel's.
template <class Kernel, class Parameters>
__attribute__((no_sanitize("thread"))) void call_kernel(Kernel kernel, const Parameters& p) {
  std::apply(kernel, p);
}

}  // namespace emu

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config,
                               void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<std::remove_cvref_t<Parameters>...> parameters(
      std::forward<Arguments>(arguments)...);
  return static_cast<cudaError_t>(::emu::launch(::emu::to_request(*config),
                                                reinterpret_cast<const void*>(kernel),
                                                (sizeof(std::remove_cvref_t<Parameters>) + ... + 0),
                                                [&] { ::emu::call_kernel(kernel, parameters); }));
}

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...),
                                 cudaFuncAttribute which,
                                 int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), which, value);
}
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks,
                                                          void (*)(Parameters...),
                                                          int threads,
                                                          size_t shared_bytes) {
  *blocks = ::emu::resident_blocks(static_cast<unsigned>(threads), shared_bytes);
  return cudaSuccess;
}
template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters,
                                           void (*)(Parameters...),
                                           const cudaLaunchConfig_t* config) {
  *clusters = ::emu::resident_clusters(::emu::to_request(*config));
  return cudaSuccess;
}
