// SPDX-License-Identifier: Apache-2.0
//
// Stride-1 convolution of at most 96 to at most 96 channels on tensor cores (mma.sync, sm_80):
//   dst[n, o, y, x] = act(bias[o] + sum_{i, j, c} weight[o, c, i, j] *
//                         src[n, c, y - pad_top + i*dil_h, x - pad_left + j*dil_w])
// and, with reversed taps and the roles of o and c exchanged, the gradient of the input. Layouts:
// any strides. One block owns a tile of 128 pixels (64 of split floats) of one or several
// neighbouring phases (patch.h) and all channels of dst. Its patch of src lies in shared memory as
// rows of channel chunks, one row per pixel, zero outside of the map and beyond the channels; the
// weights as rows of (tap, chunk), one row per channel of dst. The product has m = pixels,
// n = channels of dst and k = (tap, chunk), two chunks at a time, whichever taps they belong to: a
// lane of ldmatrix addresses the row of the pixel that its tap meets. Taps that lie in the padding
// for the whole tile are not in the list. Flops: 2 * pixels * 24 or 48 or 96 * taps * c_src padded
// to 8. Bytes: the patch (src 1 to 2 times), dst once, through a staged tile so that stores are
// coalesced. Floats are split into bfloat16 parts while they are loaded, not once per tap. Limits:
// patch.h; 64-bit offsets to a tile and between its rows. Source: implicit GEMM with the operand
// gathered by ldmatrix instead of an im2col buffer.
#include "cuda/dilated_conv2d/patch.cuh"

namespace dilseg::cuda {
namespace {

template <int kPlanes>
constexpr int kRows = patch_rows(kPlanes);
template <int kPlanes>
constexpr int kPixels = patch_pixels(kPlanes);
template <class T, int kPlanes>
constexpr int kStagePitch = patch_stage_pitch(kPixels<kPlanes>, sizeof(T));

template <class T>
struct PatchForwardArgs {
  PatchGeometry g;
  PatchTiling t;
  patch::ForwardLayout layout;
  PatchSource<patch_raw_t<T>> src;
  PatchRows patch, tile;
  PatchDivider chunks, slots;  // of the weights
  const patch_raw_t<T>* weight;
  // Between filters, channels of src, and taps; of the gradient of the input the last two are
  // negative.
  int64_t weight_n, weight_c, weight_h, weight_w;
  const T* bias;
  T* dst;
  Strides4 s_dst;
  int rows_n, group;
  bool resident, dst_inner, relu;
};

// The (tap, chunk) pairs that a tile multiplies: all chunks of a rectangle of taps.
struct PatchList {
  TapRange rows, columns;
  PatchDivider chunks;

  __device__ __forceinline__ int size() const {
    return (rows.end - rows.begin) * (columns.end - columns.begin) * chunks.divisor;
  }
  struct Entry {
    int k_y, k_x, chunk;
  };
  __device__ __forceinline__ Entry operator[](int i) const {
    const int tap = chunks.quotient(i);
    const int width = columns.end - columns.begin;
    return {rows.begin + tap / width, columns.begin + tap % width, i - tap * chunks.divisor};
  }
};

// Weights of the entries [first, first + count) of the list to the first slots, zero to the others.
template <class T, int kPlanes>
__device__ __forceinline__ void load_weights(const PatchForwardArgs<T>& args,
                                             const PatchList& list,
                                             int first,
                                             int count,
                                             unsigned char* to) {
  using Raw = patch_raw_t<T>;
  const int pitch = args.layout.pitch_weights;
  const int threads = static_cast<int>(blockDim.x);
#pragma unroll 2
  for (int i = static_cast<int>(threadIdx.x); i < args.rows_n * args.slots.divisor; i += threads) {
    const int n = args.slots.quotient(i);
    const int slot = i - n * args.slots.divisor;
    Raw value[kPatchChunk] = {};
    if (slot < count && n < args.g.c_dst) {
      const PatchList::Entry at = list[first + slot];
      const int channel = at.chunk * kPatchChunk;
      const Raw* p = args.weight + n * args.weight_n + channel * args.weight_c +
                     at.k_y * args.weight_h + at.k_x * args.weight_w;
#pragma unroll
      for (int e = 0; e < kPatchChunk; ++e) {
        if (channel + e < args.g.c_src) {
          value[e] = p[e * args.weight_c];
        }
      }
    }
    store_chunk<kPlanes>(to + n * pitch + slot * 16, args.layout.weights, value);
  }
}

template <class T, int kPlanes, int kColumns>
__global__ void __launch_bounds__(kPatchMaxThreads, kPatchBlocks)
    dilated_conv2d_patch_kernel(PatchForwardArgs<T> args) {
  constexpr int kTile = kPixels<kPlanes>;
  constexpr int kRowsM = kRows<kPlanes>;
  const PatchGeometry& g = args.g;
  const PatchTiling& t = args.t;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32;
  const int warp_m = thread / 32 % kPatchWarps;
  const int warp_n = thread / 32 / kPatchWarps;

  auto* shared = dynamic_shared<unsigned char>();
  unsigned char* weights = shared;
  auto* zeros = reinterpret_cast<uint32_t*>(shared + args.layout.weights * kPlanes);
  auto* offsets = reinterpret_cast<int64_t*>(shared + args.layout.offsets);
  auto* table = reinterpret_cast<int2*>(shared + args.layout.table);
  unsigned char* pixels = shared + args.layout.pixels;
  const int pitch_w = args.layout.pitch_weights;
  const int pitch = args.layout.pitch;

  // Where this lane's rows of the two operands begin, for ldmatrix.
  const uint32_t zero_row = ptx::shared_address(zeros);
  uint32_t row_m[kRowsM];
#pragma unroll
  for (int m = 0; m < kRowsM; ++m) {
    int pixel = (warp_m * kRowsM + m) * kPatchStep + lane % 16;
    pixel = pixel < t.tile_h * t.tile_w ? pixel : 0;
    const int row = pixel / t.tile_w;
    row_m[m] = ptx::shared_address(pixels) + (row * t.patch_w + pixel - row * t.tile_w) * pitch;
  }
  const uint32_t row_n =
      ptx::shared_address(weights) + (warp_n * 8 * kColumns + lane % 8 + lane / 16 * 8) * pitch_w;
  const uint32_t row_last = ptx::shared_address(weights) +
                            (warp_n * 8 * kColumns + 8 * (kColumns - 1) + lane % 8) * pitch_w;

  if (thread < 4) {
    zeros[thread] = 0;
  }
  if (args.resident) {
    const PatchList all{{0, g.k_h}, {0, g.k_w}, args.chunks};
    load_weights<T, kPlanes>(args, all, 0, args.group, weights);
  }

  const int tiles = static_cast<int>(t.tiles);
  for (int i = static_cast<int>(blockIdx.x); i < tiles; i += static_cast<int>(gridDim.x)) {
    const PatchTile tile = patch_tile(g, t, i);
    const int y = tile.y - g.pad_top;
    const int x = tile.x - g.pad_left;
    const PatchList list{meeting_taps(y, t.tile_h, 1, g.dil_h, g.h_src, g.k_h),
                         meeting_taps(x, t.tile_x, t.phases, g.dil_w, g.w_src, g.k_w),
                         args.chunks};
    const int count = list.size();

    __syncthreads();  // the previous tile has left shared memory
    load_pixels<kPlanes>(args.src, args.patch, tile.n, y, x, INT_MAX, 0, pixels);
    for (int e = thread; e < (count + 1) / 2 * 2; e += threads) {
      const int zero_slot = args.group * 16;
      int2 entry = {-1, zero_slot};
      if (e < count) {
        const PatchList::Entry at = list[e];
        const int slot = (at.k_y * g.k_w + at.k_x) * args.chunks.divisor + at.chunk;
        entry.x = (at.k_y * t.patch_w + at.k_x * t.phases) * pitch + at.chunk * 16;
        entry.y = (args.resident ? slot : e % args.group) * 16;
      }
      table[e] = entry;
    }
    for (int p = thread; p < kTile; p += threads) {
      const PatchPosition at = patch_position(args.tile, p);
      const bool inside = p < args.tile.pixels.divisor && tile.y + at.y < g.h_dst &&
                          tile.x + at.x < g.w_dst && at.phase < tile.phases;
      offsets[p] = inside ? at.y * args.s_dst.h + at.x * args.s_dst.w : -1;
    }

    float sum[kRowsM][kColumns][4] = {};
    for (int first = 0; first < count; first += args.group) {
      const int end = min(count, first + args.group);
      if (!args.resident) {
        if (first > 0) {
          __syncthreads();  // the previous group has been read
        }
        load_weights<T, kPlanes>(args, list, first, end - first, weights);
      }
      __syncthreads();  // pixels, table and weights are written
      for (int step = first; step < end; step += 2) {
        const int at_m = table[step + lane / 16].x;
        const int at_n = table[step + lane / 8 % 2].y;
        uint32_t b[kPlanes][kColumns][2];
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
          const auto plane = static_cast<uint32_t>(p * args.layout.weights);
#pragma unroll
          for (int j = 0; j + 1 < kColumns; j += 2) {
            uint32_t pair[4];
            ptx::ldmatrix<4>(pair, row_n + 8 * j * pitch_w + at_n + plane);
            b[p][j][0] = pair[0];
            b[p][j][1] = pair[1];
            b[p][j + 1][0] = pair[2];
            b[p][j + 1][1] = pair[3];
          }
          if constexpr (kColumns % 2 == 1) {
            ptx::ldmatrix<2>(b[p][kColumns - 1], row_last + at_n + plane);
          }
        }
#pragma unroll
        for (int m = 0; m < kRowsM; ++m) {
          uint32_t a[kPlanes][4];
#pragma unroll
          for (int p = 0; p < kPlanes; ++p) {
            const auto plane = static_cast<uint32_t>(p * args.layout.plane);
            ptx::ldmatrix<4>(a[p], at_m < 0 ? zero_row : row_m[m] + at_m + plane);
          }
          multiply<T, kPlanes, kColumns>(sum[m], a, b);
        }
      }
    }

    // To memory by way of shared memory, where the tile lies as it will in memory.
    __syncthreads();  // the pixels have been read
    auto* stage = reinterpret_cast<T*>(pixels);
    const int stage_pixel = args.dst_inner ? g.c_dst : 1;
    const int stage_channel = args.dst_inner ? 1 : kStagePitch<T, kPlanes>;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int channel = (warp_n * kColumns + j) * 8 + lane % 4 * 2 + v;
        if (channel < g.c_dst) {
          const float bias = args.bias == nullptr ? 0.0f : load(args.bias + channel);
#pragma unroll
          for (int m = 0; m < kRowsM; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const int pixel = (warp_m * kRowsM + m) * kPatchStep + half * 8 + lane / 4;
              float value = sum[m][j][half * 2 + v] + bias;
              value = args.relu && value <= 0.0f ? 0.0f : value;  // nan stays nan
              store(stage + pixel * stage_pixel + channel * stage_channel, value);
            }
          }
        }
      }
    }
    __syncthreads();  // the tile is staged, and its offsets are written
    T* dst =
        args.dst + int64_t{tile.n} * args.s_dst.n + tile.y * args.s_dst.h + tile.x * args.s_dst.w;
    if (args.dst_inner) {
      int pixel = thread / g.c_dst;
      int channel = thread % g.c_dst;
      const int step_pixel = threads / g.c_dst;
      const int step_channel = threads % g.c_dst;
      while (pixel < kTile) {
        if (offsets[pixel] >= 0) {
          dst[offsets[pixel] + channel] = stage[pixel * g.c_dst + channel];
        }
        channel += step_channel;
        pixel += step_pixel;
        if (channel >= g.c_dst) {
          channel -= g.c_dst;
          ++pixel;
        }
      }
    } else {
      for (int e = thread; e < kTile * g.c_dst; e += threads) {
        const int pixel = e % kTile;
        const int channel = e / kTile;
        if (offsets[pixel] >= 0) {
          dst[offsets[pixel] + channel * args.s_dst.c] = stage[channel * stage_channel + pixel];
        }
      }
    }
  }
}

template <class T, int kPlanes>
cudaError_t launch_forward(const PatchForwardArgs<T>& args, const PatchPlan& plan, Stream stream) {
  const auto kernel = plan.columns == 3 ? dilated_conv2d_patch_kernel<T, kPlanes, 3>
                                        : dilated_conv2d_patch_kernel<T, kPlanes, 6>;
  const auto threads = static_cast<unsigned>(32 * kPatchWarps * plan.warps_n);
  return launch(kernel, plan.blocks, threads, plan.shared_bytes, stream, args);
}

// `weight` at tap (0, 0) of the sum, with the strides of that sum.
struct PatchWeight {
  const void* data;
  int64_t n, c, h, w;
};

template <class T, int kPlanes>
cudaError_t launch_planes(const PatchGeometry& g,
                          const void* src,
                          const Strides4& s_src,
                          const PatchWeight& weight,
                          int64_t weight_offset,
                          const void* bias,
                          void* dst,
                          const Strides4& s_dst,
                          bool relu,
                          const PatchPlan& plan,
                          Stream stream) {
  PatchForwardArgs<T> args{};
  args.g = g;
  args.t = plan.tiling;
  args.layout = patch::forward_layout(g,
                                      plan.tiling,
                                      plan.planes,
                                      plan.chunks,
                                      8 * plan.columns * plan.warps_n,
                                      plan.group,
                                      sizeof(T));
  args.src = patch_source<T>(src, s_src, g.c_src, g.h_src, g.w_src);
  args.weight = static_cast<const patch_raw_t<T>*>(weight.data) + weight_offset;
  args.weight_n = weight.n;
  args.weight_c = weight.c;
  args.weight_h = weight.h;
  args.weight_w = weight.w;
  args.bias = static_cast<const T*>(bias);
  args.dst = static_cast<T*>(dst);
  args.s_dst = s_dst;
  args.rows_n = 8 * plan.columns * plan.warps_n;
  args.patch = patch_rows_of(
      g, args.t, args.t.patch_h, args.t.patch_w, plan.chunks, args.layout.pitch, args.layout.plane);
  args.tile = patch_rows_of(g, args.t, args.t.tile_h, args.t.tile_w, 1, 0, 0);
  args.chunks = patch_divider(plan.chunks);
  args.slots = patch_divider(plan.group + 1);
  args.group = plan.group;
  args.resident = plan.resident;
  args.dst_inner = patch::channels_inner(s_dst, g.c_dst);
  args.relu = relu;
  return launch_forward<T, kPlanes>(args, plan, stream);
}

}  // namespace

Status launch_patch(const DilatedConv2dParams& p, const PatchPlan& plan, Stream stream) {
  return dispatch_patch(p.dtype, plan.planes, [&]<class T, int kPlanes>() {
    const Strides4& s = p.weight_strides;
    return launch_planes<T, kPlanes>(patch::geometry(p.shape),
                                     p.input,
                                     p.input_strides,
                                     {p.weight, s.n, s.c, s.h, s.w},
                                     0,
                                     p.bias,
                                     p.output,
                                     p.output_strides,
                                     p.relu,
                                     plan,
                                     stream);
  });
}

Status launch_patch(const DilatedConv2dGradInputParams& p, const PatchPlan& plan, Stream stream) {
  return dispatch_patch(p.dtype, plan.planes, [&]<class T, int kPlanes>() {
    const PatchGeometry g = patch::reversed(patch::geometry(p.shape));
    const Strides4& s = p.weight_strides;
    return launch_planes<T, kPlanes>(g,
                                     p.grad_output,
                                     p.grad_output_strides,
                                     {p.weight, s.c, s.n, -s.h, -s.w},
                                     (g.k_h - 1) * s.h + (g.k_w - 1) * s.w,
                                     nullptr,
                                     p.grad_input,
                                     p.grad_input_strides,
                                     false,
                                     plan,
                                     stream);
  });
}

}  // namespace dilseg::cuda
