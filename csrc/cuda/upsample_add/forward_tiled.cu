// SPDX-License-Identifier: Apache-2.0
//
// Bilinear upsampling with the skip added in the same store, for magnified dense maps in float and
// the half types:
//   output[n,c,y,x] = sum_i wy_i sum_j wx_j input[n,c,iy_i,ix_j] + skip[n,c,y+offset_h,x+offset_w]
// with taps and weights by upsample_index.h, in float, rounded once: the bits of forward.cu.
// Layouts: contiguous and channels_last, both as planes of rows of w * channels neighbouring
// values; the skip may be a crop. One block owns a tile of an output plane. It widens the patch of
// input that the tile reads into shared memory, stretches the patch's rows along x there, and then
// every thread blends two stretched rows at one vector of columns, row after row, with one vector
// load of the skip and one vector store (16 bytes; single elements where a row begins elsewhere).
// The first loads of the skip are under way meanwhile. Bytes: skip and output once, input once plus
// the border rows and columns of the tiles (1.07 to 1.4 times, of a tensor that is 1/s^2 of the
// output). Flops: 3 per output and 4 per stretched value of 1/s outputs. Limits: axes and origins
// up to 2^16; 64-bit offsets to a tile, its rows step by 64-bit strides. Source: the usual
// shared-memory patch with separable interpolation; the index rule is torch's.
#include "cuda/common/vec.cuh"
#include "cuda/upsample_add/tile.cuh"

#include <type_traits>

namespace dilseg::cuda {
namespace {

// Rows of the skip that a thread holds while it waits.
constexpr int kHeldRows = 4;
// Blocks of an SM: 48 KiB of the skip under way. A fourth would leave the half types 64 registers,
// 2 too few.
constexpr int kTiledBlocks = 3;

template <class T>
struct TiledArgs {
  UpsampleTiledPlan plan;
  const T* input;
  const T* skip;  // at the crop offset; null adds nothing
  T* output;
};

// The inputs [begin, begin + count) that outputs [first, first + outputs) read.
struct Span {
  int begin, count;
};

__device__ __forceinline__ Span inputs_of(const UpsampleAxis<float>& axis, int first, int outputs) {
  const int begin = max(upsample_lower(axis, upsample_source(axis, first)), 0);
  const int last = upsample_lower(axis, upsample_source(axis, first + outputs - 1)) + 1;
  return {begin, max(min(last, axis.size_in - 1) - begin + 1, 0)};
}

// Threads laid over rows of `width` columns: as many rows at a time as fit, all of a thread's
// elements in one column (if a row is wider than the block, in every blockDim-th).
struct Lanes {
  int column, row, rows;
};

__device__ __forceinline__ Lanes lanes_over(int width) {
  const int thread = static_cast<int>(threadIdx.x);
  const int span = max(min(width, kUpsampleThreads), 1);
  return {thread % span, thread / span, kUpsampleThreads / span};
}

template <class T, int kVector>
__global__ void __launch_bounds__(kUpsampleThreads, kTiledBlocks)
    upsample_add_tiled_kernel(TiledArgs<T> args) {
  const UpsampleTiledPlan& plan = args.plan;
  const int thread = static_cast<int>(threadIdx.x);
  // Of each output row the two stretched rows, as offsets, and their weights.
  auto* row_taps = dynamic_shared<UpsampleTaps<float>>();               // [tile_h]
  float* stretched = reinterpret_cast<float*>(row_taps + plan.tile_h);  // [patch_h + 1, line]
  float* patch = stretched + (plan.patch_h + 1) * plan.tile_w * plan.tile_c;

  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    int64_t rest = tile;
    const int x0 = static_cast<int>(rest % plan.tiles_w) * plan.tile_w;
    rest /= plan.tiles_w;
    const int c0 = static_cast<int>(rest % plan.tiles_c) * plan.tile_c;
    rest /= plan.tiles_c;
    const int y0 = static_cast<int>(rest % plan.tiles_h) * plan.tile_h;
    const int64_t plane = rest / plan.tiles_h;
    const int inner = min(plan.tile_c, plan.channels - c0);
    const int line = min(plan.tile_w, plan.axis_w.size_out - x0) * inner;
    const int height = min(plan.tile_h, plan.axis_h.size_out - y0);

    // This thread's vector of columns in the output, and the first of its rows.
    const int vectors = line / kVector;
    const int rows = kUpsampleThreads / vectors;
    const int column = thread % vectors * kVector;
    const int row = thread / vectors < rows ? thread / vectors : height;
    const int64_t offset =
        static_cast<int64_t>(x0 + column / inner) * plan.channels + c0 + column % inner;
    const T* skip = args.skip == nullptr
                        ? nullptr
                        : args.skip + plane * plan.skip.plane + y0 * plan.skip.row + offset;
    T* output = args.output + plane * plan.output.plane + y0 * plan.output.row + offset;
    Vec<T, kVector> held[kHeldRows];
    if (skip != nullptr) {
#pragma unroll
      for (int k = 0; k < kHeldRows; ++k) {
        if (row + k * rows < height) {
          held[k] = load_vec<kVector>(skip + (row + k * rows) * plan.skip.row);
        }
      }
    }

    const Span in_h = inputs_of(plan.axis_h, y0, height);
    const Span in_w = inputs_of(plan.axis_w, x0, line / inner);
    const int patch_line = in_w.count * inner;
    __syncthreads();  // every read of the previous tile, before it is overwritten
    {
      const T* input = args.input + plane * plan.input.plane + in_h.begin * plan.input.row +
                       static_cast<int64_t>(in_w.begin) * plan.channels + c0;
      const Lanes at = lanes_over(patch_line);
      for (int i = at.column; i < patch_line; i += kUpsampleThreads) {
        const T* source = input + static_cast<int64_t>(i / inner) * plan.channels + i % inner;
        for (int r = at.row; r < in_h.count && at.row < at.rows; r += at.rows) {
          patch[r * patch_line + i] = load(source + r * plan.input.row);
        }
      }
    }
    for (int r = thread; r < height; r += kUpsampleThreads) {
      UpsampleTaps<float> taps = upsample_taps(plan.axis_h, y0 + r);
      // Beyond a zero border lies the row of zeros behind the patch.
      taps.i0 = (taps.i0 < 0 ? in_h.count : taps.i0 - in_h.begin) * line;
      taps.i1 = (taps.i1 < 0 ? in_h.count : taps.i1 - in_h.begin) * line;
      row_taps[r] = taps;
    }
    __syncthreads();  // every write of the patch, before its first read
    {
      const Lanes at = lanes_over(line);
      for (int i = at.column; i < line; i += kUpsampleThreads) {
        const UpsampleTaps<float> taps = upsample_taps(plan.axis_w, x0 + i / inner);
        const float* left = patch + (taps.i0 - in_w.begin) * inner + i % inner;
        const float* right = patch + (taps.i1 - in_w.begin) * inner + i % inner;
        for (int r = at.row; r < in_h.count && at.row < at.rows; r += at.rows) {
          stretched[r * line + i] = upsample_blend(taps.w0,
                                                   taps.i0 < 0 ? 0.0f : left[r * patch_line],
                                                   taps.w1,
                                                   taps.i1 < 0 ? 0.0f : right[r * patch_line]);
        }
        if (at.row == 0) {
          stretched[in_h.count * line + i] = 0.0f;
        }
      }
    }
    __syncthreads();  // every write of the stretched rows, before their first read

    for (int first = row; first < height; first += kHeldRows * rows) {
#pragma unroll
      for (int k = 0; k < kHeldRows; ++k) {
        const int y = first + k * rows;
        if (y < height) {
          const UpsampleTaps<float> taps = row_taps[y];
          Vec<T, kVector> result;
          constexpr int kPart = kVector < 4 ? kVector : 4;
#pragma unroll
          for (int part = 0; part < kVector; part += kPart) {
            const auto upper = load_vec<kPart>(stretched + taps.i0 + column + part);
            const auto lower = load_vec<kPart>(stretched + taps.i1 + column + part);
#pragma unroll
            for (int v = 0; v < kPart; ++v) {
              float value = upsample_blend(taps.w0, upper.v[v], taps.w1, lower.v[v]);
              if (skip != nullptr) {
                value += load(&held[k].v[part + v]);
              }
              store(&result.v[part + v], value);
            }
          }
          store_vec<kVector>(output + y * plan.output.row, result);
        }
      }
      if (skip != nullptr) {
#pragma unroll
        for (int k = 0; k < kHeldRows; ++k) {
          const int y = first + (kHeldRows + k) * rows;
          if (y < height) {
            held[k] = load_vec<kVector>(skip + y * plan.skip.row);
          }
        }
      }
    }
  }
}

}  // namespace

cudaError_t launch_upsample_add_tiled(const UpsampleAddParams& p,
                                      const void* skip,
                                      const UpsampleTiledPlan& plan,
                                      Stream stream) {
  return dispatch_dtype(p.dtype, [&]<class T>() {
    if constexpr (std::is_same_v<T, double>) {
      return cudaErrorInvalidValue;
    } else {
      const TiledArgs<T> args{plan,
                              static_cast<const T*>(p.input),
                              static_cast<const T*>(skip),
                              static_cast<T*>(p.output)};
      const auto kernel = plan.vector == 1 ? &upsample_add_tiled_kernel<T, 1>
                                           : &upsample_add_tiled_kernel<T, 16 / sizeof(T)>;
      return launch(kernel,
                    grid_for(plan.tiles, 1),
                    kUpsampleThreads,
                    static_cast<size_t>(plan.shared_bytes),
                    stream,
                    args);
    }
  });
}

}  // namespace dilseg::cuda
