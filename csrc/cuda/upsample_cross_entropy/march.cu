// SPDX-License-Identifier: Apache-2.0
//
// Softmax cross-entropy of bilinearly upsampled logits and its gradient at low resolution, for up
// to 32 classes in float. With x_k = wy0 (wx0 a_k + wx1 b_k) + wy1 (wx0 c_k + wx1 d_k), label t,
// class weights v, e = label_smoothing, s = sum_k exp(x_k - max x), p_k = exp(x_k - max x) / s:
//   loss      = (1 - e) v_t (log s - (x_t - max x)) + e/c sum_k v_k (log s - (x_k - max x))
//   g_k       = ((1 - e) v_t + e/c sum_j v_j) p_k - (1 - e) v_t [k = t] - e/c v_k
//   grad[i,j] = sum over pixels (y, x) of wy(y, i) wx(x, j) g(y, x)
// input [n, c, h_in, w_in] logits, any strides and dtype; target [n, h_out, w_out] dense. A block
// owns the pixels of a tile of whole cells (select.h) and stages the tile's inputs as float. A
// thread owns one column of a cell, the pixels between two input rows: it interpolates along x
// once, then marches down, for each pixel one max, one sum of ex2, and two gradient sums per class
// that differ in the row weight; nothing of a pixel leaves its registers. The columns then meet in
// shared memory, and for every (class, input) one thread adds those that read the input, left to
// right. An input inside of the tile belongs to it alone and is written once; on the tile's rim it
// becomes a partial gradient that launch.cu adds up. No atomics. Bytes per tile of q_h x q_w cells:
// labels once, c (q_h + 1)(q_w + 1) inputs and as many gradients. Per (pixel, class) one ex2, 4
// (fused) multiplications, 2 for the gradient, a comparison and three additions. Limits: axes up to
// 2^30; offsets are 64-bit. Source: Long et al. 2015 (the loss over upsampled scores), Szegedy et
// al. 2016, section 7 (smoothing).
#include "cuda/upsample_cross_entropy/block.cuh"
#include "cuda/upsample_cross_entropy/softmax.cuh"
#include "cuda/upsample_cross_entropy/tiles.cuh"

#include <limits>

namespace dilseg::cuda {
namespace {

using Base = Softmax<float>;

// Blocks of kMarchThreads that an SM must be able to hold: five registers a class, and some.
constexpr int march_blocks(int classes) { return classes <= 16 ? 4 : classes <= 24 ? 3 : 2; }

// A sum or a maximum over classes is taken in this many parts, which shortens the chain.
constexpr int kParts = 4;

// Classes from kClasses - 3 on may be absent; the others are there by the choice of kClasses.
template <int kClasses>
__device__ __forceinline__ bool present(int k, int classes) {
  return k < kClasses - 3 || k < classes;
}

template <int kClasses, bool kGradient>
__global__ void __launch_bounds__(kMarchThreads, march_blocks(kClasses))
    upsample_cross_entropy_march_kernel(TileInput<float> in,
                                        LabelInput<float> labels,
                                        TileOutput<float> out) {
  const TilePlan& plan = in.plan;
  const TileShared<float> shared(plan);
  const int thread = static_cast<int>(threadIdx.x);
  const int width = plan.w.cells + 1;
  if constexpr (kGradient) {
    share_scale(shared, out.grad);
  }
  if (thread == 0 && labels.smoothing > 0) {
    float sum = 0;
    for (int k = 0; k < in.c; ++k) {
      sum += labels.class_weight(k);
    }
    *shared.class_weights = sum;
  }

  for (int64_t index = blockIdx.x; index < plan.tiles; index += gridDim.x) {
    const Tile tile = tile_at(plan, index);
    begin_tile(in, tile, plan.rows, shared);
    stage(in, tile, 0, in.c, shared.patch);
    __syncthreads();
    const BlockSums block(shared.block);
    block.set(0, 0);
    for (Round<float> round(plan, shared); round.more(); round.next()) {
      const Segment at = segment_of(in, tile, shared, plan.rows, round);
      const UpsampleTaps<float> column = upsample_taps(in.axis_w, at.x);
      const float* patch = shared.patch + at.slot;
      float upper[kClasses];  // the logits of the cell's two input rows in this column
      float lower[kClasses];
      float upper_grad[kClasses];
      float lower_grad[kClasses];
      float upper_spread = 0;
      float lower_spread = 0;
#pragma unroll
      for (int k = 0; k < kClasses; ++k) {
        upper[k] = lower[k] = 0;
        upper_grad[k] = lower_grad[k] = 0;
        if (present<kClasses>(k, in.c)) {
          const ColumnLogit<float> logit(patch + k * plan.pitch, width, column.w0, column.w1);
          upper[k] = logit.upper;
          lower[k] = logit.lower;
        }
      }

      int64_t pixel = (tile.n * labels.h + at.y) * labels.w + at.x;
      int next = at.count > 0 ? labels.label(pixel) : kIgnored;
#pragma unroll 1
      for (int r = 0; r < at.count; ++r, pixel += labels.w) {
        const int label = next;
        next = r + 1 < at.count ? labels.label(pixel + labels.w) : kIgnored;
        float loss = 0;
        if (label >= 0) {
          const UpsampleTaps<float> row = upsample_taps(in.axis_h, at.y + r);
          float y[kClasses];
          float max[kParts];
          float sum[kParts];
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            max[part] = -std::numeric_limits<float>::infinity();
            sum[part] = 0;
          }
#pragma unroll
          for (int k = 0; k < kClasses; ++k) {
            y[k] = present<kClasses>(k, in.c)
                       ? ColumnLogit<float>::pixel(upper[k], lower[k], row.w0, row.w1)
                       : -std::numeric_limits<float>::infinity();
            max[k % kParts] = larger(max[k % kParts], y[k]);
          }
          const float shift = Base::shift(larger(larger(max[0], max[1]), larger(max[2], max[3])));
          float weighted = 0;  // sum_k v_k y_k, with smoothing
          if (labels.smoothing > 0 && out.sums != nullptr) {
#pragma unroll
            for (int k = 0; k < kClasses; ++k) {
              if (present<kClasses>(k, in.c)) {
                weighted += labels.class_weight(k) * Base::exponent(y[k], shift);
              }
            }
          }
#pragma unroll
          for (int k = 0; k < kClasses; ++k) {
            y[k] = Base::power(Base::exponent(y[k], shift));
            sum[k % kParts] += y[k];
          }
          const float total = (sum[0] + sum[1]) + (sum[2] + sum[3]);

          const float class_weight = labels.class_weight(label);
          const float label_weight = labels.keep * class_weight;
          if (out.sums != nullptr) {
            // The exponent of the label, not x_t - logsumexp: at logits of 1e4 the logsumexp is
            // rounded to a thousandth.
            const ColumnLogit<float> logit(patch + label * plan.pitch, width, column.w0, column.w1);
            const float picked = Base::exponent(logit.pixel(row.w0, row.w1), shift);
            const float log_sum = Base::log(total);
            loss = label_weight * (log_sum - picked);
            if (labels.smoothing > 0) {
              loss += labels.smoothing * (*shared.class_weights * log_sum - weighted);
            }
            loss *= Base::kUnit;
            block.add(static_cast<double>(loss), static_cast<double>(class_weight));
          }
          if constexpr (kGradient) {
            const float upstream = out.upstream == nullptr ? 1.0f : out.upstream[pixel];
            float factor = label_weight;
            float picked = total;  // p - 1 at the label, before any rounding of p
            if (labels.smoothing > 0) {
              factor += labels.smoothing * *shared.class_weights;
              picked *= factor == 0 ? 0.0f : label_weight / factor;
              upper_spread += labels.smoothing * upstream * row.w0;
              lower_spread += labels.smoothing * upstream * row.w1;
            }
            const float pixel_scale = upstream * factor / total;
            const float upper_scale = pixel_scale * row.w0;
            const float lower_scale = pixel_scale * row.w1;
#pragma unroll
            for (int k = 0; k < kClasses; ++k) {
              if (k == label) {
                y[k] -= picked;
              }
              upper_grad[k] += y[k] * upper_scale;
              lower_grad[k] += y[k] * lower_scale;
            }
          }
        } else if (label == kBad) {
          labels.stop(pixel);
        }
        if (out.losses != nullptr) {
          out.losses[pixel] = loss;
        }
      }

      if constexpr (kGradient) {
        // Anew, so that it takes no registers from the pixels.
        const Segment done = segment_of(in, tile, shared, plan.rows, round);
        share_column_weights(in, tile, shared, done, column.w0, column.w1);
        const bool clamped = is_last(in.axis_h, tile.cell_h + done.slot_h);
        float* sums = shared.sums + thread / kTileColumns * 2 * plan.group * kTilePitch +
                      thread % kTileColumns;
        float* lower_sums = sums + plan.group * kTilePitch;
#pragma unroll
        for (int k = 0; k < kClasses; ++k) {
          if (present<kClasses>(k, in.c)) {
            float above = upper_grad[k];
            float below = lower_grad[k];
            if (labels.smoothing > 0) {
              const float weight = labels.class_weight(k);
              above -= weight * upper_spread;
              below -= weight * lower_spread;
            }
            sums[k * kTilePitch] = clamped ? above + below : above;
            lower_sums[k * kTilePitch] = clamped ? 0.0f : below;
          }
        }
        __syncthreads();  // every write of the sums and column weights
        add_columns(in, tile, index, shared, round, 0, in.c, out);
        __syncthreads();  // every read of them
      }
    }
    finish_tile(plan, block, index, out);
  }
}

template <bool kGradient>
cudaError_t launch_classes(const TileInput<float>& in,
                           const LabelInput<float>& labels,
                           const TileOutput<float>& out,
                           Stream stream) {
  using Kernel = void (*)(TileInput<float>, LabelInput<float>, TileOutput<float>);
  constexpr Kernel kKernels[] = {&upsample_cross_entropy_march_kernel<4, kGradient>,
                                 &upsample_cross_entropy_march_kernel<8, kGradient>,
                                 &upsample_cross_entropy_march_kernel<12, kGradient>,
                                 &upsample_cross_entropy_march_kernel<16, kGradient>,
                                 &upsample_cross_entropy_march_kernel<20, kGradient>,
                                 &upsample_cross_entropy_march_kernel<24, kGradient>,
                                 &upsample_cross_entropy_march_kernel<28, kGradient>,
                                 &upsample_cross_entropy_march_kernel<32, kGradient>};
  return launch(kKernels[(in.c - 1) / 4],
                grid_for(in.plan.tiles, 1),
                kMarchThreads,
                in.plan.shared_bytes,
                stream,
                in,
                labels,
                out);
}

}  // namespace

cudaError_t launch_march(const TileInput<float>& in,
                         const LabelInput<float>& labels,
                         const TileOutput<float>& out,
                         bool gradient,
                         Stream stream) {
  return gradient ? launch_classes<true>(in, labels, out, stream)
                  : launch_classes<false>(in, labels, out, stream);
}

}  // namespace dilseg::cuda
