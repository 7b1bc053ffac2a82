// SPDX-License-Identifier: Apache-2.0
//
// cp.async, mbarriers, and bulk copies of one block.
#include "entry.h"

namespace {

using dilseg::cuda::dynamic_shared;
using dilseg::cuda::launch;

template <int kBytes, bool kCg>
__device__ void copy_async(uint32_t dst, const unsigned char* src, int src_bytes) {
  if constexpr (kCg) {
    ptx::cp_async_cg(dst, src, src_bytes);
  } else {
    ptx::cp_async_ca<kBytes>(dst, src, src_bytes);
  }
}

// Thread t copies sizes[t] bytes from offset sources[t] and fills its kBytes up; `late` leaves the
// copy to cp.async.wait_all.
template <int kBytes, bool kCg>
__global__ void cp_async_kernel(
    const unsigned char* in, const int* sources, const int* sizes, unsigned char* out, bool late) {
  unsigned char* shared = dynamic_shared<unsigned char>();
  const unsigned t = threadIdx.x;
  copy_async<kBytes, kCg>(ptx::shared_address(shared) + kBytes * t, in + sources[t], sizes[t]);
  if (late) {
    ptx::cp_async_wait_all();
  } else {
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  }
  __syncthreads();
  for (unsigned i = t; i < kBytes * blockDim.x; i += blockDim.x) {
    out[i] = shared[i];
  }
}

// Four stages of 16 bytes per thread, of which kLanded are used first and the others are after it
// still in flight; an empty group closes the sequence.
__global__ void cp_async_groups_kernel(const int4* in, int* out, int steps) {
  constexpr int kStages = 4;
  int4* shared = dynamic_shared<int4>();
  const int t = static_cast<int>(threadIdx.x);
  const int n = static_cast<int>(blockDim.x);
  const uint32_t base = ptx::shared_address(shared);
  const auto fetch = [&](int step) {
    if (step < steps) {
      ptx::cp_async_cg(base + static_cast<uint32_t>(16 * (step % kStages * n + t)),
                       in + step * n + t);
    }
    ptx::cp_async_commit();
  };
  for (int i = 0; i < kStages - 1; ++i) {
    fetch(i);
  }
  for (int i = 0; i < steps; ++i) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // everyone's part of stage i is there, and stage i - 1 is free
    fetch(i + kStages - 1);
    const int4 v = shared[i % kStages * n + (t + 1) % n];
    out[i * n + t] = v.x + 2 * v.y + 3 * v.z + 4 * v.w;
  }
  ptx::cp_async_wait<0>();
}

// Warp 0 copies and arrives, warp 1 waits.
__global__ void cp_async_mbarrier_kernel(const int4* in, int4* out, int rounds) {
  int4* shared = dynamic_shared<int4>();
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t full = base + 2 * 32 * 16;
  const uint32_t empty = full + 16;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < 2; ++i) {
      ptx::mbarrier_init(full + 8 * i, 32);
      ptx::mbarrier_init(empty + 8 * i, 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int i = 0; i < rounds; ++i) {
    const auto slot = static_cast<uint32_t>(i % 2);
    const auto phase = static_cast<uint32_t>(i / 2 % 2);
    if (threadIdx.x < 32) {
      ptx::mbarrier_wait(empty + 8 * slot, phase ^ 1);
      ptx::cp_async_cg(base + 16 * (32 * slot + static_cast<uint32_t>(lane)), in + 32 * i + lane);
      ptx::cp_async_mbarrier_arrive(full + 8 * slot);
    } else {
      ptx::mbarrier_wait(full + 8 * slot, phase);
      out[32 * i + lane] = shared[32 * slot + (lane ^ 5)];
      ptx::mbarrier_arrive(empty + 8 * slot);
    }
  }
  if (threadIdx.x < 32) {
    ptx::cp_async_wait_all();
  }
}

// Writes down what polls say while the phases of a barrier of three pass.
__global__ void mbarrier_phases_kernel(const unsigned char* in, int* out) {
  unsigned char* shared = dynamic_shared<unsigned char>();
  const uint32_t bar = ptx::shared_address(shared) + 64;
  int at = 0;
  const auto look = [&] {
    out[at++] = ptx::mbarrier_test_wait(bar, 0) ? 1 : 0;
    out[at++] = ptx::mbarrier_test_wait(bar, 1) ? 1 : 0;
  };
  ptx::mbarrier_init(bar, 3);
  ptx::fence_mbarrier_init();
  look();
  for (int phase = 0; phase < 3; ++phase) {
    for (int arrival = 0; arrival < 3; ++arrival) {
      ptx::mbarrier_arrive(bar);
      look();
    }
  }
  // Bytes hold the phase back after the last arrival, also when announced on their own.
  ptx::mbarrier_arrive(bar);
  ptx::mbarrier_expect_tx(bar, 16);
  ptx::mbarrier_arrive_expect_tx(bar, 32);
  ptx::mbarrier_arrive(bar);
  look();
  ptx::bulk_load(bar - 64, in, 48, bar);
  ptx::mbarrier_wait(bar, 1);
  look();
  out[at++] = shared[47];
  ptx::mbarrier_invalidate(bar);
  ptx::mbarrier_init(bar, 1);
  ptx::fence_mbarrier_init();
  look();
  ptx::mbarrier_arrive(bar);
  look();
}

// Three stages of 256 bytes. Producer: one lane of warp 0; its two halves of each stage are
// announced apart. Consumers: warps 1 and 2.
__global__ void pipeline_kernel(const int* in, int* out, int steps, bool poll) {
  constexpr uint32_t kStages = 3;
  constexpr uint32_t kBytes = 256;
  int* shared = dynamic_shared<int>();
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t full = base + kStages * kBytes;
  const uint32_t empty = full + 8 * kStages;
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < kStages; ++i) {
      ptx::mbarrier_init(full + 8 * i, 1);
      ptx::mbarrier_init(empty + 8 * i, 64);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const auto wait = [poll](uint32_t bar, uint32_t parity) {
    if (poll) {
      while (!ptx::mbarrier_try_wait(bar, parity)) {
      }
    } else {
      ptx::mbarrier_wait(bar, parity);
    }
  };
  if (threadIdx.x < 32) {
    if (threadIdx.x != 0) {
      return;
    }
    for (uint32_t i = 0; i < static_cast<uint32_t>(steps); ++i) {
      const uint32_t s = i % kStages;
      wait(empty + 8 * s, (i / kStages & 1) ^ 1);
      ptx::mbarrier_expect_tx(full + 8 * s, kBytes / 2);
      ptx::bulk_load(base + s * kBytes, in + 64 * i, kBytes / 2, full + 8 * s);
      ptx::mbarrier_arrive_expect_tx(full + 8 * s, kBytes / 2);
      ptx::bulk_load(base + s * kBytes + kBytes / 2, in + 64 * i + 32, kBytes / 2, full + 8 * s);
    }
    return;
  }
  const uint32_t t = threadIdx.x - 32;
  for (uint32_t i = 0; i < static_cast<uint32_t>(steps); ++i) {
    const uint32_t s = i % kStages;
    wait(full + 8 * s, i / kStages & 1);
    out[64 * i + t] = shared[64 * s + (5 * t + i) % 64];
    ptx::mbarrier_arrive(empty + 8 * s);
  }
}

// Two chunks leave shared memory, the second over the place of the first.
template <bool kAdd>
__global__ void bulk_store_kernel(const float* in, float* out, int count) {
  float* shared = dynamic_shared<float>();
  const int t = static_cast<int>(threadIdx.x);
  const uint32_t base = ptx::shared_address(shared);
  for (int chunk = 0; chunk < 2; ++chunk) {
    for (int i = t; i < count; i += static_cast<int>(blockDim.x)) {
      shared[i] = in[chunk * count + i];
    }
    ptx::fence_proxy_async();
    __syncthreads();
    if (t == 0) {
      const auto bytes = static_cast<uint32_t>(4 * count);
      if constexpr (kAdd) {
        ptx::bulk_reduce_add_f32(out + chunk * count, base, bytes);
      } else {
        ptx::bulk_store(out + chunk * count, base, bytes);
      }
      ptx::bulk_commit();
      if (chunk == 0) {
        ptx::bulk_wait_read<0>();
      } else {
        ptx::bulk_wait<0>();
      }
    }
    __syncthreads();
  }
}

}  // namespace

EMU_ENTRY int cp_async(int bytes,
                       int cg,
                       int late,
                       int threads,
                       const unsigned char* in,
                       const int* sources,
                       const int* sizes,
                       unsigned char* out) {
  const auto kernel = cg != 0      ? &cp_async_kernel<16, true>
                      : bytes == 4 ? &cp_async_kernel<4, false>
                      : bytes == 8 ? &cp_async_kernel<8, false>
                                   : &cp_async_kernel<16, false>;
  return launch(kernel,
                1,
                static_cast<unsigned>(threads),
                static_cast<size_t>(bytes) * static_cast<size_t>(threads),
                nullptr,
                in,
                sources,
                sizes,
                out,
                late != 0);
}

EMU_ENTRY int cp_async_groups(const int4* in, int* out, int steps) {
  return launch(&cp_async_groups_kernel, 1, 64, 4 * 64 * 16, nullptr, in, out, steps);
}

EMU_ENTRY int cp_async_mbarrier(const int4* in, int4* out, int rounds) {
  return launch(&cp_async_mbarrier_kernel, 1, 64, 2 * 32 * 16 + 32, nullptr, in, out, rounds);
}

EMU_ENTRY int mbarrier_phases(const unsigned char* in, int* out) {
  return launch(&mbarrier_phases_kernel, 1, 1, 128, nullptr, in, out);
}

EMU_ENTRY int pipeline(const int* in, int* out, int steps, int poll) {
  return launch(&pipeline_kernel, 1, 96, 3 * 256 + 48, nullptr, in, out, steps, poll != 0);
}

EMU_ENTRY int bulk_store(int add, const float* in, float* out, int count) {
  const auto kernel = add != 0 ? &bulk_store_kernel<true> : &bulk_store_kernel<false>;
  return launch(kernel, 1, 64, 4 * static_cast<size_t>(count), nullptr, in, out, count);
}
