// SPDX-License-Identifier: Apache-2.0
//
// Direct gradient of the convolution with respect to its input, any shape, dtype and strides:
//   grad_input[n, c, y, x] = sum_{o in group, i, j} weight[o, c - g*group_in, i, j] *
//       grad_output[n, o, (y + pad_top - i*dil_h) / stride_h, (x + pad_left - j*dil_w) / stride_w]
// over the taps for which both quotients are whole and inside the map. A gather: one thread owns
// one element of grad_input, in its memory order, so no atomics and one fixed order of summation.
// Flops: at most 2 * n*c_in*h_in*w_in * k_h*k_w*group_out. Bytes: two loads per product, cached.
// Accumulates in double for double, else in float, blocks of 64 products in the order (i, j, o).
// Limits: coordinates below 2^31 (direct.h); offsets are 64-bit.
#include "cuda/dilated_conv2d/direct.cuh"

namespace dilseg::cuda {
namespace {

// The output coordinate whose window meets `padded` (an input coordinate counted from the padding's
// edge) at a tap `shift` away, or -1 if there is none.
__device__ __forceinline__ int source(int padded, int shift, int stride, int extent) {
  const int distance = padded - shift;
  if (distance < 0 || distance % stride != 0) {
    return -1;
  }
  const int at = distance / stride;
  return at < extent ? at : -1;
}

template <class T, bool kChannelsLast>
__global__ void __launch_bounds__(kDirectThreads, kDirectBlocks)
    dilated_conv2d_grad_input_kernel(DirectShape s,
                                     const T* grad_output,
                                     const T* weight,
                                     T* grad_input,
                                     Strides4 s_grad_output,
                                     Strides4 s_weight,
                                     Strides4 s_grad_input) {
  const int64_t count = s.n * s.c_in * s.h_in * s.w_in;
  for (int64_t i = grid_thread(); i < count; i += grid_threads()) {
    const Index4 at = unravel<kChannelsLast>(i, s.c_in, s.h_in, s.w_in);
    const int group = at.c / s.group_in;
    const int64_t first_channel = static_cast<int64_t>(group) * s.group_out;
    const T* image = grad_output + at.n * s_grad_output.n + first_channel * s_grad_output.c;
    const T* filter =
        weight + first_channel * s_weight.n + (at.c - group * s.group_in) * s_weight.c;

    BlockedSum<acc_t<T>> sum;
    for (int k_y = 0; k_y < s.k_h; ++k_y) {
      const int y = source(at.h + s.pad_top, k_y * s.dil_h, s.stride_h, s.h_out);
      if (y < 0) {
        continue;
      }
      for (int k_x = 0; k_x < s.k_w; ++k_x) {
        const int x = source(at.w + s.pad_left, k_x * s.dil_w, s.stride_w, s.w_out);
        if (x < 0) {
          continue;
        }
        const T* pixel = image + y * s_grad_output.h + x * s_grad_output.w;
        const T* tap = filter + k_y * s_weight.h + k_x * s_weight.w;
        for (int o = 0; o < s.group_out; ++o) {
          sum.add_product(load(pixel + o * s_grad_output.c), load(tap + o * s_weight.n));
        }
      }
    }
    store(grad_input + at.n * s_grad_input.n + at.c * s_grad_input.c + at.h * s_grad_input.h +
              at.w * s_grad_input.w,
          sum.total());
  }
}

}  // namespace

Status launch_direct(const DilatedConv2dGradInputParams& p, Stream stream) {
  const int64_t count = p.shape.n * p.shape.c_in * p.shape.h_in * p.shape.w_in;
  if (count == 0) {
    return cudaSuccess;
  }
  if (!fits_dilated_conv2d(p.shape)) {
    return cudaErrorInvalidValue;
  }
  return dispatch_dtype(p.dtype, [&]<class T>() {
    const auto kernel = is_channels_last(p.grad_input_strides, p.shape.c_in)
                            ? dilated_conv2d_grad_input_kernel<T, true>
                            : dilated_conv2d_grad_input_kernel<T, false>;
    return launch(kernel,
                  grid_for(count, kDirectThreads),
                  kDirectThreads,
                  0,
                  stream,
                  direct_shape(p.shape),
                  static_cast<const T*>(p.grad_output),
                  static_cast<const T*>(p.weight),
                  static_cast<T*>(p.grad_input),
                  p.grad_output_strides,
                  p.weight_strides,
                  p.grad_input_strides);
  });
}

}  // namespace dilseg::cuda
