// SPDX-License-Identifier: Apache-2.0
//
// Gradients of the depthwise convolution (one input channel per group) with respect to weight and
// bias, in one pass over both tensors:
//   grad_weight[o, 0, i, j] = sum_{n, y, x} grad_output[n, o, y, x] *
//       input[n, o / fan, y*stride_h - pad_top + i*dil_h, x*stride_w - pad_left + j*dil_w]
//   grad_bias[o]            = sum_{n, y, x} grad_output[n, o, y, x],       fan = c_out / groups
// Taps in the padding are skipped. Layouts: input contiguous with dense rows or channels_last with
// dense pixels (also slices of them); grad_output and grad_weight may have any strides.
// A block owns a tile of channels, a slice of the (image, row, column) tiles and a window of kBox x
// kBox taps (one window but for kernels beyond 7 x 7, or beyond 3 x 3 with strides). Tile by tile
// it stages the input in shared memory by 16-byte asynchronous copies; a thread takes four rows of
// a column of grad_output for its channels from memory, slides over every column of taps and keeps
// the sums of all taps in registers. At the end a tree of fixed shape adds the threads of a
// channel, the sums of the block go to the workspace ([slice][channel][tap, bias]), and a second
// kernel adds the slices in a fixed order: no atomics, bitwise repeatable. Bytes: both tensors once
// per window, plus the rows and columns of input that two tiles share. Flops: 2 * k_h * k_w per
// element of grad_output. Accumulates in double for double, else in float. Limits: depthwise.h;
// 64-bit offsets to a tile, 32-bit inside.
#include "cuda/dilated_conv2d/depthwise.cuh"

namespace dilseg::cuda {
namespace {

template <class T>
struct GradWeightArgs {
  DepthwiseWalk walk;
  DepthwiseTiling tiling;
  int slices, boxes_w;
  int shared_bytes;
  const T* grad_output;
  const T* input;
  acc_t<T>* partial;
};

template <class T, int kVector, int kBox, bool kSlides>
__global__ void __launch_bounds__(kDepthwiseThreads,
                                  depthwise_grad_weight_blocks(kBox, kVector, sizeof(acc_t<T>)))
    depthwise_grad_weight_kernel(GradWeightArgs<T> args) {
  using Acc = acc_t<T>;
  constexpr int kRows = depthwise_rows(kVector);
  const DepthwiseWalk& w = args.walk;
  const DepthwiseTiling& t = args.tiling;
  T* shared = dynamic_shared<T>();

  int rest = static_cast<int>(blockIdx.x);
  const int c0 = rest % t.tiles_c * t.tile_c;
  rest /= t.tiles_c;
  const int slice = rest % args.slices;
  const int box = rest / args.slices;
  const int first_i = box / args.boxes_w * kBox;
  const int first_j = box % args.boxes_w * kBox;

  // A thread keeps its channels; `slots` threads share them.
  const int lanes = static_cast<int>(t.by_lanes.divisor);
  const int slots = kDepthwiseThreads / lanes;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = t.inner ? thread % lanes : thread / slots;
  const int slot = t.inner ? thread / lanes : thread % slots;
  const int c = lane * kVector;
  const bool works = slot < slots && lane < lanes && c0 + c < w.channels;

  Acc sum[kBox][kBox][kVector] = {};
  Acc bias[kVector] = {};
  const int64_t parts = w.n * t.tiles_h * t.tiles_w;
  const int64_t end = parts * (slice + 1) / args.slices;
  for (int64_t part = parts * slice / args.slices; part < end; ++part) {
    const int64_t line = part / t.tiles_w;
    const DepthwiseTile tile = depthwise_tile(w,
                                              t,
                                              line / t.tiles_h,
                                              static_cast<int>(line % t.tiles_h),
                                              static_cast<int>(part % t.tiles_w),
                                              c0);
    if (tile.y.count <= 0) {
      continue;  // the phases are not equally long
    }
    __syncthreads();  // every read of the previous tile, before it is overwritten
    const T* staged = depthwise_stage(w, t, tile, args.input, shared);
    ptx::cp_async_wait_all();
    __syncthreads();  // all copies, before the first is read
    if (!works) {
      continue;
    }
    const T* grad_output = args.grad_output + tile.n * w.result.n + (c0 + c) * w.result.c +
                           tile.y.first * w.result.h + tile.x.first * w.result.w;
    const int grad_row = static_cast<int>(w.result.h) * t.phases;
    const T* plane = staged + quotient(c, t.by_fan) * t.pitch_c;
    for (int item = slot; item < t.tile_w * t.groups; item += slots) {
      const int group = quotient(item, t.by_width);
      const int x = item - group * t.tile_w;
      const int first = quotient(group, t.by_gap) * (kRows - 1) * t.gap + group;
      if (x >= tile.x.count || first >= tile.y.count) {
        continue;
      }
      const T* from = grad_output + x * static_cast<int>(w.result.w) + first * grad_row;
      Acc grad[kRows][kVector] = {};
      const int rows = min(kRows, quotient(tile.y.count - 1 - first, t.by_gap) + 1);
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        if (k < rows) {
          load_sums<kVector>(grad[k], from + k * t.gap * grad_row);
        }
      }
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          bias[v] += grad[k][v];
        }
      }
      const int row = tile.y.base + first * t.row_mul + first_i * t.row_step - tile.y.low;
      const bool inside =
          rows == kRows && row >= 0 && row + (kRows + kBox - 2) * t.row_step < tile.y.lines;
#pragma unroll
      for (int j = 0; j < kBox; ++j) {
        const int source_x = tile.x.base + x * w.x.mul + (first_j + j) * w.x.step - tile.x.low;
        if (first_j + j >= w.k_w ||
            static_cast<unsigned>(source_x) >= static_cast<unsigned>(tile.x.lines)) {
          continue;
        }
        const T* pixel = plane + source_x * t.pitch_w;
        // Sums of taps beyond the kernel are not stored, and neither is what they read.
        if constexpr (kSlides) {
          const auto slide = [&]<bool kInside>() {
#pragma unroll
            for (int k = 0; k < kRows + kBox - 1; ++k) {
              if (!kInside && k >= rows + kBox - 1) {
                break;
              }
              const int source_y = row + k * t.row_step;
              if (kInside ||
                  static_cast<unsigned>(source_y) < static_cast<unsigned>(tile.y.lines)) {
                Acc value[kVector];
                load_sums<kVector>(value, pixel + source_y * t.pitch_h);
#pragma unroll
                for (int i = 0; i < kBox; ++i) {
                  if (k - i >= 0 && k - i < kRows && (kInside || k - i < rows)) {
#pragma unroll
                    for (int v = 0; v < kVector; ++v) {
                      sum[i][j][v] += grad[k - i][v] * value[v];
                    }
                  }
                }
              }
            }
          };
          if (inside) {
            slide.template operator()<true>();
          } else {
            slide.template operator()<false>();
          }
        } else {
#pragma unroll
          for (int i = 0; i < kBox; ++i) {
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
              const int source_y = row + k * t.gap * t.row_mul + i * t.row_step;
              if (k < rows &&
                  static_cast<unsigned>(source_y) < static_cast<unsigned>(tile.y.lines)) {
                Acc value[kVector];
                load_sums<kVector>(value, pixel + source_y * t.pitch_h);
#pragma unroll
                for (int v = 0; v < kVector; ++v) {
                  sum[i][j][v] += grad[k][v] * value[v];
                }
              }
            }
          }
        }
      }
    }
  }

  // The tree: as many sums of every thread at a time as shared memory holds.
  Acc* tree = reinterpret_cast<Acc*>(shared);
  const int entries = w.k_h * w.k_w + 1;
  const int slot_step = t.inner ? lanes : 1;
  constexpr int kSums = kBox * kBox + 1;
  const int at_once =
      min(kSums, args.shared_bytes / static_cast<int>(kDepthwiseThreads * kVector * sizeof(Acc)));
  int widest = 1;
  while (widest < slots) {
    widest *= 2;
  }
  for (int begin = 0; begin < kSums; begin += at_once) {
    const int count = min(at_once, kSums - begin) * kVector;
    __syncthreads();  // every read of what lies here, before it is overwritten
#pragma unroll
    for (int k = 0; k < kSums; ++k) {
      if (k >= begin && k < begin + at_once) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          tree[((k - begin) * kVector + v) * kDepthwiseThreads + thread] =
              k + 1 == kSums ? bias[v] : sum[min(k, kSums - 2) / kBox][min(k, kSums - 2) % kBox][v];
        }
      }
    }
    for (int half = widest / 2; half > 0; half /= 2) {
      __syncthreads();  // the upper half, before the lower half reads it
      if (works && slot < half && slot + half < slots) {
        for (int k = 0; k < count; ++k) {
          Acc* mine = tree + k * kDepthwiseThreads + thread;
          *mine += mine[half * slot_step];
        }
      }
    }
    if (works && slot == 0) {
      Acc* partial = args.partial + (static_cast<int64_t>(slice) * w.channels + c0 + c) * entries;
      for (int k = 0; k < count; ++k) {
        const int tap = begin + k / kVector;
        const int i = first_i + tap / kBox;
        const int j = first_j + tap % kBox;
        Acc* to = partial + k % kVector * entries;
        const Acc value = tree[k * kDepthwiseThreads + thread];
        if (tap + 1 == kSums) {
          if (box == 0) {
            to[entries - 1] = value;
          }
        } else if (i < w.k_h && j < w.k_w) {
          to[i * w.k_w + j] = value;
        }
      }
    }
  }
}

// Adds the slices of the workspace. A warp takes 32 neighbouring entries of every eighth slice, and
// the first warp adds the eight.
constexpr int kEntries = 32;
constexpr int kWarps = kDepthwiseThreads / kEntries;

template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_add_slices_kernel(const acc_t<T>* partial,
                                int slices,
                                int64_t count,
                                int taps,
                                int k_w,
                                T* grad_weight,
                                T* grad_bias,
                                Strides4 strides) {
  using Acc = acc_t<T>;
  Acc* shared = dynamic_shared<Acc>();
  const int lane = static_cast<int>(threadIdx.x) % kEntries;
  const int warp = static_cast<int>(threadIdx.x) / kEntries;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kEntries + lane;
  Acc sum = 0;
  if (entry < count) {
#pragma unroll 4
    for (int slice = warp; slice < slices; slice += kWarps) {
      sum += partial[slice * count + entry];
    }
  }
  shared[threadIdx.x] = sum;
  __syncthreads();  // the sums of all warps, before the first warp reads them
  if (warp > 0 || entry >= count) {
    return;
  }
  for (int k = 1; k < kWarps; ++k) {
    sum += shared[k * kEntries + lane];
  }
  const int64_t channel = entry / (taps + 1);
  const int tap = static_cast<int>(entry % (taps + 1));
  if (tap < taps) {
    store(grad_weight + channel * strides.n + tap / k_w * strides.h + tap % k_w * strides.w, sum);
  } else if (grad_bias != nullptr) {
    store(grad_bias + channel, sum);
  }
}

template <class T>
auto kernel_of(const DepthwisePlan& plan) {
  using Kernel = void (*)(GradWeightArgs<T>);
  constexpr int kWidest = 16 / sizeof(acc_t<T>);
  constexpr int kHalf = 8 / sizeof(acc_t<T>);
  const bool scalar = plan.tiling.vector == 1;
  if constexpr (kHalf > 1) {  // not in double
    if (plan.taps == 7) {
      return Kernel(&depthwise_grad_weight_kernel<T, 1, 7, true>);
    }
  }
  if (plan.taps == 5) {
    return scalar ? Kernel(&depthwise_grad_weight_kernel<T, 1, 5, true>)
                  : Kernel(&depthwise_grad_weight_kernel<T, kHalf, 5, true>);
  }
  if (plan.tiling.slides) {
    return scalar ? Kernel(&depthwise_grad_weight_kernel<T, 1, 3, true>)
                  : Kernel(&depthwise_grad_weight_kernel<T, kWidest, 3, true>);
  }
  return scalar ? Kernel(&depthwise_grad_weight_kernel<T, 1, 3, false>)
                : Kernel(&depthwise_grad_weight_kernel<T, kWidest, 3, false>);
}

}  // namespace

Status launch_depthwise(const DilatedConv2dGradWeightParams& p,
                        const DepthwisePlan& plan,
                        Stream stream) {
  const DepthwiseWalk& w = plan.walk;
  const DepthwiseTiling& t = plan.tiling;
  return dispatch_dtype(p.dtype, [&]<class T>() {
    using Acc = acc_t<T>;
    auto* partial = static_cast<Acc*>(p.workspace);
    const GradWeightArgs<T> args{w,
                                 t,
                                 plan.slices,
                                 plan.boxes_w,
                                 plan.shared_bytes,
                                 static_cast<const T*>(p.grad_output),
                                 static_cast<const T*>(p.input),
                                 partial};
    const unsigned blocks =
        static_cast<unsigned>(t.tiles_c) * plan.slices * plan.boxes_h * plan.boxes_w;
    const cudaError_t status = launch(kernel_of<T>(plan),
                                      blocks,
                                      kDepthwiseThreads,
                                      static_cast<size_t>(plan.shared_bytes),
                                      stream,
                                      args);
    if (status != cudaSuccess) {
      return status;
    }
    const int taps = w.k_h * w.k_w;
    const int64_t count = int64_t{w.channels} * (taps + 1);
    return launch(depthwise_add_slices_kernel<T>,
                  grid_for(count, kEntries),
                  kDepthwiseThreads,
                  kDepthwiseThreads * sizeof(Acc),
                  stream,
                  static_cast<const Acc*>(partial),
                  plan.slices,
                  count,
                  taps,
                  w.k_w,
                  static_cast<T*>(p.grad_weight),
                  static_cast<T*>(p.grad_bias),
                  p.grad_weight_strides);
  });
}

}  // namespace dilseg::cuda
