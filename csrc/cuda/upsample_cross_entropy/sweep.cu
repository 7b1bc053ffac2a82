// SPDX-License-Identifier: Apache-2.0
//
// The operation of march.cu for any number of classes, in float and in double. A thread owns up to
// kRows pixels of one column of a cell, keeps what belongs to pixels in registers, and walks the
// classes three times: maximum, sum, gradient (the first two suffice for the loss). Each time the
// logits are interpolated anew from shared memory, by the same fused operations, so all three see
// the same bits. Classes that do not fit in shared memory are staged in chunks, three times then.
// The gradient goes through shared memory in groups of classes, to the same owners as in march.cu.
// Bytes: as march.cu, inputs three times if staged in chunks. Per (pixel, class) 2 ex2, 9 (fused)
// multiplications, 3 additions and comparisons. Limits and sources: march.cu.
#include "cuda/upsample_cross_entropy/block.cuh"
#include "cuda/upsample_cross_entropy/softmax.cuh"
#include "cuda/upsample_cross_entropy/tiles.cuh"

#include <limits>

namespace dilseg::cuda {
namespace {

// The pixels of a thread in a round.
template <class A, int kRows>
struct Pixels {
  Segment at;
  A column_w0, column_w1;
  bool any;          // labelled
  int label[kRows];  // kIgnored also where there is no pixel
  A w0[kRows], w1[kRows];
};

template <class A, int kRows>
__device__ __forceinline__ Pixels<A, kRows> load_pixels(const TileInput<A>& in,
                                                        const LabelInput<A>& labels,
                                                        const Segment& at,
                                                        int64_t first_pixel) {
  Pixels<A, kRows> pixels;
  pixels.at = at;
  const UpsampleTaps<A> column = upsample_taps(in.axis_w, at.x);
  pixels.column_w0 = column.w0;
  pixels.column_w1 = column.w1;
  pixels.any = false;
  A first_w0 = 0;
  A first_w1 = 0;
  int bad = -1;
#pragma unroll
  for (int r = kRows - 1; r >= 0; --r) {
    pixels.label[r] = r < at.count ? labels.label(first_pixel + r * labels.w) : kIgnored;
    bad = pixels.label[r] == kBad ? r : bad;
    const UpsampleTaps<A> row = upsample_taps(in.axis_h, at.y + r);
    pixels.w0[r] = row.w0;
    pixels.w1[r] = row.w1;
    if (pixels.label[r] >= 0) {
      pixels.any = true;
      first_w0 = row.w0;
      first_w1 = row.w1;
    }
  }
  if (bad >= 0) {
    labels.stop(first_pixel + bad * labels.w);
  }
  // A pixel that does not count repeats the logits of one that does, and is multiplied by 0. So nan
  // comes from where it must come from, and from nowhere else, without a choice per class.
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    pixels.w0[r] = pixels.label[r] >= 0 ? pixels.w0[r] : first_w0;
    pixels.w1[r] = pixels.label[r] >= 0 ? pixels.w1[r] : first_w1;
  }
  return pixels;
}

template <class A, int kRows>
__device__ __forceinline__ void add_max(const Pixels<A, kRows>& pixels,
                                        const TilePlan& plan,
                                        const A* patch,
                                        int classes,
                                        A (&max)[kRows]) {
  const A* at = patch + pixels.at.slot;
#pragma unroll 1
  for (int k = 0; k < classes; ++k, at += plan.pitch) {
    const ColumnLogit<A> logit(at, plan.w.cells + 1, pixels.column_w0, pixels.column_w1);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      max[r] = larger(max[r], logit.pixel(pixels.w0[r], pixels.w1[r]));
    }
  }
}

// What the loss of a pixel is made of; y_k as in softmax.cuh.
template <class A, int kRows>
struct PixelSums {
  A shift[kRows];
  A sum[kRows];       // of power(y_k)
  A picked[kRows];    // y_t
  A weighted[kRows];  // sum_k v_k y_k, with smoothing
  A weight;           // sum_k v_k, with smoothing
};

template <bool kSmooth, class A, int kRows>
__device__ __forceinline__ void add_sums(const Pixels<A, kRows>& pixels,
                                         const LabelInput<A>& labels,
                                         const TilePlan& plan,
                                         const A* patch,
                                         int begin,
                                         int classes,
                                         PixelSums<A, kRows>& sums) {
  const int width = plan.w.cells + 1;
  const A* at = patch + pixels.at.slot;
#pragma unroll 1
  for (int k = 0; k < classes; ++k, at += plan.pitch) {
    const ColumnLogit<A> logit(at, width, pixels.column_w0, pixels.column_w1);
    A weight = 0;
    if constexpr (kSmooth) {
      weight = labels.class_weight(begin + k);
      sums.weight += weight;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const A y = Softmax<A>::exponent(logit.pixel(pixels.w0[r], pixels.w1[r]), sums.shift[r]);
      sums.sum[r] += Softmax<A>::power(y);
      if constexpr (kSmooth) {
        sums.weighted[r] += weight * y;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int k = pixels.label[r] - begin;
    if (k >= 0 && k < classes) {
      const ColumnLogit<A> logit(
          patch + k * plan.pitch + pixels.at.slot, width, pixels.column_w0, pixels.column_w1);
      // y_t, not x_t - logsumexp: at logits of 1e4 the logsumexp is rounded to a thousandth.
      sums.picked[r] = Softmax<A>::exponent(logit.pixel(pixels.w0[r], pixels.w1[r]), sums.shift[r]);
    }
  }
}

// A gradient is scale (power(y_k) - [k = t] picked), less v_k spread with smoothing, times the
// weights of its row.
template <class A, int kRows>
struct PixelGradients {
  A shift[kRows];
  A scale[kRows];  // 0 for pixels that do not count
  A picked[kRows];
  A spread0, spread1;  // over the rows
};

// Column sums of `classes` classes from `begin` on, into shared memory.
template <class A, int kRows>
__device__ __forceinline__ void sum_rows(const Pixels<A, kRows>& pixels,
                                         const PixelGradients<A, kRows>& grads,
                                         const LabelInput<A>& labels,
                                         const TilePlan& plan,
                                         const A* patch,
                                         int begin,
                                         int classes,
                                         bool clamped,
                                         A* sums) {
  const A* at = patch + pixels.at.slot;
  const int lower_sums = plan.group * kTilePitch;
#pragma unroll 1
  for (int k = 0; k < classes; ++k, at += plan.pitch, sums += kTilePitch) {
    A upper = 0;
    A lower = 0;
    if (pixels.any) {
      const ColumnLogit<A> logit(at, plan.w.cells + 1, pixels.column_w0, pixels.column_w1);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        A value = Softmax<A>::power(
            Softmax<A>::exponent(logit.pixel(pixels.w0[r], pixels.w1[r]), grads.shift[r]));
        if (begin + k == pixels.label[r]) {
          value -= grads.picked[r];
        }
        value *= grads.scale[r];
        upper += value * pixels.w0[r];
        lower += value * pixels.w1[r];
      }
      if (labels.smoothing > A(0)) {
        const A weight = labels.class_weight(begin + k);
        upper -= weight * grads.spread0;
        lower -= weight * grads.spread1;
      }
    }
    sums[0] = clamped ? upper + lower : upper;
    sums[lower_sums] = clamped ? A(0) : lower;
  }
}

template <class A, int kRows, bool kGradient>
__global__ void __launch_bounds__(kSweepThreads, kRows == 2 && sizeof(A) == 4 ? 3 : 2)
    upsample_cross_entropy_sweep_kernel(TileInput<A> in, LabelInput<A> labels, TileOutput<A> out) {
  const TilePlan& plan = in.plan;
  const TileShared<A> shared(plan);
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kGradient) {
    share_scale(shared, out.grad);
  }

  for (int64_t index = blockIdx.x; index < plan.tiles; index += gridDim.x) {
    const Tile tile = tile_at(plan, index);
    begin_tile(in, tile, kRows, shared);
    StagedClasses<A> staged(in, tile, shared);
    const BlockSums block(shared.block);
    block.set(0, 0);
    for (Round<A> round(plan, shared); round.more(); round.next()) {
      const Segment at = segment_of(in, tile, shared, kRows, round);
      const int64_t first_pixel = (tile.n * labels.h + at.y) * labels.w + at.x;
      const Pixels<A, kRows> pixels = load_pixels<A, kRows>(in, labels, at, first_pixel);

      PixelSums<A, kRows> sums;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums.shift[r] = -std::numeric_limits<A>::infinity();  // the maximum, until it is known
        sums.sum[r] = 0;
        sums.picked[r] = 0;
        sums.weighted[r] = 0;
      }
      sums.weight = 0;
      staged.for_each([&](int /*begin*/, int count) {
        if (pixels.any) {
          add_max(pixels, plan, shared.patch, count, sums.shift);
        }
      });
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        sums.shift[r] = Softmax<A>::shift(sums.shift[r]);
      }
      staged.for_each([&](int begin, int count) {
        if (!pixels.any) {
          return;
        }
        if (labels.smoothing > A(0)) {
          add_sums<true>(pixels, labels, plan, shared.patch, begin, count, sums);
        } else {
          add_sums<false>(pixels, labels, plan, shared.patch, begin, count, sums);
        }
      });

      PixelGradients<A, kRows> grads;
      grads.spread0 = 0;
      grads.spread1 = 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t pixel = first_pixel + r * labels.w;
        A loss = 0;
        grads.shift[r] = sums.shift[r];
        grads.scale[r] = 0;
        grads.picked[r] = 0;
        if (pixels.label[r] >= 0) {
          const A class_weight = labels.class_weight(pixels.label[r]);
          const A label_weight = labels.keep * class_weight;
          if (out.sums != nullptr) {
            const A log_sum = Softmax<A>::log(sums.sum[r]);
            loss = label_weight * (log_sum - sums.picked[r]);
            if (labels.smoothing > A(0)) {
              loss += labels.smoothing * (sums.weight * log_sum - sums.weighted[r]);
            }
            loss *= Softmax<A>::kUnit;
            block.add(static_cast<double>(loss), static_cast<double>(class_weight));
          }
          if constexpr (kGradient) {
            const A upstream = out.upstream == nullptr ? A(1) : out.upstream[pixel];
            const A factor = label_weight + labels.smoothing * sums.weight;
            grads.scale[r] = upstream * factor / sums.sum[r];
            grads.picked[r] = sums.sum[r];
            if (labels.smoothing > A(0)) {
              grads.picked[r] *= factor == A(0) ? A(0) : label_weight / factor;
              grads.spread0 += labels.smoothing * upstream * pixels.w0[r];
              grads.spread1 += labels.smoothing * upstream * pixels.w1[r];
            }
          }
        }
        if (out.losses != nullptr && r < at.count) {
          out.losses[pixel] = loss;
        }
      }

      if constexpr (kGradient) {
        share_column_weights(in, tile, shared, at, pixels.column_w0, pixels.column_w1);
        const bool clamped_h = is_last(in.axis_h, tile.cell_h + at.slot_h);
        A* const own_sums = shared.sums + thread / kTileColumns * 2 * plan.group * kTilePitch +
                            thread % kTileColumns;
        staged.for_each([&](int begin, int count) {
          for (int k = 0; k < count; k += plan.group) {
            const int classes = min(plan.group, count - k);
            sum_rows(pixels,
                     grads,
                     labels,
                     plan,
                     shared.patch + k * plan.pitch,
                     begin + k,
                     classes,
                     clamped_h,
                     own_sums);
            __syncthreads();  // every write of the sums and column weights
            add_columns(in, tile, index, shared, round, begin + k, classes, out);
            __syncthreads();  // every read of them
          }
        });
      }
    }
    finish_tile(plan, block, index, out);
  }
}

template <class A, bool kGradient>
cudaError_t launch_rows(const TileInput<A>& in,
                        const LabelInput<A>& labels,
                        const TileOutput<A>& out,
                        Stream stream) {
  auto kernel = &upsample_cross_entropy_sweep_kernel<A, 2, kGradient>;
  if constexpr (sizeof(A) == 4) {
    kernel = in.plan.rows == 2   ? kernel
             : in.plan.rows == 4 ? &upsample_cross_entropy_sweep_kernel<A, 4, kGradient>
                                 : &upsample_cross_entropy_sweep_kernel<A, 8, kGradient>;
  }
  return launch(kernel,
                grid_for(in.plan.tiles, 1),
                static_cast<unsigned>(in.plan.threads()),
                in.plan.shared_bytes,
                stream,
                in,
                labels,
                out);
}

}  // namespace

template <class A>
cudaError_t launch_sweep(const TileInput<A>& in,
                         const LabelInput<A>& labels,
                         const TileOutput<A>& out,
                         bool gradient,
                         Stream stream) {
  return gradient ? launch_rows<A, true>(in, labels, out, stream)
                  : launch_rows<A, false>(in, labels, out, stream);
}

template cudaError_t launch_sweep<float>(
    const TileInput<float>&, const LabelInput<float>&, const TileOutput<float>&, bool, Stream);
template cudaError_t launch_sweep<double>(
    const TileInput<double>&, const LabelInput<double>&, const TileOutput<double>&, bool, Stream);

}  // namespace dilseg::cuda
