// SPDX-License-Identifier: Apache-2.0
//
// Direct forward convolution, any shape, dtype and strides:
//   output[n, o, y, x] = act(bias[o] + sum_{c, i, j} weight[o, c, i, j] *
//       input[n, g*group_in + c, y*stride_h - pad_top + i*dil_h, x*stride_w - pad_left + j*dil_w])
// One thread owns one output element; neighbouring threads follow the output's memory order. Taps
// in the padding are skipped, not multiplied by zero. Flops: 2 * n*c_out*h_out*w_out *
// k_h*k_w*group_in. Bytes: two loads per product, served by the caches. Accumulates in double for
// double, else in float, blocks of 64 products in the order (i, j, c). Limits: coordinates below
// 2^31 (direct.h); offsets are 64-bit.
#include "cuda/dilated_conv2d/direct.cuh"

namespace dilseg::cuda {
namespace {

// max(v, 0) that lets nan through, as torch.relu does.
template <class Acc>
__device__ __forceinline__ Acc relu(Acc v) {
  return v <= Acc(0) ? Acc(0) : v;
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kDirectThreads, kDirectBlocks)
    dilated_conv2d_kernel(DirectShape s,
                          const T* input,
                          const T* weight,
                          const T* bias,
                          T* output,
                          Strides4 s_input,
                          Strides4 s_weight,
                          Strides4 s_output,
                          bool apply_relu) {
  const int64_t count = s.n * s.c_out * s.h_out * s.w_out;
  for (int64_t i = grid_thread(); i < count; i += grid_threads()) {
    const Index4 at = unravel<kChannelsLast>(i, s.c_out, s.h_out, s.w_out);
    const int64_t first_channel = static_cast<int64_t>(at.c / s.group_out) * s.group_in;
    const T* image = input + at.n * s_input.n + first_channel * s_input.c;
    const T* filter = weight + at.c * s_weight.n;

    BlockedSum<acc_t<T>> sum;
    for (int k_y = 0; k_y < s.k_h; ++k_y) {
      const int y = at.h * s.stride_h - s.pad_top + k_y * s.dil_h;
      if (y < 0 || y >= s.h_in) {
        continue;
      }
      for (int k_x = 0; k_x < s.k_w; ++k_x) {
        const int x = at.w * s.stride_w - s.pad_left + k_x * s.dil_w;
        if (x < 0 || x >= s.w_in) {
          continue;
        }
        const T* pixel = image + y * s_input.h + x * s_input.w;
        const T* tap = filter + k_y * s_weight.h + k_x * s_weight.w;
        for (int c = 0; c < s.group_in; ++c) {
          sum.add_product(load(pixel + c * s_input.c), load(tap + c * s_weight.c));
        }
      }
    }

    acc_t<T> value = sum.total();
    if (bias != nullptr) {
      value += load(bias + at.c);
    }
    if (apply_relu) {
      value = relu(value);
    }
    store(output + at.n * s_output.n + at.c * s_output.c + at.h * s_output.h + at.w * s_output.w,
          value);
  }
}

}  // namespace

Status launch_direct(const DilatedConv2dParams& p, Stream stream) {
  const int64_t count = p.shape.n * p.shape.c_out * p.shape.h_out * p.shape.w_out;
  if (count == 0) {
    return cudaSuccess;
  }
  if (!fits_dilated_conv2d(p.shape)) {
    return cudaErrorInvalidValue;
  }
  return dispatch_dtype(p.dtype, [&]<class T>() {
    const auto kernel = is_channels_last(p.output_strides, p.shape.c_out)
                            ? dilated_conv2d_kernel<T, true>
                            : dilated_conv2d_kernel<T, false>;
    return launch(kernel,
                  grid_for(count, kDirectThreads),
                  kDirectThreads,
                  0,
                  stream,
                  direct_shape(p.shape),
                  static_cast<const T*>(p.input),
                  static_cast<const T*>(p.weight),
                  static_cast<const T*>(p.bias),
                  static_cast<T*>(p.output),
                  p.input_strides,
                  p.weight_strides,
                  p.output_strides,
                  p.relu);
  });
}

}  // namespace dilseg::cuda
