// SPDX-License-Identifier: Apache-2.0
//
// The instructions behind the wrappers of cuda/common/ptx.cuh, one function each, named as there.
// Shared addresses are 32-bit numbers in the window of the running thread's block.
#pragma once

#include "cuda.h"
#include "emu/core.h"
#include "emu/tensor_core.h"

#include <cstdint>

namespace emu {

uint32_t shared_address(const void* p);

// cp.async
void cp_async(uint32_t dst, const void* src, uint32_t bytes, uint32_t src_bytes);
void cp_async_commit();
void cp_async_wait(int pending);  // -1: all, also what was not committed
void cp_async_mbarrier_arrive(uint32_t bar);

// Matrices in registers
void ldmatrix(int count, bool trans, uint32_t* registers, uint32_t row);
void stmatrix(int count, bool trans, uint32_t row, const uint32_t* registers);
void mma(Element element, float* d, const uint32_t* a, const uint32_t* b);

// Named barriers
void barrier_sync(int id, int threads);
void barrier_arrive(int id, int threads);

// mbarrier
void mbarrier_init(uint32_t bar, uint32_t count);
void mbarrier_invalidate(uint32_t bar);
void mbarrier_arrive(uint32_t bar);
void mbarrier_arrive_expect_tx(uint32_t bar, uint32_t bytes);
void mbarrier_expect_tx(uint32_t bar, uint32_t bytes);
bool mbarrier_test_wait(uint32_t bar, uint32_t parity);
void mbarrier_wait(uint32_t bar, uint32_t parity);
void mbarrier_arrive_cluster(uint32_t cluster_bar);

void fence_proxy_async();

// TMA and bulk copies. mask: blocks of the cluster that receive it; 0: this block alone.
void tma_load(uint32_t dst,
              const CUtensorMap* map,
              uint32_t bar,
              const int* at,
              int rank,
              const uint16_t* im2col_offsets,
              uint16_t mask);
void tma_store(const CUtensorMap* map, const int* at, int rank, uint32_t src, bool add);
void prefetch_tensor_map(const CUtensorMap* map);
void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar, uint16_t mask);
void bulk_store(void* dst, uint32_t src, uint32_t bytes, bool add_f32);
void bulk_copy_cluster(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar);
void bulk_commit();
void bulk_wait(int pending);

// wgmma
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
void wgmma(Element element,
           int n,
           bool trans_a,
           bool trans_b,
           float* d,
           uint64_t a,
           uint64_t b,
           bool scale_d);
void wgmma(
    Element element, int n, bool trans_b, float* d, const uint32_t* a, uint64_t b, bool scale_d);
void setmaxnreg(int registers);

// Clusters
uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_barrier_arrive();
void cluster_barrier_wait();
uint32_t map_shared(uint32_t address, uint32_t rank);
uint32_t load_shared_cluster(uint32_t address);
void store_shared_cluster(uint32_t address, uint32_t value);
void store_async(uint32_t address, uint32_t value, uint32_t bar);

// Programmatic dependent launch
void grid_dependency_wait();

void grid_sync();

}  // namespace emu
