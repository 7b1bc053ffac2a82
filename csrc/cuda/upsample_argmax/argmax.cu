// SPDX-License-Identifier: Apache-2.0
//
// Class of every pixel of bilinearly upsampled logits, and its softmax probability:
//   x_k        = wy0 (wx0 a_k + wx1 b_k) + wy1 (wx0 c_k + wx1 d_k)
//   label      = first k with the largest x_k; the first nan, if there is one
//   confidence = 1 / sum_k exp(x_k - x_label)
// input [n, c, h_in, w_in], any strides and dtype; label and confidence [n, h_out, w_out] dense. A
// block owns the pixels of a tile (../upsample_cross_entropy/select.h) and holds the tile's inputs
// in shared memory, in chunks of classes where they do not fit; a thread owns up to kRows pixels of
// one column and sweeps the classes once, twice with confidence. Neighbouring threads write
// neighbouring pixels, so a warp's stores are whole lines. Bytes: the inputs, each (1 + 1/q_h)(1 +
// 1/q_w) times for tiles of q_h x q_w cells, label and confidence once; the upsampled logits are
// never stored. Per (pixel, class) 2 multiplications or fused multiply-adds and a comparison, with
// confidence 4 and an exponential more. Computes in float, double for double. Limits: axes and
// classes up to 2^30; offsets are 64-bit.
#include "cuda/upsample_cross_entropy/softmax.cuh"
#include "cuda/upsample_cross_entropy/tile.cuh"
#include "dilseg/upsample_argmax.h"

#include <limits>

namespace dilseg::cuda {
namespace {

template <class A>
struct ArgmaxOutput {
  IndexType label_type;
  void* label;
  A* confidence;  // null: not wanted
};

template <class A>
__device__ __forceinline__ void store_label(const ArgmaxOutput<A>& out, int64_t pixel, int label) {
  switch (out.label_type) {
    case IndexType::kInt64:
      static_cast<int64_t*>(out.label)[pixel] = label;
      break;
    case IndexType::kInt32:
      static_cast<int32_t*>(out.label)[pixel] = label;
      break;
    default:
      static_cast<uint8_t*>(out.label)[pixel] = static_cast<uint8_t>(label);
  }
}

template <class A, int kRows>
__global__ void __launch_bounds__(kSweepThreads, sizeof(A) == 8 || kRows == 8 ? 3 : 4)
    upsample_argmax_kernel(TileInput<A> in, ArgmaxOutput<A> out) {
  const TilePlan& plan = in.plan;
  const TileShared<A> shared(plan);
  const int width = plan.w.cells + 1;

  for (int64_t index = blockIdx.x; index < plan.tiles; index += gridDim.x) {
    const Tile tile = tile_at(plan, index);
    begin_tile(in, tile, kRows, shared);
    StagedClasses<A> staged(in, tile, shared);
    for (Round<A> round(plan, shared); round.more(); round.next()) {
      const Segment at = segment_of(in, tile, shared, kRows, round);
      const UpsampleTaps<A> column = upsample_taps(in.axis_w, at.x);
      A w0[kRows];
      A w1[kRows];
      A best[kRows];
      int label[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const UpsampleTaps<A> row = upsample_taps(in.axis_h, at.y + r);
        w0[r] = row.w0;
        w1[r] = row.w1;
        best[r] = -std::numeric_limits<A>::infinity();
        label[r] = 0;
      }
      staged.for_each([&](int begin, int count) {
        const A* logits = shared.patch + at.slot;
        for (int k = 0; k < count; ++k, logits += plan.pitch) {
          const ColumnLogit<A> logit(logits, width, column.w0, column.w1);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const A x = logit.pixel(w0[r], w1[r]);
            // nan is larger than any number, and no later nan is larger than it.
            if (!(x <= best[r]) && best[r] == best[r]) {
              best[r] = x;
              label[r] = begin + k;
            }
          }
        }
      });

      A sum[kRows];
      if (out.confidence != nullptr) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          sum[r] = 0;
        }
        staged.for_each([&](int /*begin*/, int count) {
          const A* logits = shared.patch + at.slot;
          for (int k = 0; k < count; ++k, logits += plan.pitch) {
            const ColumnLogit<A> logit(logits, width, column.w0, column.w1);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              // The difference first: the label's own term is 1 exactly.
              sum[r] += Softmax<A>::power(
                  Softmax<A>::exponent(logit.pixel(w0[r], w1[r]) - best[r], A(0)));
            }
          }
        });
      }

      const int64_t first_pixel = (tile.n * in.axis_h.size_out + at.y) * in.axis_w.size_out + at.x;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r < at.count) {
          const int64_t pixel = first_pixel + int64_t{r} * in.axis_w.size_out;
          store_label(out, pixel, label[r]);
          if (out.confidence != nullptr) {
            out.confidence[pixel] = A(1) / sum[r];
          }
        }
      }
    }
  }
}

}  // namespace

Status launch_upsample_argmax(const UpsampleArgmaxParams& p, Stream stream) {
  const UpsampleGeometry& g = p.geometry;
  if (g.n == 0) {
    return cudaSuccess;
  }
  if (!fits_tiles(g)) {
    return cudaErrorInvalidValue;
  }
  return dispatch_accumulator(p.dtype, [&]<class A>() {
    const TileInput<A> in(g, p.dtype, p.input, p.input_strides, TileUse::kArgmax);
    auto kernel = &upsample_argmax_kernel<A, 2>;
    if constexpr (sizeof(A) == 4) {
      kernel = in.plan.rows == 2   ? kernel
               : in.plan.rows == 4 ? &upsample_argmax_kernel<A, 4>
                                   : &upsample_argmax_kernel<A, 8>;
    }
    return launch(kernel,
                  grid_for(in.plan.tiles, 1),
                  static_cast<unsigned>(in.plan.threads()),
                  in.plan.shared_bytes,
                  stream,
                  in,
                  ArgmaxOutput<A>{p.label_type, p.label, static_cast<A*>(p.confidence)});
  });
}

}  // namespace dilseg::cuda
