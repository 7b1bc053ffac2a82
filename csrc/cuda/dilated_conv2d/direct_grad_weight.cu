// SPDX-License-Identifier: Apache-2.0
//
// Direct gradients of the convolution with respect to weight and bias, any shape, dtype and
// strides:
//   grad_weight[o, c, i, j] = sum_{n, y, x} grad_output[n, o, y, x] *
//       input[n, g*group_in + c, y*stride_h - pad_top + i*dil_h, x*stride_w - pad_left + j*dil_w]
//   grad_bias[o]            = sum_{n, y, x} grad_output[n, o, y, x]
// One block owns one tap (i, j) of one o and `channel_lanes` input channels (direct.h); its threads
// take slices of the pixels, whose sums are added by a tree of fixed shape: no atomics, bitwise
// repeatable. Flops: at most 2 * n*h_out*w_out * c_out*group_in*k_h*k_w. Bytes: two loads per
// product, cached. Accumulates in double for double, else in float, blocks of 64 products per
// thread, then the tree. Limits: coordinates below 2^31 (direct.h); offsets and pixel counts are
// 64-bit.
#include "cuda/dilated_conv2d/direct.cuh"
#include "cuda/dilated_conv2d/pixel_walk.cuh"

namespace dilseg::cuda {
namespace {

// Adds the values of all threads with the same threadIdx.x % kChannelLanes; the sum is valid in the
// threads below kChannelLanes.
template <int kChannelLanes, class Acc>
__device__ __forceinline__ Acc sum_over_slices(Acc value) {
  Acc* partial = dynamic_shared<Acc>();
  const int thread = threadIdx.x;
  partial[thread] = value;
  for (int half = kDirectThreads / 2; half >= kChannelLanes; half /= 2) {
    __syncthreads();  // the upper half is written before the lower half reads it
    if (thread < half) {
      partial[thread] += partial[thread + half];
    }
  }
  const Acc sum = partial[thread];
  __syncthreads();  // the sums are read before the block's next tile overwrites them
  return sum;
}

template <class T, int kChannelLanes>
__global__ void __launch_bounds__(kDirectThreads, kDirectBlocks)
    dilated_conv2d_grad_weight_kernel(DirectShape s,
                                      int64_t channel_tiles,
                                      const T* grad_output,
                                      const T* input,
                                      T* grad_weight,
                                      Strides4 s_grad_output,
                                      Strides4 s_input,
                                      Strides4 s_grad_weight) {
  const int channel_lane = threadIdx.x % kChannelLanes;
  const int slice = threadIdx.x / kChannelLanes;
  const int64_t tiles = channel_tiles * s.c_out * s.k_h * s.k_w;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const Index4 at =  // tile = ((o * channel_tiles + channel tile) * k_h + k_y) * k_w + k_x
        unravel<false>(tile, static_cast<int>(channel_tiles), s.k_h, s.k_w);
    const int out = static_cast<int>(at.n);
    const int channel = at.c * kChannelLanes + channel_lane;
    const int64_t first_channel = static_cast<int64_t>(out / s.group_out) * s.group_in;

    BlockedSum<acc_t<T>> sum;
    if (channel < s.group_in) {
      const int shift_y = at.h * s.dil_h;
      const int shift_x = at.w * s.dil_w;
      const T* plane = input + (first_channel + channel) * s_input.c;
      const T* grad_plane = grad_output + out * s_grad_output.c;
      const Range rows = meeting(shift_y, s.stride_h, s.pad_top, s.h_in, s.h_out);
      const Range columns = meeting(shift_x, s.stride_w, s.pad_left, s.w_in, s.w_out);
      for (PixelWalk<int64_t> pixel(s.n, rows, columns, slice, kDirectThreads / kChannelLanes);
           !pixel.done();
           pixel.next()) {
        const int y = pixel.y * s.stride_h - s.pad_top + shift_y;
        const int x = pixel.x * s.stride_w - s.pad_left + shift_x;
        sum.add_product(load(grad_plane + pixel.n * s_grad_output.n + pixel.y * s_grad_output.h +
                             pixel.x * s_grad_output.w),
                        load(plane + pixel.n * s_input.n + y * s_input.h + x * s_input.w));
      }
    }

    const acc_t<T> total = sum_over_slices<kChannelLanes>(sum.total());
    if (slice == 0 && channel < s.group_in) {
      store(grad_weight + out * s_grad_weight.n + channel * s_grad_weight.c +
                at.h * s_grad_weight.h + at.w * s_grad_weight.w,
            total);
    }
  }
}

template <class T, int kChannelLanes>
__global__ void __launch_bounds__(kDirectThreads, kDirectBlocks)
    dilated_conv2d_grad_bias_kernel(DirectShape s,
                                    int64_t channel_tiles,
                                    const T* grad_output,
                                    T* grad_bias,
                                    Strides4 s_grad_output) {
  const int channel_lane = threadIdx.x % kChannelLanes;
  const int slice = threadIdx.x / kChannelLanes;
  for (int64_t tile = blockIdx.x; tile < channel_tiles; tile += gridDim.x) {
    const int64_t channel = tile * kChannelLanes + channel_lane;

    BlockedSum<acc_t<T>> sum;
    if (channel < s.c_out) {
      const T* plane = grad_output + channel * s_grad_output.c;
      for (PixelWalk<int64_t> pixel(
               s.n, {0, s.h_out}, {0, s.w_out}, slice, kDirectThreads / kChannelLanes);
           !pixel.done();
           pixel.next()) {
        sum.add(load(plane + pixel.n * s_grad_output.n + pixel.y * s_grad_output.h +
                     pixel.x * s_grad_output.w));
      }
    }

    const acc_t<T> total = sum_over_slices<kChannelLanes>(sum.total());
    if (slice == 0 && channel < s.c_out) {
      store(grad_bias + channel, total);
    }
  }
}

template <class T>
cudaError_t launch_weight(const DilatedConv2dGradWeightParams& p, Stream stream) {
  const PixelSumPlan plan = plan_grad_weight(p.shape, p.input_strides);
  const int64_t tiles = plan.channel_tiles * p.shape.c_out * p.shape.k_h * p.shape.k_w;
  if (tiles == 0) {
    return cudaSuccess;
  }
  const auto kernel = plan.channel_lanes == 1 ? dilated_conv2d_grad_weight_kernel<T, 1>
                                              : dilated_conv2d_grad_weight_kernel<T, kWarpLanes>;
  return launch(kernel,
                grid_for(tiles, 1),
                kDirectThreads,
                kDirectThreads * sizeof(acc_t<T>),
                stream,
                direct_shape(p.shape),
                plan.channel_tiles,
                static_cast<const T*>(p.grad_output),
                static_cast<const T*>(p.input),
                static_cast<T*>(p.grad_weight),
                p.grad_output_strides,
                p.input_strides,
                p.grad_weight_strides);
}

template <class T>
cudaError_t launch_bias(const DilatedConv2dGradWeightParams& p, Stream stream) {
  const PixelSumPlan plan = plan_grad_bias(p.shape, p.grad_output_strides);
  if (p.grad_bias == nullptr || plan.channel_tiles == 0) {
    return cudaSuccess;
  }
  const auto kernel = plan.channel_lanes == 1 ? dilated_conv2d_grad_bias_kernel<T, 1>
                                              : dilated_conv2d_grad_bias_kernel<T, kWarpLanes>;
  return launch(kernel,
                grid_for(plan.channel_tiles, 1),
                kDirectThreads,
                kDirectThreads * sizeof(acc_t<T>),
                stream,
                direct_shape(p.shape),
                plan.channel_tiles,
                static_cast<const T*>(p.grad_output),
                static_cast<T*>(p.grad_bias),
                p.grad_output_strides);
}

}  // namespace

Status launch_direct(const DilatedConv2dGradWeightParams& p, Stream stream) {
  if (!fits_dilated_conv2d(p.shape)) {
    return cudaErrorInvalidValue;
  }
  return dispatch_dtype(p.dtype, [&]<class T>() {
    const cudaError_t status = launch_weight<T>(p, stream);
    return status == cudaSuccess ? launch_bias<T>(p, stream) : status;
  });
}

}  // namespace dilseg::cuda
