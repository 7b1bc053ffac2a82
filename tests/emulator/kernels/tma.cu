// SPDX-License-Identifier: Apache-2.0
//
// Tensor copies between global memory and the shared memory of one block, as raw bytes.
#include "entry.h"
#include "maps.h"

namespace {

using dilseg::cuda::dynamic_shared;

template <int kRank>
struct Coordinates {
  int at[kRank];
};

template <int kRank>
__device__ Coordinates<kRank> coordinates(const Position& p) {
  Coordinates<kRank> c;
  for (int d = 0; d < kRank; ++d) {
    c.at[d] = p.at[d];
  }
  return c;
}

// The box goes to offset `where`; the barrier is at the start.
template <int kRank, bool kIm2col>
__global__ void load_kernel(
    const __grid_constant__ CUtensorMap map, Position p, int where, int bytes, uint32_t* out) {
  uint32_t* shared = dynamic_shared<uint32_t>();
  const uint32_t bar = ptx::shared_address(shared);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(&map);
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto c = coordinates<kRank>(p);
    const uint32_t dst = bar + static_cast<uint32_t>(where);
    ptx::mbarrier_arrive_expect_tx(bar, static_cast<uint32_t>(bytes));
    if constexpr (kIm2col) {
      uint16_t offsets[kRank - 2];
      for (int s = 0; s < kRank - 2; ++s) {
        offsets[s] = p.offsets[s];
      }
      ptx::tma_load_im2col(dst, &map, bar, c.at, offsets);
    } else {
      ptx::tma_load(dst, &map, bar, c.at);
    }
  }
  ptx::mbarrier_wait(bar, 0);
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 4; i += static_cast<int>(blockDim.x)) {
    out[i] = shared[where / 4 + i];
  }
}

template <int kRank, bool kAdd>
__global__ void store_kernel(
    const __grid_constant__ CUtensorMap map, Position p, int where, int bytes, const uint32_t* in) {
  uint32_t* shared = dynamic_shared<uint32_t>();
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 4; i += static_cast<int>(blockDim.x)) {
    shared[where / 4 + i] = in[i];
  }
  ptx::fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    const auto c = coordinates<kRank>(p);
    const uint32_t src = ptx::shared_address(shared) + static_cast<uint32_t>(where);
    if constexpr (kAdd) {
      ptx::tma_reduce_add(&map, c.at, src);
    } else {
      ptx::tma_store(&map, c.at, src);
    }
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
  }
}

template <class Kernel>
int copy(Kernel kernel,
         const CUtensorMap& map,
         const Position& p,
         int where,
         int bytes,
         uint32_t* memory) {
  const auto shared_bytes = static_cast<size_t>(where + bytes);
  return dilseg::cuda::launch(kernel, 1, 64, shared_bytes, nullptr, map, p, where, bytes, memory);
}

}  // namespace

EMU_ENTRY int load(
    void* tensor, const int* spec, int im2col, const int* at, int where, int bytes, uint32_t* out) {
  CUtensorMap map;
  if (!make_map(&map, tensor, spec, im2col != 0)) {
    return cudaErrorInvalidValue;
  }
  const int rank = spec[1];
  const Position p = read_position(at, rank, im2col != 0);
  const auto kernel = im2col != 0 ? (rank == 3   ? &load_kernel<3, true>
                                     : rank == 4 ? &load_kernel<4, true>
                                                 : &load_kernel<5, true>)
                      : rank == 1 ? &load_kernel<1, false>
                      : rank == 2 ? &load_kernel<2, false>
                      : rank == 3 ? &load_kernel<3, false>
                      : rank == 4 ? &load_kernel<4, false>
                                  : &load_kernel<5, false>;
  return copy(kernel, map, p, where, bytes, out);
}

EMU_ENTRY int store(
    void* tensor, const int* spec, int add, const int* at, int where, int bytes, uint32_t* in) {
  CUtensorMap map;
  if (!make_map(&map, tensor, spec, false)) {
    return cudaErrorInvalidValue;
  }
  const int rank = spec[1];
  const Position p = read_position(at, rank, false);
  const auto plain = rank == 1   ? &store_kernel<1, false>
                     : rank == 2 ? &store_kernel<2, false>
                     : rank == 3 ? &store_kernel<3, false>
                     : rank == 4 ? &store_kernel<4, false>
                                 : &store_kernel<5, false>;
  const auto adding = rank == 1   ? &store_kernel<1, true>
                      : rank == 2 ? &store_kernel<2, true>
                      : rank == 3 ? &store_kernel<3, true>
                      : rank == 4 ? &store_kernel<4, true>
                                  : &store_kernel<5, true>;
  return copy(add != 0 ? adding : plain, map, p, where, bytes, in);
}
