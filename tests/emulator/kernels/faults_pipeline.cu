// SPDX-License-Identifier: Apache-2.0
//
// The pipeline of sm_90a, right with kNone and wrong in one way with any other fault: TMA,
// mbarriers and wgmma, with the producer and the consumers in warps of their own.
#include "emu/report.h"
#include "emu/tensor_map.h"
#include "entry.h"

namespace {

using dilseg::cuda::dynamic_shared;

enum Fault {
  kNone,
  // gemm
  kEarlyRelease,
  kConsumerParity,
  kProducerParity,
  kExpectTooMany,
  kExpectTooFew,
  kExpectOneOperand,
  kMissingWgmmaFence,
  kWrittenWithoutFence,
  kReadInFlight,
  kWrittenInFlight,
  kMissingWgmmaWait,
  kMissingCommit,
  kStrideTooSmall,
  kStrideTooLarge,
  kDescriptorPastEnd,
  kSwizzleMismatch,
  kMissingProxyFence,
  kMissingInit,
  kInitUnordered,
  kBarrierOverwritten,
  kTooManyArrivals,
  kProducerArrivesTwice,
  kPartialWarpgroup,
  // move
  kUnencodedMap,
  kTileMapForIm2col,
  kMisalignedTile,
  kMulticastOutside,
  kStoreWithoutFence,
  kStoreNotWaited,
  kStoreSourceOverwritten,
};

// ---- tensor maps --------------------------------------------------------------------------------

// A tensor of rank 3, innermost first; what was refused is in the report.
template <class T>
cudaError_t encode(CUtensorMap& map,
                   CUtensorMapDataType type,
                   const T* data,
                   const cuuint64_t (&dims)[3],
                   const cuuint32_t (&box)[3],
                   CUtensorMapSwizzle swizzle) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaError_t status = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
  if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    return cudaErrorSymbolNotFound;
  }
  const cuuint64_t strides[2] = {dims[0] * sizeof(T), dims[0] * dims[1] * sizeof(T)};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map,
      type,
      3,
      const_cast<T*>(data),
      dims,
      strides,
      box,
      steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_NONE,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    emu::set_report(emu::tensor_map_error());
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

// ---- gemm ---------------------------------------------------------------------------------------

constexpr int kStages = 3;
constexpr int kRows = 64;
constexpr int kColumns = 16;
constexpr int kDepth = 64;  // of a stage: rows of 128 bytes, the width of the swizzle
constexpr uint32_t kRowBytes = kDepth * 2;
constexpr uint32_t kBytesA = kRows * kRowBytes;
constexpr uint32_t kBytesB = kColumns * kRowBytes;
constexpr uint32_t kStageBytes = kBytesA + kBytesB;
constexpr uint32_t kFull = kStages * kStageBytes;
constexpr uint32_t kEmpty = kFull + kStages * 8;
constexpr uint32_t kSharedBytes = kEmpty + kStages * 8;
constexpr int kThreads = 256;

// How B comes into shared memory; A always comes by TMA.
enum Fill { kFillTma, kFillStores, kFillCopies };

// Position of a step in the ring of stages.
struct Place {
  uint32_t stage, full, empty, parity;
};
__device__ Place place_of(uint32_t base, int step) {
  const auto slot = static_cast<uint32_t>(step % kStages);
  return {base + slot * kStageBytes,
          base + kFull + slot * 8,
          base + kEmpty + slot * 8,
          static_cast<uint32_t>(step / kStages & 1)};
}

// One thread.
__device__ void produce(const CUtensorMap* a_map,
                        const CUtensorMap* b_map,
                        uint32_t base,
                        int steps,
                        Fill fill,
                        Fault fault) {
  uint32_t bytes = fill == kFillTma ? kStageBytes : kBytesA;
  bytes += fault == kExpectTooMany ? 16 : 0;
  bytes -= fault == kExpectTooFew ? 16 : 0;
  bytes -= fault == kExpectOneOperand ? kBytesB : 0;
  for (int step = 0; step < steps; ++step) {
    const Place p = place_of(base, step);
    ptx::mbarrier_wait(p.empty, fault == kProducerParity ? p.parity : p.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(p.full, bytes);
    if (fault == kProducerArrivesTwice) {
      ptx::mbarrier_arrive(p.full);
    }
    ptx::tma_load(p.stage, a_map, p.full, {step * kDepth, 0, 0});
    if (fill == kFillTma) {
      ptx::tma_load(p.stage + kBytesA, b_map, p.full, {step * kDepth, 0, 0});
    }
  }
}

// One warp brings B, 16 bytes at a time, to where TMA would have put it.
__device__ void fill_b(
    const uint16_t* b, unsigned char* shared, uint32_t base, int steps, Fill fill, Fault fault) {
  const int lane = threadIdx.x % 32;
  const int depth = steps * kDepth;
  for (int step = 0; step < steps; ++step) {
    const Place p = place_of(base, step);
    ptx::mbarrier_wait(p.empty, p.parity ^ 1);
    for (int i = lane; i < kColumns * 8; i += 32) {
      const int row = i / 8;
      const uint32_t to = p.stage + kBytesA + static_cast<uint32_t>(row) * kRowBytes +
                          static_cast<uint32_t>(i % 8 ^ row % 8) * 16;
      const uint16_t* from = b + row * depth + step * kDepth + i % 8 * 8;
      if (fill == kFillCopies) {
        ptx::cp_async_cg(to, from);
      } else {
        *reinterpret_cast<uint4*>(shared + (to - base)) = *reinterpret_cast<const uint4*>(from);
      }
    }
    ptx::cp_async_wait_all();
    if (fault != kMissingProxyFence) {
      ptx::fence_proxy_async();
    }
    ptx::mbarrier_arrive(p.full);
  }
}

// One warpgroup.
__device__ void consume(float* out, uint32_t base, int steps, Fault fault) {
  const int t = threadIdx.x % 128;
  const int lane = t % 32;
  if (fault == kPartialWarpgroup && t / 32 == 3) {
    return;
  }
  const uint32_t stride = fault == kStrideTooSmall ? 512 : fault == kStrideTooLarge ? 2048 : 1024;
  float d[kColumns / 2];
  if (fault == kWrittenWithoutFence) {
    ptx::wgmma_fence();
  }
  for (int step = 0; step < steps; ++step) {
    const Place p = place_of(base, step);
    ptx::mbarrier_wait(p.full, fault == kConsumerParity ? p.parity ^ 1 : p.parity);
    if (fault == kWrittenWithoutFence) {
      if (step == 2) {
        ptx::wgmma_wait<0>();
        d[0] = 2 * d[0];
      }
    } else if (fault != kMissingWgmmaFence) {
      ptx::wgmma_fence();
    }
    const uint32_t b = fault == kDescriptorPastEnd ? base + 32 * 1024 : p.stage + kBytesA;
    for (int k = 0; k < kDepth / 16; ++k) {
      const auto along = static_cast<uint32_t>(k) * 32;
      ptx::wgmma_bf16<kColumns, 0, 0>(d,
                                      ptx::wgmma_descriptor(p.stage + along, 16, stride, 1),
                                      ptx::wgmma_descriptor(b + along, 16, 1024, 1),
                                      step != 0 || k != 0);
    }
    if (fault == kWrittenInFlight && step == 3) {
      d[1] = 0;
    }
    if (fault != kMissingCommit || step != steps - 1) {
      ptx::wgmma_commit();
    }
    ptx::wgmma_wait<1>();
    // One stage back: the wgmmas of this step may still be reading theirs.
    const int done = fault == kEarlyRelease ? step : step - 1;
    if (done >= 0 && (lane == 0 || fault == kTooManyArrivals)) {
      ptx::mbarrier_arrive(place_of(base, done).empty);
    }
  }
  if (fault != kReadInFlight && fault != kMissingWgmmaWait) {
    ptx::wgmma_wait<0>();
  }
  for (int v = 0; v < kColumns / 2; ++v) {
    const int row = t / 32 * 16 + lane / 4 + 8 * (v >> 1 & 1);
    out[row * kColumns + 8 * (v >> 2) + 2 * (lane % 4) + (v & 1)] = d[v];
  }
  if (fault == kReadInFlight) {
    ptx::wgmma_wait<0>();
  }
}

// out [64][16] = A [64][depth] times B [16][depth] transposed, in bfloat16.
__global__ void __launch_bounds__(kThreads, 1)
    gemm_kernel(const __grid_constant__ CUtensorMap a_map,
                const __grid_constant__ CUtensorMap b_map,
                const uint16_t* b,
                float* out,
                int steps,
                Fill fill,
                Fault fault) {
  unsigned char* shared = dynamic_shared<unsigned char>();
  const uint32_t base = ptx::shared_address(shared);
  const int t = threadIdx.x;
  if (t == 0) {
    const int stages = fault == kMissingInit ? kStages - 1 : kStages;
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(place_of(base, i).full, fill == kFillTma ? 1 : 33);
      ptx::mbarrier_init(place_of(base, i).empty, 4);
    }
    ptx::fence_mbarrier_init();
  }
  if (fault != kInitUnordered) {
    __syncthreads();
  }
  if (fault == kBarrierOverwritten && t == 255) {
    reinterpret_cast<int*>(shared + kFull)[0] = 0;  // as a tile one row too long would
  }
  if (t == 0) {
    produce(&a_map, &b_map, base, steps, fill, fault);
  } else if (t / 32 == 1 && fill != kFillTma) {
    fill_b(b, shared, base, steps, fill, fault);
  } else if (t >= 128) {
    consume(out, base, steps, fault);
  }
}

// ---- move ---------------------------------------------------------------------------------------

constexpr int kTileColumns = 32;
constexpr int kTileRows = 8;
constexpr uint32_t kTileBytes = kTileRows * kTileColumns * sizeof(int);

// Adds 1 to a tile, which comes and goes by TMA.
__global__ void move_kernel(const __grid_constant__ CUtensorMap from,
                            const __grid_constant__ CUtensorMap to,
                            Fault fault) {
  int* tile = dynamic_shared<int>() + (fault == kMisalignedTile ? 4 : 0);
  const uint32_t address = ptx::shared_address(tile);
  const uint32_t bar = ptx::shared_address(dynamic_shared<unsigned char>() + kTileBytes + 128);
  const int t = threadIdx.x;
  const int plane = blockIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(bar, kTileBytes);
    if (fault == kTileMapForIm2col) {
      ptx::tma_load_im2col(address, &from, bar, {0, 0, plane}, {0});
    } else if (fault == kMulticastOutside) {
      ptx::tma_load_multicast(address, &from, bar, {0, 0, plane}, 0x2);
    } else {
      ptx::tma_load(address, &from, bar, {0, 0, plane});
    }
  }
  __syncthreads();
  ptx::mbarrier_wait(bar, 0);
  for (int row = 0; row < kTileRows; ++row) {
    tile[row * kTileColumns + t] += 1;
  }
  if (fault != kStoreWithoutFence) {
    ptx::fence_proxy_async();
  }
  __syncthreads();
  if (t == 0) {
    ptx::tma_store(&to, {0, 0, plane}, address);
    ptx::bulk_commit();
    if (fault == kStoreSourceOverwritten) {
      tile[5] = 0;
    }
    if (fault != kStoreNotWaited) {
      ptx::bulk_wait_read<0>();
    }
  }
}

}  // namespace

EMU_ENTRY int gemm(
    const uint16_t* a, const uint16_t* b, float* out, int steps, int fill, int fault) {
  const auto swizzle =
      fault == kSwizzleMismatch ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B;
  const auto depth = static_cast<cuuint64_t>(steps) * kDepth;
  const auto type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap a_map, b_map;
  cudaError_t status = encode(a_map, type, a, {depth, kRows, 1}, {kDepth, kRows, 1}, swizzle);
  if (status == cudaSuccess) {
    status = encode(b_map, type, b, {depth, kColumns, 1}, {kDepth, kColumns, 1}, swizzle);
  }
  return status != cudaSuccess ? status
                               : launch_with({},
                                             &gemm_kernel,
                                             1,
                                             kThreads,
                                             kSharedBytes,
                                             a_map,
                                             b_map,
                                             b,
                                             out,
                                             steps,
                                             Fill(fill),
                                             Fault(fault));
}

EMU_ENTRY int move(const int* from, int* to, int planes, int fault) {
  const auto type = CU_TENSOR_MAP_DATA_TYPE_INT32;
  const cuuint64_t dims[3] = {kTileColumns, kTileRows, static_cast<cuuint64_t>(planes)};
  const cuuint32_t box[3] = {kTileColumns, kTileRows, 1};
  CUtensorMap from_map = {}, to_map = {};
  cudaError_t status = encode(to_map, type, to, dims, box, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (status == cudaSuccess && fault != kUnencodedMap) {
    status = encode(from_map, type, from, dims, box, CU_TENSOR_MAP_SWIZZLE_NONE);
  }
  return status != cudaSuccess ? status
                               : launch_with({},
                                             &move_kernel,
                                             planes,
                                             kTileColumns,
                                             kTileBytes + 256,
                                             from_map,
                                             to_map,
                                             Fault(fault));
}

// Makes a map of halves [planes][8][columns], starting `shift` elements into the data.
EMU_ENTRY int encode_only(
    const uint16_t* data, int shift, int columns, int box_columns, int box_rows, int swizzle) {
  CUtensorMap map;
  return encode(map,
                CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                data + shift,
                {static_cast<cuuint64_t>(columns), 8, 2},
                {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows), 1},
                static_cast<CUtensorMapSwizzle>(swizzle));
}
