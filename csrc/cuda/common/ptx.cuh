// SPDX-License-Identifier: Apache-2.0
//
// The only inline PTX: thin wrappers of one instruction each. A function may be called only where
// its architecture exists; unused ones emit nothing, so every target may include this header.
//   sm_80   scalar, acquire / release, cp.async, ldmatrix, mma, named barriers, mbarrier (init,
//           inval, arrive, test_wait; mbarrier_wait picks the best wait the target has)
//   sm_90   stmatrix, the rest of mbarrier, proxy fences, TMA, bulk copies, clusters, dependent
//           launch
//   sm_90a  wgmma (no other architecture) and setmaxnreg (also sm_100a, sm_120a)
// uint32_t addresses are 32-bit addresses in the shared window, from shared_address() or, where a
// parameter is named cluster..., ..._cluster, from map_shared(). A second header of this name and
// surface, tests/emulator/dilseg/cuda/common/ptx.cuh, replaces this one when a host compiler builds
// the kernels.
//
// Whatever reads or writes memory or synchronises is volatile and clobbers "memory", so that the
// compiler keeps ordinary accesses on their side of it.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dilseg::cuda::ptx {

// --- addresses ---------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// --- scalar ------------------------------------------------------------------------------------

// Bits of x rounded to tf32, ties away from zero; mma and wgmma would truncate the raw float.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// x, of which the compiler no longer knows that it is the same in every turn of a loop: what is
// computed from it stays inside instead of filling registers ahead of the loop.
template <class T>
__device__ __forceinline__ T opaque(T x) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
  return x;
}

// --- device-scope synchronisation through global memory ----------------------------------------

__device__ __forceinline__ int load_acquire(const int* p) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

__device__ __forceinline__ void store_release(int* p, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" : : "l"(p), "r"(value) : "memory");
}

// Returns the value before the addition.
__device__ __forceinline__ int add_acq_rel(int* p, int value) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(p), "r"(value)
               : "memory");
  return old;
}

// --- cp.async ----------------------------------------------------------------------------------
// The bytes from src_bytes on are written as zero. src must be valid even for src_bytes 0. Groups
// belong to the issuing thread: other threads need a barrier after its wait.

template <int kBytes>
__device__ __forceinline__ void cp_async_ca(uint32_t dst, const void* src, int src_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :
               : "r"(dst), "l"(src), "n"(kBytes), "r"(src_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_cg(uint32_t dst, const void* src, int src_bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(dst), "l"(src), "r"(src_bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" : : : "memory");
}

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

__device__ __forceinline__ void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;" : : : "memory");
}

// Arrives on bar once this thread's copies so far have landed; init's count includes the arrival.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint32_t bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" : : "r"(bar) : "memory");
}

// --- ldmatrix, stmatrix, mma -------------------------------------------------------------------
// All lanes of the warp take part. Lanes 8i .. 8i+7 give the 16-byte row addresses of matrix i.

#define DILSEG_LDMATRIX(trans)                                                               \
  if constexpr (kCount == 1) {                                                               \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" trans ".shared.b16 {%0}, [%1];"             \
                 : "=r"(r[0])                                                                \
                 : "r"(row)                                                                  \
                 : "memory");                                                                \
  } else if constexpr (kCount == 2) {                                                        \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 {%0, %1}, [%2];"         \
                 : "=r"(r[0]), "=r"(r[1])                                                    \
                 : "r"(row)                                                                  \
                 : "memory");                                                                \
  } else {                                                                                   \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                            \
                 : "r"(row)                                                                  \
                 : "memory");                                                                \
  }

template <int kCount, bool kTrans = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[kCount], uint32_t row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  if constexpr (kTrans) {
    DILSEG_LDMATRIX(".trans");
  } else {
    DILSEG_LDMATRIX("");
  }
}

#undef DILSEG_LDMATRIX

#define DILSEG_STMATRIX(trans)                                                               \
  if constexpr (kCount == 1) {                                                               \
    asm volatile("stmatrix.sync.aligned.m8n8.x1" trans ".shared.b16 [%0], {%1};"             \
                 :                                                                           \
                 : "r"(row), "r"(r[0])                                                       \
                 : "memory");                                                                \
  } else if constexpr (kCount == 2) {                                                        \
    asm volatile("stmatrix.sync.aligned.m8n8.x2" trans ".shared.b16 [%0], {%1, %2};"         \
                 :                                                                           \
                 : "r"(row), "r"(r[0]), "r"(r[1])                                            \
                 : "memory");                                                                \
  } else {                                                                                   \
    asm volatile("stmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 [%0], {%1, %2, %3, %4};" \
                 :                                                                           \
                 : "r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])                      \
                 : "memory");                                                                \
  }

template <int kCount, bool kTrans = false>
__device__ __forceinline__ void stmatrix(uint32_t row, const uint32_t (&r)[kCount]) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  if constexpr (kTrans) {
    DILSEG_STMATRIX(".trans");
  } else {
    DILSEG_STMATRIX("");
  }
}

#undef DILSEG_STMATRIX

// d += a b, fp32 accumulation. Volatile: the compiler must not sink it into divergent code.
#define DILSEG_MMA(shape_types)                                                   \
  asm volatile("mma.sync.aligned." shape_types                                    \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

__device__ __forceinline__ void mma_bf16(float (&d)[4],
                                         const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  DILSEG_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
}

__device__ __forceinline__ void mma_f16(float (&d)[4],
                                        const uint32_t (&a)[4],
                                        const uint32_t (&b)[2]) {
  DILSEG_MMA("m16n8k16.row.col.f32.f16.f16.f32");
}

__device__ __forceinline__ void mma_tf32(float (&d)[4],
                                         const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  DILSEG_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
}

#undef DILSEG_MMA

// --- named barriers ----------------------------------------------------------------------------
// id 1 .. 15 (0 is __syncthreads); threads is a multiple of 32. Whole warps call these together.

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// --- mbarrier ----------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(bar), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_invalidate(uint32_t bar) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" : : "r"(bar) : "memory");
}

// Makes inits visible to the async proxy and the cluster; a block or cluster barrier follows.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(bar) : "memory");
}

// bytes counts whole boxes, the zero-filled parts included; a wrong sum hangs the waiters.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(bar), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_expect_tx(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;"
               :
               : "r"(bar), "r"(bytes)
               : "memory");
}

// Whether the phase of this parity has completed; does not block.
__device__ __forceinline__ bool mbarrier_test_wait(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done != 0;
}

// The same, but may suspend the thread for a while first.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done != 0;
}

// A fresh barrier lets parity 1 through at once.
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  while (!mbarrier_try_wait(bar, parity)) {
  }
#else
  while (!mbarrier_test_wait(bar, parity)) {
  }
#endif
}

__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t cluster_bar) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];"
               :
               : "r"(cluster_bar)
               : "memory");
}

// --- proxies -----------------------------------------------------------------------------------
// Ordinary writes (st.shared, stmatrix, cp.async) that wgmma, TMA or a bulk copy will read: each
// writer fences, then a barrier. What TMA wrote needs only the mbarrier wait.

__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}

__device__ __forceinline__ void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" : : : "memory");
}

// --- TMA ---------------------------------------------------------------------------------------
// Coordinates and offsets run innermost first. The map is a __grid_constant__ parameter or global.
// One thread issues. With multicast every block of the mask receives the box, and the completion
// on its own barrier, at the same shared offsets.

// Value i of an array, 0 past its end: fixed operand positions for every rank.
template <int kIndex, class T, int kCount>
__device__ __forceinline__ T value_or_zero(const T (&values)[kCount]) {
  if constexpr (kIndex < kCount) {
    return values[kIndex];
  } else {
    return 0;
  }
}

// One branch of a tile instruction. Operands: %0 .. %4 coordinates, then the ones given.
#define DILSEG_TILE_RANK(rank, at_text, op, form, tail, ...) \
  if constexpr (kRank == rank) {                             \
    asm volatile(op "." #rank "d." form at_text tail         \
                 :                                           \
                 : "r"(value_or_zero<0>(at)),                \
                   "r"(value_or_zero<1>(at)),                \
                   "r"(value_or_zero<2>(at)),                \
                   "r"(value_or_zero<3>(at)),                \
                   "r"(value_or_zero<4>(at)),                \
                   __VA_ARGS__                               \
                 : "memory");                                \
  }
#define DILSEG_TILE(...)                               \
  static_assert(1 <= kRank && kRank <= 5);             \
  DILSEG_TILE_RANK(1, "{%0}", __VA_ARGS__)             \
  DILSEG_TILE_RANK(2, "{%0, %1}", __VA_ARGS__)         \
  DILSEG_TILE_RANK(3, "{%0, %1, %2}", __VA_ARGS__)     \
  DILSEG_TILE_RANK(4, "{%0, %1, %2, %3}", __VA_ARGS__) \
  DILSEG_TILE_RANK(5, "{%0, %1, %2, %3, %4}", __VA_ARGS__)

// The same for im2col: %0 .. %4 coordinates, %5 .. %7 offsets, %8 dst, %9 map, %10 bar, the rest.
#define DILSEG_IM2COL_RANK(rank, at_text, offset_text, mode, tail, ...)              \
  if constexpr (kRank == rank) {                                                     \
    asm volatile("cp.async.bulk.tensor." #rank                                       \
                 "d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes" mode \
                 " [%8], [%9, " at_text "], [%10], " offset_text tail                \
                 :                                                                   \
                 : "r"(value_or_zero<0>(at)),                                        \
                   "r"(value_or_zero<1>(at)),                                        \
                   "r"(value_or_zero<2>(at)),                                        \
                   "r"(value_or_zero<3>(at)),                                        \
                   "r"(value_or_zero<4>(at)),                                        \
                   "h"(value_or_zero<0>(offset)),                                    \
                   "h"(value_or_zero<1>(offset)),                                    \
                   "h"(value_or_zero<2>(offset)),                                    \
                   __VA_ARGS__                                                       \
                 : "memory");                                                        \
  }
#define DILSEG_IM2COL(...)                                           \
  static_assert(3 <= kRank && kRank <= 5);                           \
  DILSEG_IM2COL_RANK(3, "{%0, %1, %2}", "{%5}", __VA_ARGS__)         \
  DILSEG_IM2COL_RANK(4, "{%0, %1, %2, %3}", "{%5, %6}", __VA_ARGS__) \
  DILSEG_IM2COL_RANK(5, "{%0, %1, %2, %3, %4}", "{%5, %6, %7}", __VA_ARGS__)

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

template <int kRank>
__device__ __forceinline__ void tma_load(uint32_t dst,
                                         const CUtensorMap* map,
                                         uint32_t bar,
                                         const int (&at)[kRank]) {
  DILSEG_TILE("cp.async.bulk.tensor",
              "shared::cluster.global.tile.mbarrier::complete_tx::bytes [%5], [%6, ",
              "], [%7];",
              "r"(dst),
              "l"(map),
              "r"(bar));
}

template <int kRank>
__device__ __forceinline__ void tma_load_multicast(
    uint32_t dst, const CUtensorMap* map, uint32_t bar, const int (&at)[kRank], uint16_t mask) {
  DILSEG_TILE(
      "cp.async.bulk.tensor",
      "shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%5], [%6, ",
      "], [%7], %8;",
      "r"(dst),
      "l"(map),
      "r"(bar),
      "h"(mask));
}

template <int kRank>
__device__ __forceinline__ void tma_load_im2col(uint32_t dst,
                                                const CUtensorMap* map,
                                                uint32_t bar,
                                                const int (&at)[kRank],
                                                const uint16_t (&offset)[kRank - 2]) {
  DILSEG_IM2COL("", ";", "r"(dst), "l"(map), "r"(bar));
}

template <int kRank>
__device__ __forceinline__ void tma_load_im2col_multicast(uint32_t dst,
                                                          const CUtensorMap* map,
                                                          uint32_t bar,
                                                          const int (&at)[kRank],
                                                          const uint16_t (&offset)[kRank - 2],
                                                          uint16_t mask) {
  DILSEG_IM2COL(".multicast::cluster", ", %11;", "r"(dst), "l"(map), "r"(bar), "h"(mask));
}

template <int kRank>
__device__ __forceinline__ void tma_store(const CUtensorMap* map,
                                          const int (&at)[kRank],
                                          uint32_t src) {
  DILSEG_TILE("cp.async.bulk.tensor",
              "global.shared::cta.tile.bulk_group [%5, ",
              "], [%6];",
              "l"(map),
              "r"(src));
}

// The order of the additions is not fixed.
template <int kRank>
__device__ __forceinline__ void tma_reduce_add(const CUtensorMap* map,
                                               const int (&at)[kRank],
                                               uint32_t src) {
  DILSEG_TILE("cp.reduce.async.bulk.tensor",
              "global.shared::cta.add.tile.bulk_group [%5, ",
              "], [%6];",
              "l"(map),
              "r"(src));
}

#undef DILSEG_TILE_RANK
#undef DILSEG_TILE
#undef DILSEG_IM2COL_RANK
#undef DILSEG_IM2COL

// --- bulk copies -------------------------------------------------------------------------------
// bytes and both addresses are multiples of 16.

__device__ __forceinline__ void bulk_load(uint32_t dst,
                                          const void* src,
                                          uint32_t bytes,
                                          uint32_t bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      :
      : "r"(dst), "l"(src), "r"(bytes), "r"(bar)
      : "memory");
}

__device__ __forceinline__ void bulk_load_multicast(
    uint32_t dst, const void* src, uint32_t bytes, uint32_t bar, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1], %2, [%3], %4;"
      :
      : "r"(dst), "l"(src), "r"(bytes), "r"(bar), "h"(mask)
      : "memory");
}

__device__ __forceinline__ void bulk_store(void* dst, uint32_t src, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               :
               : "l"(dst), "r"(src), "r"(bytes)
               : "memory");
}

// The order of the additions is not fixed.
__device__ __forceinline__ void bulk_reduce_add_f32(float* dst, uint32_t src, uint32_t bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               :
               : "l"(dst), "r"(src), "r"(bytes)
               : "memory");
}

// Own shared memory to that of another block; both cluster addresses name the same block.
__device__ __forceinline__ void bulk_copy_cluster(uint32_t dst_cluster,
                                                  uint32_t src,
                                                  uint32_t bytes,
                                                  uint32_t bar_cluster) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
      "[%0], [%1], %2, [%3];"
      :
      : "r"(dst_cluster), "r"(src), "r"(bytes), "r"(bar_cluster)
      : "memory");
}

__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" : : : "memory");
}

// At most kPending of this thread's newest stores and reductions are still incomplete.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" : : "n"(kPending) : "memory");
}

// As bulk_wait, but only for their reads: the shared source may be overwritten.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(kPending) : "memory");
}

// --- wgmma -------------------------------------------------------------------------------------
// The four warps of an aligned warpgroup execute these together. Fence before the first wgmma and
// after any ordinary access to d or a; from then until the wait that covers its group, neither may
// be touched, nor may the shared operands be overwritten. ptxas warning C7510 means it was broken.
// The compiler may move register arithmetic across the fence and the wait: ptxas then injects a
// fence (info C7519, harmless) or serialises (C7510).

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  static_assert(0 <= kPending && kPending <= 7);
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
}

// The accumulators are operands %0 .. %(N / 2 - 1). DILSEG_REST_N(f) applies f to all but the first
// four of them, four at a time: to write their names, and to bind them to d.
// clang-format off
#define DILSEG_REST_8(f)
#define DILSEG_REST_16(f) DILSEG_REST_8(f) f(4, 5, 6, 7)
#define DILSEG_REST_24(f) DILSEG_REST_16(f) f(8, 9, 10, 11)
#define DILSEG_REST_32(f) DILSEG_REST_24(f) f(12, 13, 14, 15)
#define DILSEG_REST_40(f) DILSEG_REST_32(f) f(16, 17, 18, 19)
#define DILSEG_REST_48(f) DILSEG_REST_40(f) f(20, 21, 22, 23)
#define DILSEG_REST_56(f) DILSEG_REST_48(f) f(24, 25, 26, 27)
#define DILSEG_REST_64(f) DILSEG_REST_56(f) f(28, 29, 30, 31)
#define DILSEG_REST_72(f) DILSEG_REST_64(f) f(32, 33, 34, 35)
#define DILSEG_REST_80(f) DILSEG_REST_72(f) f(36, 37, 38, 39)
#define DILSEG_REST_88(f) DILSEG_REST_80(f) f(40, 41, 42, 43)
#define DILSEG_REST_96(f) DILSEG_REST_88(f) f(44, 45, 46, 47)
#define DILSEG_REST_104(f) DILSEG_REST_96(f) f(48, 49, 50, 51)
#define DILSEG_REST_112(f) DILSEG_REST_104(f) f(52, 53, 54, 55)
#define DILSEG_REST_120(f) DILSEG_REST_112(f) f(56, 57, 58, 59)
#define DILSEG_REST_128(f) DILSEG_REST_120(f) f(60, 61, 62, 63)
#define DILSEG_REST_136(f) DILSEG_REST_128(f) f(64, 65, 66, 67)
#define DILSEG_REST_144(f) DILSEG_REST_136(f) f(68, 69, 70, 71)
#define DILSEG_REST_152(f) DILSEG_REST_144(f) f(72, 73, 74, 75)
#define DILSEG_REST_160(f) DILSEG_REST_152(f) f(76, 77, 78, 79)
#define DILSEG_REST_168(f) DILSEG_REST_160(f) f(80, 81, 82, 83)
#define DILSEG_REST_176(f) DILSEG_REST_168(f) f(84, 85, 86, 87)
#define DILSEG_REST_184(f) DILSEG_REST_176(f) f(88, 89, 90, 91)
#define DILSEG_REST_192(f) DILSEG_REST_184(f) f(92, 93, 94, 95)
#define DILSEG_REST_200(f) DILSEG_REST_192(f) f(96, 97, 98, 99)
#define DILSEG_REST_208(f) DILSEG_REST_200(f) f(100, 101, 102, 103)
#define DILSEG_REST_216(f) DILSEG_REST_208(f) f(104, 105, 106, 107)
#define DILSEG_REST_224(f) DILSEG_REST_216(f) f(108, 109, 110, 111)
#define DILSEG_REST_232(f) DILSEG_REST_224(f) f(112, 113, 114, 115)
#define DILSEG_REST_240(f) DILSEG_REST_232(f) f(116, 117, 118, 119)
#define DILSEG_REST_248(f) DILSEG_REST_240(f) f(120, 121, 122, 123)
#define DILSEG_REST_256(f) DILSEG_REST_248(f) f(124, 125, 126, 127)
// Applies f to each N and the numbers of the seven operands after its accumulators.
#define DILSEG_EACH_N(f, ...) \
  f(8, 4, 5, 6, 7, 8, 9, 10, __VA_ARGS__) \
  f(16, 8, 9, 10, 11, 12, 13, 14, __VA_ARGS__) \
  f(24, 12, 13, 14, 15, 16, 17, 18, __VA_ARGS__) \
  f(32, 16, 17, 18, 19, 20, 21, 22, __VA_ARGS__) \
  f(40, 20, 21, 22, 23, 24, 25, 26, __VA_ARGS__) \
  f(48, 24, 25, 26, 27, 28, 29, 30, __VA_ARGS__) \
  f(56, 28, 29, 30, 31, 32, 33, 34, __VA_ARGS__) \
  f(64, 32, 33, 34, 35, 36, 37, 38, __VA_ARGS__) \
  f(72, 36, 37, 38, 39, 40, 41, 42, __VA_ARGS__) \
  f(80, 40, 41, 42, 43, 44, 45, 46, __VA_ARGS__) \
  f(88, 44, 45, 46, 47, 48, 49, 50, __VA_ARGS__) \
  f(96, 48, 49, 50, 51, 52, 53, 54, __VA_ARGS__) \
  f(104, 52, 53, 54, 55, 56, 57, 58, __VA_ARGS__) \
  f(112, 56, 57, 58, 59, 60, 61, 62, __VA_ARGS__) \
  f(120, 60, 61, 62, 63, 64, 65, 66, __VA_ARGS__) \
  f(128, 64, 65, 66, 67, 68, 69, 70, __VA_ARGS__) \
  f(136, 68, 69, 70, 71, 72, 73, 74, __VA_ARGS__) \
  f(144, 72, 73, 74, 75, 76, 77, 78, __VA_ARGS__) \
  f(152, 76, 77, 78, 79, 80, 81, 82, __VA_ARGS__) \
  f(160, 80, 81, 82, 83, 84, 85, 86, __VA_ARGS__) \
  f(168, 84, 85, 86, 87, 88, 89, 90, __VA_ARGS__) \
  f(176, 88, 89, 90, 91, 92, 93, 94, __VA_ARGS__) \
  f(184, 92, 93, 94, 95, 96, 97, 98, __VA_ARGS__) \
  f(192, 96, 97, 98, 99, 100, 101, 102, __VA_ARGS__) \
  f(200, 100, 101, 102, 103, 104, 105, 106, __VA_ARGS__) \
  f(208, 104, 105, 106, 107, 108, 109, 110, __VA_ARGS__) \
  f(216, 108, 109, 110, 111, 112, 113, 114, __VA_ARGS__) \
  f(224, 112, 113, 114, 115, 116, 117, 118, __VA_ARGS__) \
  f(232, 116, 117, 118, 119, 120, 121, 122, __VA_ARGS__) \
  f(240, 120, 121, 122, 123, 124, 125, 126, __VA_ARGS__) \
  f(248, 124, 125, 126, 127, 128, 129, 130, __VA_ARGS__) \
  f(256, 128, 129, 130, 131, 132, 133, 134, __VA_ARGS__)
// clang-format on
#define DILSEG_NAMES(i, j, k, l) ", %" #i ", %" #j ", %" #k ", %" #l
#define DILSEG_BINDINGS(i, j, k, l) , "+f"(d[i]), "+f"(d[j]), "+f"(d[k]), "+f"(d[l])

#define DILSEG_WGMMA_OP(N, types)              \
  "wgmma.mma_async.sync.aligned.m64n" #N types \
  " {%0, %1, %2, %3" DILSEG_REST_##N(DILSEG_NAMES) "}, "

// Operands after the accumulators: scale_d, b, then the ones given.
#define DILSEG_WGMMA(N, scale, types, operands, ...)                                              \
  if constexpr (kN == N) {                                                                        \
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #scale ", 0; " DILSEG_WGMMA_OP(N, types)      \
                     operands "; }"                                                               \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])DILSEG_REST_##N(DILSEG_BINDINGS) \
                 : "r"(static_cast<int>(scale_d)), "l"(b), __VA_ARGS__                            \
                 : "memory");                                                                     \
  }

// A in shared memory (S) or in registers (R); tf32 takes no transposes.
#define DILSEG_WGMMA_S(N, scale, b_, a_, ta, tb, x, y, types)  \
  DILSEG_WGMMA(N,                                              \
               scale,                                          \
               types,                                          \
               "%" #a_ ", %" #b_ ", p, 1, 1, %" #ta ", %" #tb, \
               "l"(a),                                         \
               "n"(kTransA),                                   \
               "n"(kTransB))
#define DILSEG_WGMMA_S_TF32(N, scale, b_, a_, u, v, x, y, types) \
  DILSEG_WGMMA(N, scale, types, "%" #a_ ", %" #b_ ", p, 1, 1", "l"(a))
#define DILSEG_WGMMA_R(N, scale, b_, a0, a1, a2, a3, tb, types)                      \
  DILSEG_WGMMA(N,                                                                    \
               scale,                                                                \
               types,                                                                \
               "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_ ", p, 1, 1, %" #tb, \
               "r"(a[0]),                                                            \
               "r"(a[1]),                                                            \
               "r"(a[2]),                                                            \
               "r"(a[3]),                                                            \
               "n"(kTransB))
#define DILSEG_WGMMA_R_TF32(N, scale, b_, a0, a1, a2, a3, y, types)           \
  DILSEG_WGMMA(N,                                                             \
               scale,                                                         \
               types,                                                         \
               "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_ ", p, 1, 1", \
               "r"(a[0]),                                                     \
               "r"(a[1]),                                                     \
               "r"(a[2]),                                                     \
               "r"(a[3]))

// What the functions below assert: N and, for each operand, K-major (0) or MN-major (1).
template <int kN, int kTransA, int kTransB>
constexpr bool kWgmmaValid = kN % 8 == 0 && 8 <= kN && kN <= 256 &&
                             (kTransA == 0 || kTransA == 1) && (kTransB == 0 || kTransB == 1);

// D[64 x kN] += A B, or D = A B without scale_d; a and b are wgmma_descriptor()s. k is 16.
template <int kN, int kTransA, int kTransB>
__device__ __forceinline__ void wgmma_bf16(float (&d)[kN / 2],
                                           uint64_t a,
                                           uint64_t b,
                                           bool scale_d) {
  static_assert(kWgmmaValid<kN, kTransA, kTransB>);
  DILSEG_EACH_N(DILSEG_WGMMA_S, "k16.f32.bf16.bf16");
}

template <int kN, int kTransA, int kTransB>
__device__ __forceinline__ void wgmma_f16(float (&d)[kN / 2],
                                          uint64_t a,
                                          uint64_t b,
                                          bool scale_d) {
  static_assert(kWgmmaValid<kN, kTransA, kTransB>);
  DILSEG_EACH_N(DILSEG_WGMMA_S, "k16.f32.f16.f16");
}

// k is 8 and both operands are K-major. Values not rounded to tf32 before are truncated.
template <int kN>
__device__ __forceinline__ void wgmma_tf32(float (&d)[kN / 2],
                                           uint64_t a,
                                           uint64_t b,
                                           bool scale_d) {
  static_assert(kWgmmaValid<kN, 0, 0>);
  DILSEG_EACH_N(DILSEG_WGMMA_S_TF32, "k8.f32.tf32.tf32");
}

// The same with A in registers.
template <int kN, int kTransB>
__device__ __forceinline__ void wgmma_bf16(float (&d)[kN / 2],
                                           const uint32_t (&a)[4],
                                           uint64_t b,
                                           bool scale_d) {
  static_assert(kWgmmaValid<kN, 0, kTransB>);
  DILSEG_EACH_N(DILSEG_WGMMA_R, "k16.f32.bf16.bf16");
}

template <int kN, int kTransB>
__device__ __forceinline__ void wgmma_f16(float (&d)[kN / 2],
                                          const uint32_t (&a)[4],
                                          uint64_t b,
                                          bool scale_d) {
  static_assert(kWgmmaValid<kN, 0, kTransB>);
  DILSEG_EACH_N(DILSEG_WGMMA_R, "k16.f32.f16.f16");
}

template <int kN>
__device__ __forceinline__ void wgmma_tf32(float (&d)[kN / 2],
                                           const uint32_t (&a)[4],
                                           uint64_t b,
                                           bool scale_d) {
  static_assert(kWgmmaValid<kN, 0, 0>);
  DILSEG_EACH_N(DILSEG_WGMMA_R_TF32, "k8.f32.tf32.tf32");
}

#undef DILSEG_EACH_N
#undef DILSEG_NAMES
#undef DILSEG_BINDINGS
#undef DILSEG_WGMMA_OP
#undef DILSEG_WGMMA
#undef DILSEG_WGMMA_S
#undef DILSEG_WGMMA_S_TF32
#undef DILSEG_WGMMA_R
#undef DILSEG_WGMMA_R_TF32

// Descriptor of a shared-memory operand. layout: 0 no swizzle, 1 128-byte, 2 64-byte, 3 32-byte;
// the base offset is 0, so the swizzle pattern starts at a multiple of its own size.
__host__ __device__ constexpr uint64_t wgmma_descriptor(uint32_t address,
                                                        uint32_t leading_bytes,
                                                        uint32_t stride_bytes,
                                                        int layout) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         static_cast<uint64_t>((leading_bytes & 0x3FFFF) >> 4) << 16 |
         static_cast<uint64_t>((stride_bytes & 0x3FFFF) >> 4) << 32 |
         static_cast<uint64_t>(layout) << 62;
}

// Registers per thread of the calling warpgroup. Ignored (warning C7508) unless the kernel states
// its launch bounds.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 256);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  static_assert(kRegisters % 8 == 0 && 24 <= kRegisters && kRegisters <= 256);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters) : "memory");
}

// --- clusters ----------------------------------------------------------------------------------
// Arrive and wait before the first remote access and again before exit: no block may leave while
// another can still touch its shared memory.

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" : : : "memory");
}

__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory");
}

// The cluster address of what lies at `address` in the block of that rank.
__device__ __forceinline__ uint32_t map_shared(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

__device__ __forceinline__ uint32_t load_shared_cluster(uint32_t cluster_address) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(cluster_address) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared_cluster(uint32_t cluster_address, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" : : "r"(cluster_address), "r"(value) : "memory");
}

// Completes 4 bytes on bar_cluster, a barrier of the block written to.
__device__ __forceinline__ void store_async(uint32_t cluster_address,
                                            uint32_t value,
                                            uint32_t bar_cluster) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];"
               :
               : "r"(cluster_address), "r"(value), "r"(bar_cluster)
               : "memory");
}

// --- programmatic dependent launch -------------------------------------------------------------

// Returns when the grids this one depends on have finished and their writes are visible.
__device__ __forceinline__ void grid_dependency_wait() {
  asm volatile("griddepcontrol.wait;" : : : "memory");
}

// Lets dependent grids start; publishes nothing.
__device__ __forceinline__ void grid_dependency_launch() {
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
}

}  // namespace dilseg::cuda::ptx
