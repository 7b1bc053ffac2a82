// SPDX-License-Identifier: Apache-2.0
//
// Gradient of the convolution with respect to the bias, from a packed grad_output (pack.h):
//   grad_bias[o] = sum_{n, y, x} grad_output[n, o, y, x]
// The first kernel's block owns up to 32 neighbouring chunks of 16 bytes and one part of the
// pixels: neighbouring lanes read neighbouring chunks, slices of the block take turns at the
// pixels, and a tree of fixed shape adds the slices. Its sums go to the workspace, [part][channel]
// in float; the second kernel adds the parts in a fixed order and rounds once. Bytes: grad_output
// once, 8 per part and channel. Flops: one per element. Limits: those of plan_gemm.
#include "cuda/common/vec.cuh"
#include "cuda/dilated_conv2d/direct.cuh"
#include "cuda/dilated_conv2d/packed_bias.h"
#include "cuda/dilated_conv2d/pixel_walk.cuh"

namespace dilseg::cuda {
namespace {

constexpr int kThreads = kPackedBiasThreads;

// Adds the values of all threads with the same threadIdx.x % lanes; the sums are valid in the
// threads below `lanes`.
template <int kCount>
__device__ __forceinline__ void sum_slices(float (&values)[kCount], int lanes) {
  float* const shared = dynamic_shared<float>();
  const int thread = threadIdx.x;
#pragma unroll
  for (int e = 0; e < kCount; ++e) {
    shared[e * kThreads + thread] = values[e];
  }
  for (int half = kThreads / 2; half >= lanes; half /= 2) {
    __syncthreads();  // the upper half is written before the lower half reads it
    if (thread < half) {
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        values[e] += shared[e * kThreads + thread + half];
        shared[e * kThreads + thread] = values[e];
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) dilated_conv2d_packed_bias_kernel(
    const T* grad_output, Strides4 strides, Sizes4 s, PackedBiasPlan plan, float* partials) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  const int64_t tile = blockIdx.x % plan.channel_tiles;
  const int64_t part = blockIdx.x / plan.channel_tiles;
  const int lane = threadIdx.x & (plan.lanes - 1);
  const int slice = threadIdx.x / plan.lanes;
  const int slices = kThreads / plan.lanes;
  const int64_t channel = (tile * plan.lanes + lane) * kChunk;
  const int64_t pixels = s.n * s.h * s.w;
  const int64_t begin = pixels * part / plan.parts;
  const int64_t end = pixels * (part + 1) / plan.parts;
  const T* const from = grad_output + channel;

  float sums[kChunk] = {};
  PixelWalk<int> pixel(static_cast<int>(s.n),
                       {0, static_cast<int>(s.h)},
                       {0, static_cast<int>(s.w)},
                       begin + slice,
                       slices);
  for (int64_t at = begin + slice; at < end; at += slices) {
    const T* const chunk = from + pixel.n * strides.n + pixel.y * strides.h + pixel.x * strides.w;
    if (channel + kChunk <= s.c) {
      const Vec<T, kChunk> values = load_vec<kChunk>(chunk);
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        sums[e] += load(values.v + e);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kChunk; ++e) {
        sums[e] += channel + e < s.c ? load(chunk + e) : 0;
      }
    }
    pixel.next();
  }
  sum_slices(sums, plan.lanes);
  if (slice == 0) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      if (channel + e < s.c) {
        partials[part * s.c + channel + e] = sums[e];
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) dilated_conv2d_packed_bias_sum_kernel(
    const float* partials, int64_t channels, int64_t parts, T* grad_bias) {
  const int lane = threadIdx.x % kWarpLanes;
  const int slice = threadIdx.x / kWarpLanes;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kWarpLanes + lane;
  BlockedSum<float> sum;
  if (channel < channels) {
    for (int64_t part = slice; part < parts; part += kThreads / kWarpLanes) {
      sum.add(partials[part * channels + channel]);
    }
  }
  float total[1] = {sum.total()};
  sum_slices(total, kWarpLanes);
  if (slice == 0 && channel < channels) {
    store(grad_bias + channel, total[0]);
  }
}

}  // namespace

Status launch_packed_bias(const void* grad_output,
                          const Strides4& strides,
                          const Sizes4& s,
                          Dtype dtype,
                          float* partials,
                          void* grad_bias,
                          Stream stream) {
  const PackedBiasPlan plan = plan_packed_bias(s, dtype);
  const auto launch_both = [&]<class T>() {
    const cudaError_t status = launch(dilated_conv2d_packed_bias_kernel<T>,
                                      grid_for(plan.channel_tiles * plan.parts, 1),
                                      kThreads,
                                      kThreads * sizeof(float) * (16 / sizeof(T)),
                                      stream,
                                      static_cast<const T*>(grad_output),
                                      strides,
                                      s,
                                      plan,
                                      partials);
    if (status != cudaSuccess) {
      return status;
    }
    return launch(dilated_conv2d_packed_bias_sum_kernel<T>,
                  grid_for(s.c, kWarpLanes),
                  kThreads,
                  kThreads * sizeof(float),
                  stream,
                  static_cast<const float*>(partials),
                  s.c,
                  plan.parts,
                  static_cast<T*>(grad_bias));
  };
  switch (dtype) {
    case Dtype::kFloat64:
      return cudaErrorInvalidValue;
    case Dtype::kFloat32:
      return launch_both.template operator()<float>();
    case Dtype::kFloat16:
      return launch_both.template operator()<__half>();
    case Dtype::kBFloat16:
      break;
  }
  return launch_both.template operator()<__nv_bfloat16>();
}

}  // namespace dilseg::cuda
