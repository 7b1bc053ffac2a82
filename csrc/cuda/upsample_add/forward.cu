// SPDX-License-Identifier: Apache-2.0
//
// Bilinear upsampling with the skip added in the same store, any scale, layout and dtype; magnified
// dense maps go to forward_tiled.cu, to the same bits:
//   output[n,c,y,x] = sum_ij wy_i wx_j input[n,c,iy_i,ix_j] + skip[n,c,y+offset_h,x+offset_w]
// with taps and weights by upsample_index.h. One block owns tile_c channels of tile_w pixels of one
// output row: it puts the taps of the row's pixels in shared memory, then its threads walk the tile
// in the output's memory order. Values stay in float (double for double) until the one rounding.
// Bytes: input once from memory (four loads per output from the caches), skip and output once.
// Flops: 10 per output. Limits: axes up to 2^30; offsets are 64-bit.
#include "cuda/upsample_add/tile.cuh"

namespace dilseg::cuda {
namespace {

template <class T>
struct ForwardArgs {
  UpsamplePlan plan;
  UpsampleAxis<acc_t<T>> axis_h, axis_w;
  int channels;
  const T* input;
  const T* skip;  // at the crop offset; null adds nothing
  T* output;
  Strides4 s_input, s_skip, s_output;
};

// The input value at (row, column), 0 beyond a zero border.
template <class T>
__device__ __forceinline__ acc_t<T> load_tap(const T* plane,
                                             const Strides4& s,
                                             int row,
                                             int column) {
  return row < 0 || column < 0 ? acc_t<T>(0) : load(plane + row * s.h + column * s.w);
}

template <class T, bool kChannelsInner>
__global__ void __launch_bounds__(kUpsampleThreads, kUpsampleBlocks)
    upsample_add_kernel(ForwardArgs<T> args) {
  using A = acc_t<T>;
  auto* columns = dynamic_shared<UpsampleTaps<A>>();  // [tile_w]
  for (int64_t index = blockIdx.x; index < args.plan.tiles; index += gridDim.x) {
    const UpsampleTile tile =
        upsample_tile(args.plan, index, args.channels, args.axis_h.size_out, args.axis_w.size_out);
    __syncthreads();  // every read of the previous tile's taps, before they are overwritten
    for (int x = static_cast<int>(threadIdx.x); x < tile.size_w; x += kUpsampleThreads) {
      columns[x] = upsample_taps(args.axis_w, tile.x + x);
    }
    __syncthreads();  // every write of the taps, before their first read

    const UpsampleTaps<A> row = upsample_taps(args.axis_h, tile.y);
    const T* input = args.input + tile.n * args.s_input.n + tile.c * args.s_input.c;
    const T* skip = args.skip == nullptr
                        ? nullptr
                        : args.skip + tile.n * args.s_skip.n + tile.c * args.s_skip.c +
                              tile.y * args.s_skip.h + tile.x * args.s_skip.w;
    T* output = args.output + tile.n * args.s_output.n + tile.c * args.s_output.c +
                tile.y * args.s_output.h + tile.x * args.s_output.w;

    for (int i = static_cast<int>(threadIdx.x); i < tile.size_c * tile.size_w;
         i += kUpsampleThreads) {
      const UpsampleItem at = upsample_item<kChannelsInner>(i, tile.size_c, tile.size_w);
      const UpsampleTaps<A> column = columns[at.x];
      const T* plane = input + at.c * args.s_input.c;
      const A upper = upsample_blend(column.w0,
                                     load_tap(plane, args.s_input, row.i0, column.i0),
                                     column.w1,
                                     load_tap(plane, args.s_input, row.i0, column.i1));
      const A lower = upsample_blend(column.w0,
                                     load_tap(plane, args.s_input, row.i1, column.i0),
                                     column.w1,
                                     load_tap(plane, args.s_input, row.i1, column.i1));
      A value = upsample_blend(row.w0, upper, row.w1, lower);
      if (skip != nullptr) {
        value += load(skip + at.c * args.s_skip.c + at.x * args.s_skip.w);
      }
      store(output + at.c * args.s_output.c + at.x * args.s_output.w, value);
    }
  }
}

}  // namespace

Status launch_upsample_add(const UpsampleAddParams& p, Stream stream) {
  const UpsampleGeometry& g = p.geometry;
  if (g.n == 0 || g.c == 0 || g.h_out == 0 || g.w_out == 0) {
    return cudaSuccess;
  }
  if (!fits_upsample(g)) {
    return cudaErrorInvalidValue;
  }
  return dispatch_dtype(p.dtype, [&]<class T>() {
    using A = acc_t<T>;
    const auto* skip = static_cast<const T*>(p.skip);
    if (skip != nullptr) {
      skip += p.offset_h * p.skip_strides.h + p.offset_w * p.skip_strides.w;
    }
    const UpsampleTiledPlan tiled = plan_upsample_add_tiled(p, skip, sizeof(T));
    if (tiled.vector != 0) {
      return launch_upsample_add_tiled(p, skip, tiled, stream);
    }
    const UpsamplePlan plan = plan_upsample_add(g, p.output_strides);
    const ForwardArgs<T> args{
        plan,
        make_upsample_axis<A>(g.h_in, g.h_out, g.origin_h, g.scale_h, g.align_corners, g.border),
        make_upsample_axis<A>(g.w_in, g.w_out, g.origin_w, g.scale_w, g.align_corners, g.border),
        static_cast<int>(g.c),
        static_cast<const T*>(p.input),
        skip,
        static_cast<T*>(p.output),
        p.input_strides,
        p.skip_strides,
        p.output_strides};
    const auto kernel =
        plan.channels_inner ? &upsample_add_kernel<T, true> : &upsample_add_kernel<T, false>;
    const size_t shared = static_cast<size_t>(plan.tile_w) * sizeof(UpsampleTaps<A>);
    return launch(kernel, grid_for(plan.tiles, 1), kUpsampleThreads, shared, stream, args);
  });
}

}  // namespace dilseg::cuda
