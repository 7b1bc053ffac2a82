// SPDX-License-Identifier: Apache-2.0
//
// Gradient of the upsampling with respect to its input, a gather without atomics, for any scale,
// strides and dtype; magnified dense maps go to backward_columns.cu and backward_cells.cu:
//   grad_input[n,c,i,j] = sum_x wx(x,j) sum_y wy(y,i) grad_output[n,c,y,x]
// over exactly the outputs whose forward taps name (i, j); weights by the forward's own rule. One
// block owns tile_c channels of tile_w pixels in input row i. For chunk_w columns of grad_output at
// a time, each thread sums one column over the rows that read row i (weights in shared memory),
// then each thread gathers the columns that read its own pixel. Sums in float (double for double),
// in chains of 32 that join a total, in one fixed order; one rounding. Bytes: grad_output twice
// (its rows serve two input rows; the second read is cached) plus the columns that neighbouring
// tiles share, grad_input once. Limits: axes up to 2^30; offsets are 64-bit.
#include "cuda/upsample_add/tile.cuh"

namespace dilseg::cuda {
namespace {

template <class T>
struct BackwardArgs {
  UpsamplePlan plan;
  UpsampleAxis<acc_t<T>> axis_h, axis_w;
  int channels;
  const T* grad_output;
  T* grad_input;
  Strides4 s_output, s_input;
};

template <class A>
struct BackwardShared {
  UpsampleTaps<A> column_taps[kUpsampleThreads];  // of the chunk's columns
  A column_sums[kUpsampleThreads];                // [tile_c, chunk_w] in memory order
  A row_weights[kUpsampleChain];
};

template <class T, bool kChannelsInner>
__global__ void __launch_bounds__(kUpsampleThreads, kUpsampleBlocks)
    upsample_add_backward_kernel(BackwardArgs<T> args) {
  using A = acc_t<T>;
  auto& shared = *dynamic_shared<BackwardShared<A>>();
  const int thread = static_cast<int>(threadIdx.x);
  const int chunk_w = args.plan.chunk_w;

  for (int64_t index = blockIdx.x; index < args.plan.tiles; index += gridDim.x) {
    const UpsampleTile tile =
        upsample_tile(args.plan, index, args.channels, args.axis_h.size_in, args.axis_w.size_in);
    const UpsampleRange rows = upsample_range(args.axis_h, tile.y);
    // All columns that read a pixel of the tile.
    const int column_begin = upsample_first(args.axis_w, tile.x - 1);
    const int column_end = upsample_first(args.axis_w, tile.x + tile.size_w);
    const T* grad_output = args.grad_output + tile.n * args.s_output.n + tile.c * args.s_output.c;

    // The input pixel that this thread owns, and the columns that read it.
    const UpsampleItem own = upsample_item<kChannelsInner>(thread, tile.size_c, tile.size_w);
    const bool owns = own.c < tile.size_c && own.x < tile.size_w;
    UpsampleRange own_columns{0, 0};
    if (owns) {
      own_columns = upsample_range(args.axis_w, tile.x + own.x);
    }
    // The column that this thread sums, counted from the chunk's first.
    const UpsampleItem source = upsample_item<kChannelsInner>(thread, tile.size_c, chunk_w);
    const bool sums = source.c < tile.size_c && source.x < chunk_w;

    A total = 0;
    for (int chunk = column_begin; chunk < column_end; chunk += chunk_w) {
      const int width = min(chunk_w, column_end - chunk);
      // Every read of the previous chunk's taps and sums, before they are overwritten.
      __syncthreads();
      if (thread < width) {
        shared.column_taps[thread] = upsample_taps(args.axis_w, chunk + thread);
      }
      A column_sum = 0;
      for (int first = rows.begin; first < rows.end; first += kUpsampleChain) {
        const int count = min(kUpsampleChain, rows.end - first);
        __syncthreads();  // every read of the previous row weights, before they are overwritten
        if (thread < count) {
          shared.row_weights[thread] =
              upsample_weight(upsample_taps(args.axis_h, first + thread), tile.y);
        }
        __syncthreads();  // every write of the row weights, before their first read
        if (sums && source.x < width) {
          const T* column = grad_output + source.c * args.s_output.c + first * args.s_output.h +
                            (chunk + source.x) * args.s_output.w;
          A chain = 0;
          for (int y = 0; y < count; ++y) {
            chain += shared.row_weights[y] * load(column + y * args.s_output.h);
          }
          column_sum += chain;
        }
      }
      shared.column_sums[thread] = column_sum;
      __syncthreads();  // every write of the column taps and sums, before their first read

      const int end = min(own_columns.end, chunk + width);
      for (int first = max(own_columns.begin, chunk); first < end; first += kUpsampleChain) {
        A chain = 0;
        for (int x = first - chunk; x < min(first + kUpsampleChain, end) - chunk; ++x) {
          const int slot = kChannelsInner ? x * tile.size_c + own.c : own.c * chunk_w + x;
          chain +=
              upsample_weight(shared.column_taps[x], tile.x + own.x) * shared.column_sums[slot];
        }
        total += chain;
      }
    }
    if (owns) {
      store(args.grad_input + tile.n * args.s_input.n + (tile.c + own.c) * args.s_input.c +
                tile.y * args.s_input.h + (tile.x + own.x) * args.s_input.w,
            total);
    }
  }
}

}  // namespace

Status launch_upsample_add_backward(const UpsampleAddBackwardParams& p, Stream stream) {
  const UpsampleGeometry& g = p.geometry;
  if (g.n == 0 || g.c == 0 || g.h_in == 0 || g.w_in == 0) {
    return cudaSuccess;
  }
  if (!fits_upsample(g)) {
    return cudaErrorInvalidValue;
  }
  return dispatch_dtype(p.dtype, [&]<class T>() {
    using A = acc_t<T>;
    const UpsampleColumnsPlan columns = plan_upsample_backward_columns(p, sizeof(T));
    if (columns.vector != 0) {
      return launch_upsample_backward_columns(p, columns, stream);
    }
    const UpsampleCellsPlan cells = plan_upsample_backward_cells(p, sizeof(T));
    if (cells.vector != 0) {
      return launch_upsample_backward_cells(p, cells, stream);
    }
    const UpsamplePlan plan = plan_upsample_add_backward(g, p.grad_input_strides);
    const BackwardArgs<T> args{
        plan,
        make_upsample_axis<A>(g.h_in, g.h_out, g.origin_h, g.scale_h, g.align_corners, g.border),
        make_upsample_axis<A>(g.w_in, g.w_out, g.origin_w, g.scale_w, g.align_corners, g.border),
        static_cast<int>(g.c),
        static_cast<const T*>(p.grad_output),
        static_cast<T*>(p.grad_input),
        p.grad_output_strides,
        p.grad_input_strides};
    const auto kernel = plan.channels_inner ? &upsample_add_backward_kernel<T, true>
                                            : &upsample_add_backward_kernel<T, false>;
    return launch(
        kernel, grid_for(plan.tiles, 1), kUpsampleThreads, sizeof(BackwardShared<A>), stream, args);
  });
}

}  // namespace dilseg::cuda
