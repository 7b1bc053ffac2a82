// SPDX-License-Identifier: Apache-2.0
//
// What threads of a block and lanes of a warp do with each other, atomics, and scalars.
#include "entry.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

namespace {

using dilseg::cuda::dynamic_shared;
using dilseg::cuda::launch;

__global__ void indices_kernel(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  int* mine = out + 12 * (block * threads + thread);
  const auto put = [&mine](unsigned x, unsigned y, unsigned z) {
    *mine++ = static_cast<int>(x);
    *mine++ = static_cast<int>(y);
    *mine++ = static_cast<int>(z);
  };
  put(blockIdx.x, blockIdx.y, blockIdx.z);
  put(threadIdx.x, threadIdx.y, threadIdx.z);
  put(gridDim.x, gridDim.y, gridDim.z);
  put(blockDim.x, blockDim.y, blockDim.z);
}

// Per thread: what its neighbour wrote, and the three votes.
__global__ void block_barrier_kernel(const int* in, int* out) {
  int* shared = dynamic_shared<int>();
  const unsigned t = threadIdx.x;
  shared[t] = in[t];
  __syncthreads();
  out[4 * t] = shared[(t + 1) % blockDim.x];
  out[4 * t + 1] = __syncthreads_count(in[t]);
  out[4 * t + 2] = __syncthreads_or(in[t]);
  out[4 * t + 3] = __syncthreads_and(in[t]);
}

// Warps 0 and 1 write two buffers in turn, warps 2 and 3 read them.
__global__ void named_barrier_kernel(const int* in, int* out, int rounds) {
  int* shared = dynamic_shared<int>();
  const int t = threadIdx.x % 64;
  const bool producer = threadIdx.x < 64;
  for (int i = 0; i < rounds; ++i) {
    const int slot = i % 2;
    if (producer) {
      if (i >= 2) {
        ptx::barrier_sync(3 + slot, 128);
      }
      shared[64 * slot + t] = in[64 * i + t];
      ptx::barrier_arrive(1 + slot, 128);
    } else {
      ptx::barrier_sync(1 + slot, 128);
      out[64 * i + t] = shared[64 * slot + (t * 7 + 1) % 64];
      if (i + 2 < rounds) {
        ptx::barrier_arrive(3 + slot, 128);
      }
    }
  }
}

template <class T>
__device__ T shuffled(int kind, unsigned mask, T value, int argument, int width) {
  switch (kind) {
    case 0:
      return __shfl_sync(mask, value, argument, width);
    case 1:
      return __shfl_up_sync(mask, value, static_cast<unsigned>(argument), width);
    case 2:
      return __shfl_down_sync(mask, value, static_cast<unsigned>(argument), width);
    default:
      return __shfl_xor_sync(mask, value, argument, width);
  }
}

// Lanes in the mask and lanes outside of it shuffle apart.
template <class T>
__global__ void shuffle_kernel(
    int kind, unsigned mask, int width, const int* arguments, const T* values, T* out) {
  const unsigned t = threadIdx.x;
  if ((mask >> (t % 32) & 1) != 0) {
    out[t] = shuffled(kind, mask, values[t], arguments[t], width);
  } else {
    out[t] = shuffled(kind, ~mask, values[t], arguments[t], width);
  }
}

__device__ void vote(unsigned mask, int value, unsigned* out) {
  const auto bits = static_cast<unsigned>(value);
  int all = -1;
  out[0] = __ballot_sync(mask, value & 1);
  out[1] = static_cast<unsigned>(__any_sync(mask, value & 2));
  out[2] = static_cast<unsigned>(__all_sync(mask, value & 4));
  out[3] = __match_any_sync(mask, value & 3);
  out[4] = __match_all_sync(mask, value & 4, &all);
  out[5] = static_cast<unsigned>(all);
  out[6] = static_cast<unsigned>(__reduce_add_sync(mask, value));
  out[7] = static_cast<unsigned>(__reduce_min_sync(mask, value));
  out[8] = static_cast<unsigned>(__reduce_max_sync(mask, value));
  out[9] = __reduce_min_sync(mask, bits);
  out[10] = __reduce_max_sync(mask, bits);
  out[11] = __reduce_and_sync(mask, bits);
  out[12] = __reduce_or_sync(mask, bits);
  out[13] = __reduce_xor_sync(mask, bits);
  out[14] = __reduce_add_sync(mask, bits);
}

__global__ void vote_kernel(unsigned mask, const int* values, unsigned* out) {
  const unsigned t = threadIdx.x;
  if ((mask >> (t % 32) & 1) != 0) {
    vote(mask, values[t], out + 15 * t);
  } else {
    vote(~mask, values[t], out + 15 * t);
  }
}

// Lane 0 publishes to its warp through shared memory.
__global__ void warp_barrier_kernel(const int* in, int* out) {
  int* shared = dynamic_shared<int>();
  const unsigned t = threadIdx.x;
  shared[t] = in[t];
  __syncwarp();
  out[t] = shared[t ^ 31];
}

enum { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompareAndSwap };

template <class T>
__device__ T applied(int op, T* p, T value, T compare) {
  if (op == kMin) {
    return atomicMin(p, value);
  }
  if (op == kMax) {
    return atomicMax(p, value);
  }
  if constexpr (!std::is_same_v<T, long long>) {
    switch (op) {
      case kAdd:
        return atomicAdd(p, value);
      case kAnd:
        return atomicAnd(p, value);
      case kOr:
        return atomicOr(p, value);
      case kXor:
        return atomicXor(p, value);
      case kExchange:
        return atomicExch(p, value);
      default:
        return atomicCAS(p, compare, value);
    }
  } else {
    return 0;
  }
}

// Thread i applies operand i to cell i % count and keeps what was there.
template <class T>
__global__ void atomic_kernel(
    int op, bool shared, int count, T* cells, const T* values, const T* compares, T* before) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  T* target = cells;
  if (shared) {
    target = dynamic_shared<T>();
    for (unsigned c = threadIdx.x; c < static_cast<unsigned>(count); c += blockDim.x) {
      target[c] = cells[c];
    }
    __syncthreads();
  }
  before[i] = applied(op, target + i % static_cast<unsigned>(count), values[i], compares[i]);
  if (shared) {
    __syncthreads();
    for (unsigned c = threadIdx.x; c < static_cast<unsigned>(count); c += blockDim.x) {
      cells[c] = target[c];
    }
  }
}

// cell = 3 cell + 1, by every thread, in a loop of compare and swap.
__global__ void compare_and_swap_loop_kernel(unsigned* cell) {
  unsigned old = atomicAdd(cell, 0u);
  while (true) {
    const unsigned seen = atomicCAS(cell, old, 3 * old + 1);
    if (seen == old) {
      return;
    }
    old = seen;
  }
}

template <class V, int kComponents>
__global__ void vector_kernel(const V* in, V* out) {
  V* shared = dynamic_shared<V>();
  const unsigned t = threadIdx.x;
  shared[t] = __ldg(in + t);
  __syncthreads();
  const V v = shared[blockDim.x - 1 - t];
  V reversed;
  if constexpr (kComponents == 4) {
    reversed.x = v.w;
    reversed.y = v.z;
    reversed.z = v.y;
    reversed.w = v.x;
  } else {
    reversed.x = v.y;
    reversed.y = v.x;
  }
  out[t] = reversed;
}

template <class V, int kComponents>
int vectors(const void* in, void* out, int n) {
  return launch(&vector_kernel<V, kComponents>,
                1,
                static_cast<unsigned>(n),
                sizeof(V) * static_cast<size_t>(n),
                nullptr,
                static_cast<const V*>(in),
                static_cast<V*>(out));
}

__global__ void convert_kernel(const float* in,
                               unsigned short* half,
                               unsigned short* half_rz,
                               float* half_back,
                               unsigned short* bfloat,
                               unsigned short* bfloat_rz,
                               float* bfloat_back,
                               unsigned* tf32) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const float x = in[i];
  half[i] = __half_as_ushort(__float2half_rn(x));
  half_rz[i] = __half_as_ushort(__float2half_rz(x));
  half_back[i] = __half2float(__float2half_rn(x));
  bfloat[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x));
  bfloat_rz[i] = __bfloat16_as_ushort(__float2bfloat16_rz(x));
  bfloat_back[i] = __bfloat162float(__float2bfloat16_rn(x));
  tf32[i] = ptx::to_tf32(x);
}

template <class T>
int atomics(int op,
            int shared,
            int count,
            int blocks,
            int threads,
            void* cells,
            const void* values,
            const void* compares,
            void* before) {
  return launch(&atomic_kernel<T>,
                static_cast<unsigned>(blocks),
                static_cast<unsigned>(threads),
                shared != 0 ? sizeof(T) * static_cast<size_t>(count) : 0,
                nullptr,
                op,
                shared != 0,
                count,
                static_cast<T*>(cells),
                static_cast<const T*>(values),
                static_cast<const T*>(compares),
                static_cast<T*>(before));
}

}  // namespace

EMU_ENTRY int indices(int gx, int gy, int gz, int bx, int by, int bz, int* out) {
  const auto size = [](int x, int y, int z) {
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
  };
  return launch_with({}, &indices_kernel, size(gx, gy, gz), size(bx, by, bz), 0, out);
}

EMU_ENTRY int block_barrier(int threads, const int* in, int* out) {
  const auto n = static_cast<unsigned>(threads);
  return launch(&block_barrier_kernel, 1, n, 4 * n, nullptr, in, out);
}

EMU_ENTRY int named_barrier(const int* in, int* out, int rounds) {
  return launch(&named_barrier_kernel, 1, 128, 512, nullptr, in, out, rounds);
}

EMU_ENTRY int warp_barrier(const int* in, int* out) {
  return launch(&warp_barrier_kernel, 1, 64, 256, nullptr, in, out);
}

EMU_ENTRY int shuffle(
    int wide, int kind, int mask, int width, const int* arguments, const void* values, void* out) {
  const auto bits = static_cast<unsigned>(mask);
  if (wide != 0) {
    return launch(&shuffle_kernel<double>,
                  1,
                  64,
                  0,
                  nullptr,
                  kind,
                  bits,
                  width,
                  arguments,
                  static_cast<const double*>(values),
                  static_cast<double*>(out));
  }
  return launch(&shuffle_kernel<int>,
                1,
                64,
                0,
                nullptr,
                kind,
                bits,
                width,
                arguments,
                static_cast<const int*>(values),
                static_cast<int*>(out));
}

EMU_ENTRY int votes(int mask, const int* values, unsigned* out) {
  return launch(&vote_kernel, 1, 64, 0, nullptr, static_cast<unsigned>(mask), values, out);
}

EMU_ENTRY int atomic(int type,
                     int op,
                     int shared,
                     int count,
                     int blocks,
                     int threads,
                     void* cells,
                     const void* values,
                     const void* compares,
                     void* before) {
  const auto run = type == 0   ? &atomics<int>
                   : type == 1 ? &atomics<unsigned>
                   : type == 2 ? &atomics<unsigned long long>
                               : &atomics<long long>;
  return run(op, shared, count, blocks, threads, cells, values, compares, before);
}

EMU_ENTRY int compare_and_swap_loop(unsigned* cell) {
  return launch(&compare_and_swap_loop_kernel, 2, 40, 0, nullptr, cell);
}

EMU_ENTRY int vector_access(int type, const void* in, void* out, int n) {
  switch (type) {
    case 0:
      return vectors<float4, 4>(in, out, n);
    case 1:
      return vectors<uint4, 4>(in, out, n);
    case 2:
      return vectors<int2, 2>(in, out, n);
    case 3:
      return vectors<double2, 2>(in, out, n);
    case 4:
      return vectors<ushort4, 4>(in, out, n);
    default:
      return vectors<uchar4, 4>(in, out, n);
  }
}

EMU_ENTRY int convert(const float* in,
                      unsigned short* half,
                      unsigned short* half_rz,
                      float* half_back,
                      unsigned short* bfloat,
                      unsigned short* bfloat_rz,
                      float* bfloat_back,
                      unsigned* tf32,
                      int blocks) {
  return launch(&convert_kernel,
                static_cast<unsigned>(blocks),
                128,
                0,
                nullptr,
                in,
                half,
                half_rz,
                half_back,
                bfloat,
                bfloat_rz,
                bfloat_back,
                tf32);
}
