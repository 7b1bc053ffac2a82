// SPDX-License-Identifier: Apache-2.0
//
// Depthwise convolution, one input channel per group, and its gradient with respect to the input,
// as one sum over the taps of a source:
//   result[n, c, y, x] = act(bias[c] + sum_{b, i, j} weight(c, b, i, j) *
//       source[n, c / fan_r * fan_s + b, (y*mul_h + off_h + i*step_h) / div_h, likewise x])
// over the taps where both divisions are whole and the pixel lies in the map; taps in the padding
// are skipped, not multiplied by zero. Forward: mul = stride, step = dilation, div = 1, fan_r =
// c_out / groups. grad_input: mul = 1, div = stride, the taps reversed, fan_s = c_out / groups.
// Layouts: contiguous with dense rows, channels_last with dense pixels (also slices of them); the
// result and the weight may have any strides.
// A block owns a tile of channels x rows x columns of one image. It stages the sources of the tile
// in shared memory by 16-byte asynchronous copies, and the taps; then a thread sums eight
// rows of one column for one channel, or four for 16 bytes of sums of neighbouring channels, and
// slides down every column of taps, so that a staged value is loaded once per tap column. Rows of a
// tile are neighbours or, for long dilations, the rows that share taps: then no two tiles read the
// same row. Bytes: the result once, the source once plus the rows and columns that two tiles share.
// Flops: 2 * k_h * k_w per source element and fan. Accumulates in double for double, else in float,
// in the order (b, j, i), rounds once. Limits: depthwise.h; 64-bit offsets to a tile, 32-bit
// inside.
#include "cuda/dilated_conv2d/depthwise.cuh"

namespace dilseg::cuda {
namespace {

// The weight as the sum sees it: tap (i, j) of source channel b of the result's channel c.
struct DepthwiseTaps {
  int64_t offset;  // of tap (0, 0)
  int64_t c, b, i, j;
};

template <class T>
struct DepthwiseArgs {
  DepthwiseWalk walk;
  DepthwiseTiling tiling;
  DepthwiseTaps taps;
  const T* source;
  const T* weight;
  const T* bias;  // or null
  T* result;
  bool relu;
};

// kTaps: k_h where the thread slides over a column of taps; 0: any.
template <class T, int kVector, int kTaps>
__global__ void __launch_bounds__(kDepthwiseThreads,
                                  depthwise_sum_blocks(kTaps, kVector, sizeof(acc_t<T>)))
    depthwise_sum_kernel(DepthwiseArgs<T> args) {
  using Acc = acc_t<T>;
  constexpr int kRows = depthwise_rows(kVector);
  const DepthwiseWalk& w = args.walk;
  const DepthwiseTiling& t = args.tiling;

  // Neighbouring blocks touch neighbouring memory.
  int rest = static_cast<int>(blockIdx.x);
  int part_c = 0;
  if (t.inner) {
    part_c = rest % t.tiles_c;
    rest /= t.tiles_c;
  }
  const int part_w = rest % t.tiles_w;
  rest /= t.tiles_w;
  const int part_h = rest % t.tiles_h;
  rest /= t.tiles_h;
  if (!t.inner) {
    part_c = rest % t.tiles_c;
    rest /= t.tiles_c;
  }
  const DepthwiseTile tile = depthwise_tile(w, t, rest, part_h, part_w, part_c * t.tile_c);
  if (tile.y.count <= 0) {
    return;  // the phases are not equally long
  }

  // Shared memory: bias, taps, source. Scalar threads find the taps of a column side by side,
  // vectors those of neighbouring channels.
  const int column = kVector == 1 ? (w.k_h + 3) / 4 * 4 : w.k_h;
  const int step_i = kVector == 1 ? 1 : t.tile_c;
  const int step_j = column * step_i;
  const int step_b = w.k_w * step_j;
  const int step_c = kVector == 1 ? w.fan_s * step_b : 1;
  Acc* taps = dynamic_shared<Acc>();
  const int tap_count = t.tile_c * w.fan_s * w.k_w * column;
  Acc* bias = taps + tap_count;
  constexpr int kAccPacket = 16 / sizeof(Acc);
  T* shared = reinterpret_cast<T*>(taps + (tap_count + t.tile_c + kAccPacket - 1) / kAccPacket *
                                              kAccPacket);
  const T* staged = depthwise_stage(w, t, tile, args.source, shared);

  const T* weight = args.weight + args.taps.offset + tile.c * args.taps.c;
  const int all_taps = w.fan_s * w.k_w * column;
  for (int k = static_cast<int>(threadIdx.x); k < tile.channels * all_taps;
       k += kDepthwiseThreads) {
    const int c = k / all_taps;
    const int tap = k % all_taps;
    const int i = tap % column;
    const int j = tap / column % w.k_w;
    const int b = tap / column / w.k_w;
    const T* from = weight + c * args.taps.c + b * args.taps.b + i * args.taps.i + j * args.taps.j;
    // Whole vectors of taps are loaded, also where a column ends inside of one.
    taps[c * step_c + b * step_b + j * step_j + i * step_i] = i < w.k_h ? load(from) : Acc(0);
  }
  for (int c = static_cast<int>(threadIdx.x); c < tile.channels; c += kDepthwiseThreads) {
    bias[c] = args.bias == nullptr ? Acc(0) : load(args.bias + tile.c + c);
  }
  ptx::cp_async_wait_all();
  __syncthreads();  // all copies and taps, before the first is read

  T* result = args.result + tile.n * w.result.n + tile.c * w.result.c + tile.y.first * w.result.h +
              tile.x.first * w.result.w;
  const int result_row = static_cast<int>(w.result.h) * t.phases;
  // Sources between a thread's rows, where it does not slide.
  const int row_advance = w.y.div > 1 ? 1 : t.gap * t.row_mul;
  const int lanes = static_cast<int>(t.by_lanes.divisor);
  const int items = lanes * t.tile_w * t.groups;
  for (int item = static_cast<int>(threadIdx.x); item < items; item += kDepthwiseThreads) {
    int c, x, group;
    if (t.inner) {
      const int pixel = quotient(item, t.by_lanes);
      c = (item - pixel * lanes) * kVector;
      group = quotient(pixel, t.by_width);
      x = pixel - group * t.tile_w;
    } else {
      const int row = quotient(item, t.by_width);
      x = item - row * t.tile_w;
      c = quotient(row, t.by_groups);
      group = row - c * t.groups;
    }
    // Rows first, first + gap, ... of the tile.
    const int turn = quotient(group, t.by_gap);
    const int first = turn * (kRows - 1) * t.gap + group;
    if (c >= tile.channels || x >= tile.x.count || first >= tile.y.count) {
      continue;
    }

    Acc sum[kRows][kVector] = {};
    const int source_c = quotient(c, t.by_fan) * w.fan_s;
    const int row = tile.y.base + first * t.row_mul - tile.y.low;
    const int rows = min(kRows, quotient(tile.y.count - 1 - first, t.by_gap) + 1);
    const bool inside =
        rows == kRows && row >= 0 && row + (kRows + kTaps - 2) * t.row_step < tile.y.lines;
    for (int b = 0; b < w.fan_s; ++b) {
      const T* plane = staged + (source_c + b) * t.pitch_c;
      for (int j = 0; j < w.k_w; ++j) {
        int source_x = tile.x.base + x * w.x.mul + j * w.x.step;
        if (w.x.div > 1) {
          const int whole = quotient(source_x, t.by_div_x);
          if (whole * w.x.div != source_x) {
            continue;
          }
          source_x = whole;
        }
        source_x -= tile.x.low;
        if (static_cast<unsigned>(source_x) >= static_cast<unsigned>(tile.x.lines)) {
          continue;
        }
        const T* pixel = plane + source_x * t.pitch_w;
        const Acc* tap = taps + c * step_c + b * step_b + j * step_j;
        if constexpr (kTaps > 0) {
          Acc factor[kTaps][kVector];
          if constexpr (kVector == 1) {
            constexpr int kPart = kAccPacket;
#pragma unroll
            for (int i = 0; i < kTaps; i += kPart) {
              const auto part = load_vec<kPart>(tap + i);
#pragma unroll
              for (int k = 0; k < kPart && i + k < kTaps; ++k) {
                factor[i + k][0] = part.v[k];
              }
            }
          } else {
#pragma unroll
            for (int i = 0; i < kTaps; ++i) {
              load_sums<kVector>(factor[i], tap + i * step_i);
            }
          }
          const auto slide = [&]<bool kInside>() {
#pragma unroll
            for (int k = 0; k < kRows + kTaps - 1; ++k) {
              if (!kInside && k >= rows + kTaps - 1) {
                break;
              }
              const int source_y = row + k * t.row_step;
              if (kInside ||
                  static_cast<unsigned>(source_y) < static_cast<unsigned>(tile.y.lines)) {
                Acc value[kVector];
                load_sums<kVector>(value, pixel + source_y * t.pitch_h);
#pragma unroll
                for (int i = 0; i < kTaps; ++i) {
                  if (k - i >= 0 && k - i < kRows) {
#pragma unroll
                    for (int v = 0; v < kVector; ++v) {
                      sum[k - i][v] += factor[i][v] * value[v];
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
          for (int i = 0; i < w.k_h; ++i) {
            int source_y = tile.y.base + first * t.row_mul + i * t.row_step;
            if (w.y.div > 1) {
              const int whole = quotient(source_y, t.by_div_y);
              if (whole * w.y.div != source_y) {
                continue;
              }
              source_y = whole;
            }
            source_y -= tile.y.low;
            Acc factor[kVector];
            load_sums<kVector>(factor, tap + i * step_i);
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
              if (static_cast<unsigned>(source_y) < static_cast<unsigned>(tile.y.lines)) {
                Acc value[kVector];
                load_sums<kVector>(value, pixel + source_y * t.pitch_h);
#pragma unroll
                for (int v = 0; v < kVector; ++v) {
                  sum[k][v] += factor[v] * value[v];
                }
              }
              source_y += row_advance;
            }
          }
        }
      }
    }

    T* target = result + c * static_cast<int>(w.result.c) + x * static_cast<int>(w.result.w) +
                first * result_row;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (k < rows) {
        Vec<T, kVector> packed;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          Acc value = sum[k][v] + bias[c + v];
          if (args.relu) {
            value = value <= Acc(0) ? Acc(0) : value;  // lets nan through
          }
          store(&packed.v[v], value);
        }
        store_vec<kVector>(target + k * t.gap * result_row, packed);
      }
    }
  }
}

template <class T, int kVector>
auto kernel_of(int taps) {
  switch (taps) {
    case 3:
      return &depthwise_sum_kernel<T, kVector, 3>;
    case 5:
      return &depthwise_sum_kernel<T, kVector, 5>;
    case 7:
      return &depthwise_sum_kernel<T, kVector, 7>;
    default:
      return &depthwise_sum_kernel<T, kVector, 0>;
  }
}

template <class T>
cudaError_t launch_sum(const DepthwisePlan& plan,
                       const DepthwiseTaps& taps,
                       const void* source,
                       const void* weight,
                       const void* bias,
                       void* result,
                       bool relu,
                       Stream stream) {
  const DepthwiseArgs<T> args{plan.walk,
                              plan.tiling,
                              taps,
                              static_cast<const T*>(source),
                              static_cast<const T*>(weight),
                              static_cast<const T*>(bias),
                              static_cast<T*>(result),
                              relu};
  constexpr int kWidest = 16 / sizeof(acc_t<T>);
  const auto kernel =
      plan.tiling.vector == 1 ? kernel_of<T, 1>(plan.taps) : kernel_of<T, kWidest>(plan.taps);
  return launch(kernel,
                static_cast<unsigned>(plan.tiles),
                kDepthwiseThreads,
                static_cast<size_t>(plan.shared_bytes),
                stream,
                args);
}

}  // namespace

Status launch_depthwise(const DilatedConv2dParams& p, const DepthwisePlan& plan, Stream stream) {
  const Strides4& s = p.weight_strides;
  return dispatch_dtype(p.dtype, [&]<class T>() {
    return launch_sum<T>(
        plan, {0, s.n, 0, s.h, s.w}, p.input, p.weight, p.bias, p.output, p.relu, stream);
  });
}

Status launch_depthwise(const DilatedConv2dGradInputParams& p,
                        const DepthwisePlan& plan,
                        Stream stream) {
  // Taps from the last to the first; the group's output channels are the b of the sum.
  const Strides4& s = p.weight_strides;
  const DepthwiseTaps taps{
      (p.shape.k_h - 1) * s.h + (p.shape.k_w - 1) * s.w, s.n * plan.walk.fan_s, s.n, -s.h, -s.w};
  return dispatch_dtype(p.dtype, [&]<class T>() {
    return launch_sum<T>(plan, taps, p.grad_output, p.weight, nullptr, p.grad_input, false, stream);
  });
}

}  // namespace dilseg::cuda
