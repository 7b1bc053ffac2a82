// SPDX-License-Identifier: Apache-2.0
//
// Takes the place of csrc/cuda/common/ptx.cuh when a host compiler builds the kernels: the same
// names, computed by the emulator. tests/test_layering.py compares the two surfaces.
#pragma once

#include "emu/formats.h"
#include "emu/instructions.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dilseg::cuda::ptx {

inline uint32_t shared_address(const void* p) { return ::emu::shared_address(p); }

// ---- scalars ------------------------------------------------------------------------------------

inline uint32_t to_tf32(float x) { return ::emu::float_to_tf32(x); }
inline float exp2_approx(float x) { return ::exp2f(x); }

template <class T>
T opaque(T x) {
  return x;
}

// ---- flags in global memory ---------------------------------------------------------------------

inline int load_acquire(const int* p) {
  return static_cast<int>(::emu::atomic(::emu::Atomic::kLoad, const_cast<int*>(p), 4, true, 0, 0));
}
inline void store_release(int* p, int value) {
  ::emu::atomic(::emu::Atomic::kStore, p, 4, true, static_cast<uint64_t>(value), 0);
}
inline int add_acq_rel(int* p, int value) {
  return static_cast<int>(
      ::emu::atomic(::emu::Atomic::kAdd, p, 4, true, static_cast<uint64_t>(value), 0));
}

// ---- cp.async -----------------------------------------------------------------------------------

template <int kBytes>
void cp_async_ca(uint32_t dst, const void* src, int src_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  ::emu::cp_async(dst, src, kBytes, static_cast<uint32_t>(src_bytes));
}
inline void cp_async_cg(uint32_t dst, const void* src, int src_bytes = 16) {
  ::emu::cp_async(dst, src, 16, static_cast<uint32_t>(src_bytes));
}
inline void cp_async_commit() { ::emu::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  ::emu::cp_async_wait(kPending);
}
inline void cp_async_wait_all() { ::emu::cp_async_wait(-1); }
inline void cp_async_mbarrier_arrive(uint32_t bar) { ::emu::cp_async_mbarrier_arrive(bar); }

// ---- matrices in registers ----------------------------------------------------------------------

template <int kCount, bool kTrans = false>
void ldmatrix(uint32_t (&r)[kCount], uint32_t row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  ::emu::ldmatrix(kCount, kTrans, r, row);
}
template <int kCount, bool kTrans = false>
void stmatrix(uint32_t row, const uint32_t (&r)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  ::emu::stmatrix(kCount, kTrans, row, r);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ::emu::mma(::emu::Element::kBFloat16, d, a, b);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ::emu::mma(::emu::Element::kFloat16, d, a, b);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  ::emu::mma(::emu::Element::kTf32, d, a, b);
}

// ---- named barriers -----------------------------------------------------------------------------

inline void barrier_sync(int id, int threads) { ::emu::barrier_sync(id, threads); }
inline void barrier_arrive(int id, int threads) { ::emu::barrier_arrive(id, threads); }

// ---- mbarrier -----------------------------------------------------------------------------------

inline void mbarrier_init(uint32_t bar, uint32_t count) { ::emu::mbarrier_init(bar, count); }
inline void mbarrier_invalidate(uint32_t bar) { ::emu::mbarrier_invalidate(bar); }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint32_t bar) { ::emu::mbarrier_arrive(bar); }
inline void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  ::emu::mbarrier_arrive_expect_tx(bar, bytes);
}
inline void mbarrier_expect_tx(uint32_t bar, uint32_t bytes) {
  ::emu::mbarrier_expect_tx(bar, bytes);
}
inline bool mbarrier_test_wait(uint32_t bar, uint32_t parity) {
  return ::emu::mbarrier_test_wait(bar, parity);
}
inline bool mbarrier_try_wait(uint32_t bar, uint32_t parity) {
  return ::emu::mbarrier_test_wait(bar, parity);
}
inline void mbarrier_wait(uint32_t bar, uint32_t parity) { ::emu::mbarrier_wait(bar, parity); }
inline void mbarrier_arrive_cluster(uint32_t cluster_bar) {
  ::emu::mbarrier_arrive_cluster(cluster_bar);
}

// ---- proxies ------------------------------------------------------------------------------------

inline void fence_proxy_async() { ::emu::fence_proxy_async(); }
inline void fence_proxy_async_global() {}

// ---- TMA and bulk copies ------------------------------------------------------------------------

inline void prefetch_tensor_map(const CUtensorMap* map) { ::emu::prefetch_tensor_map(map); }

template <int kRank>
void tma_load(uint32_t dst, const CUtensorMap* map, uint32_t bar, const int (&at)[kRank]) {
  ::emu::tma_load(dst, map, bar, at, kRank, nullptr, 0);
}
template <int kRank>
void tma_load_multicast(
    uint32_t dst, const CUtensorMap* map, uint32_t bar, const int (&at)[kRank], uint16_t mask) {
  ::emu::tma_load(dst, map, bar, at, kRank, nullptr, mask);
}
template <int kRank>
void tma_load_im2col(uint32_t dst,
                     const CUtensorMap* map,
                     uint32_t bar,
                     const int (&at)[kRank],
                     const uint16_t (&offset)[kRank - 2]) {
  ::emu::tma_load(dst, map, bar, at, kRank, offset, 0);
}
template <int kRank>
void tma_load_im2col_multicast(uint32_t dst,
                               const CUtensorMap* map,
                               uint32_t bar,
                               const int (&at)[kRank],
                               const uint16_t (&offset)[kRank - 2],
                               uint16_t mask) {
  ::emu::tma_load(dst, map, bar, at, kRank, offset, mask);
}
template <int kRank>
void tma_store(const CUtensorMap* map, const int (&at)[kRank], uint32_t src) {
  ::emu::tma_store(map, at, kRank, src, false);
}
template <int kRank>
void tma_reduce_add(const CUtensorMap* map, const int (&at)[kRank], uint32_t src) {
  ::emu::tma_store(map, at, kRank, src, true);
}

inline void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  ::emu::bulk_load(dst, src, bytes, bar, 0);
}
inline void bulk_load_multicast(
    uint32_t dst, const void* src, uint32_t bytes, uint32_t bar, uint16_t mask) {
  ::emu::bulk_load(dst, src, bytes, bar, mask);
}
inline void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
  ::emu::bulk_store(dst, src, bytes, false);
}
inline void bulk_reduce_add_f32(float* dst, uint32_t src, uint32_t bytes) {
  ::emu::bulk_store(dst, src, bytes, true);
}
inline void bulk_copy_cluster(uint32_t dst_cluster,
                              uint32_t src,
                              uint32_t bytes,
                              uint32_t bar_cluster) {
  ::emu::bulk_copy_cluster(dst_cluster, src, bytes, bar_cluster);
}
inline void bulk_commit() { ::emu::bulk_commit(); }
template <int kPending>
void bulk_wait() {
  ::emu::bulk_wait(kPending);
}
template <int kPending>
void bulk_wait_read() {
  ::emu::bulk_wait(kPending);
}

// ---- wgmma --------------------------------------------------------------------------------------

inline void wgmma_fence() { ::emu::wgmma_fence(); }
inline void wgmma_commit() { ::emu::wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
  static_assert(kPending >= 0 && kPending <= 7);
  ::emu::wgmma_wait(kPending);
}

#define EMU_WGMMA_16(name, element)                                                          \
  template <int kN, int kTransA, int kTransB>                                                \
  void name(float (&d)[kN / 2], uint64_t a, uint64_t b, bool scale_d) {                      \
    static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);                                      \
    ::emu::wgmma(::emu::Element::element, kN, kTransA != 0, kTransB != 0, d, a, b, scale_d); \
  }                                                                                          \
  template <int kN, int kTransB>                                                             \
  void name(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool scale_d) {          \
    static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);                                      \
    ::emu::wgmma(::emu::Element::element, kN, kTransB != 0, d, a, b, scale_d);               \
  }
EMU_WGMMA_16(wgmma_bf16, kBFloat16)
EMU_WGMMA_16(wgmma_f16, kFloat16)
#undef EMU_WGMMA_16
template <int kN>
void wgmma_tf32(float (&d)[kN / 2], uint64_t a, uint64_t b, bool scale_d) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
  ::emu::wgmma(::emu::Element::kTf32, kN, false, false, d, a, b, scale_d);
}
template <int kN>
void wgmma_tf32(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool scale_d) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256);
  ::emu::wgmma(::emu::Element::kTf32, kN, false, d, a, b, scale_d);
}

constexpr uint64_t wgmma_descriptor(uint32_t address,
                                    uint32_t leading_bytes,
                                    uint32_t stride_bytes,
                                    int layout) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>((leading_bytes & 0x3ffff) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3ffff) >> 4) << 32 |
         static_cast<uint64_t>(layout) << 62;
}

template <int kRegisters>
void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  ::emu::setmaxnreg(kRegisters);
}
template <int kRegisters>
void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
  ::emu::setmaxnreg(kRegisters);
}

// ---- clusters -----------------------------------------------------------------------------------

inline uint32_t cluster_rank() { return ::emu::cluster_rank(); }
inline uint32_t cluster_size() { return ::emu::cluster_size(); }
inline void cluster_arrive() { ::emu::cluster_barrier_arrive(); }
inline void cluster_wait() { ::emu::cluster_barrier_wait(); }
inline uint32_t map_shared(uint32_t address, uint32_t rank) {
  return ::emu::map_shared(address, rank);
}
inline uint32_t load_shared_cluster(uint32_t cluster_address) {
  return ::emu::load_shared_cluster(cluster_address);
}
inline void store_shared_cluster(uint32_t cluster_address, uint32_t value) {
  ::emu::store_shared_cluster(cluster_address, value);
}
inline void store_async(uint32_t cluster_address, uint32_t value, uint32_t bar_cluster) {
  ::emu::store_async(cluster_address, value, bar_cluster);
}

// ---- programmatic dependent launch --------------------------------------------------------------

inline void grid_dependency_wait() { ::emu::grid_dependency_wait(); }
inline void grid_dependency_launch() {}  // launches do not overlap here

}  // namespace dilseg::cuda::ptx
