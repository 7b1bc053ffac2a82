// SPDX-License-Identifier: Apache-2.0
//
// Gradients of a stride-1 convolution of at most 96 to at most 96 channels with respect to weight
// and bias, on tensor cores (mma.sync, sm_80):
//   grad_weight[o, c, i, j] = sum_{n, y, x} grad_output[n, o, y, x] *
//                                 input[n, c, y - pad_top + i*dil_h, x - pad_left + j*dil_w]
//   grad_bias[o]            = sum_{n, y, x} grad_output[n, o, y, x]
// Layouts: any strides. The product has m = o, n = (tap, channel) and k = pixels. One block owns up
// to 48 o, a share of the columns (tap, 8 channels), at most 31 of them, and every splits-th tile
// of 128 pixels (patch.h). Both tensors lie in shared memory as rows of channel chunks, one row per
// pixel, and are transposed by ldmatrix; a column's row addresses are those of the pixels that its
// tap meets. grad_bias is one column more, whose row is (1, 0, ..., 0) for every pixel. A block
// writes its sums to the workspace, [split][o][tap][c], and a second kernel adds the splits in a
// fixed order: no atomics, bitwise repeatable. Flops: 2 * pixels * (c_out padded to 16) * (taps *
// c_in padded to 8). Bytes: both tensors once per group of o or columns (1 of 3x3 up to 24
// channels, 8 at 84), the workspace twice. Limits: patch.h; 64-bit offsets to a tile and between
// its rows.
#include "cuda/dilated_conv2d/patch.cuh"

namespace dilseg::cuda {
namespace {

constexpr int kPairs = kPatchGradColumns / 2;  // of columns; ldmatrix loads two at a time

// Blocks of an SM: the sums and parts of split floats need more than half of its registers.
template <int kPlanes>
constexpr int kBlocks = kPlanes == 1 ? 2 : 1;

template <class T>
struct PatchGradArgs {
  PatchGeometry g;
  PatchTiling t;
  patch::GradLayout layout;
  PatchSource<patch_raw_t<T>> src, dst;
  PatchRows patch, tile;
  float* partial;
  int chunks, taps, chunks_dst;
  int groups_m, groups_c, groups_t, splits;
  bool bias;
};

// Sums of one o in the workspace: [tap][c_src], then the bias's.
__host__ __device__ __forceinline__ int patch_sums(const PatchGeometry& g, bool bias) {
  return g.k_h * g.k_w * g.c_src + (bias ? 1 : 0);
}

// A column of the block's product: a tap and a chunk of channels, the ones, or nothing.
enum class PatchColumnKind { kTap, kOnes, kNone };
struct PatchColumn {
  PatchColumnKind kind;
  int k_y, k_x, chunk;  // of the block's
};

template <class T, int kPlanes>
__global__ void __launch_bounds__(kPatchGradThreads, kBlocks<kPlanes>)
    dilated_conv2d_patch_grad_weight_kernel(PatchGradArgs<T> args) {
  const PatchGeometry& g = args.g;
  const PatchTiling& t = args.t;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  const int warp = thread / 32;

  int rest = static_cast<int>(blockIdx.x);
  const int first_tap = patch_part(rest, args.groups_t) * args.taps;
  const int first_chunk = patch_part(rest, args.groups_c) * args.chunks;
  const int first_o = patch_part(rest, args.groups_m) * kPatchGradChannels;
  const int split = rest;
  const int taps = min(args.taps, g.k_h * g.k_w - first_tap);
  const int chunks = min(args.chunks, (g.c_src + kPatchChunk - 1) / kPatchChunk - first_chunk);
  const int rows_o = (min(kPatchGradChannels, g.c_dst - first_o) + kPatchStep - 1) / kPatchStep;
  const bool bias = args.bias && first_tap == 0 && first_chunk == 0;
  // Pair i of this warp.
  const auto column = [&](int i, int second) {
    const int c = 2 * (i * kPatchGradWarps + warp) + second;
    if (c >= taps * chunks) {
      return PatchColumn{
          bias && c == taps * chunks ? PatchColumnKind::kOnes : PatchColumnKind::kNone, 0, 0, 0};
    }
    const int tap = first_tap + c / chunks;
    return PatchColumn{PatchColumnKind::kTap, tap / g.k_w, tap % g.k_w, c % chunks};
  };

  auto* shared = dynamic_shared<unsigned char>();
  unsigned char* pixels_dst = shared;
  unsigned char* pixels_src = shared + args.layout.src;
  auto* constants = reinterpret_cast<uint16_t*>(shared + args.layout.constants);
  int* rows = reinterpret_cast<int*>(shared + args.layout.rows);
  const int pitch_dst = args.layout.pitch_dst;
  const int pitch_src = args.layout.pitch_src;
  const int tile_pixels = t.tile_h * t.tile_w;
  const int steps = (tile_pixels + kPatchStep - 1) / kPatchStep;

  if (thread < 2 * kPatchChunk) {
    constexpr uint16_t kOne = std::is_same_v<T, __half> ? 0x3c00 : 0x3f80;
    constants[thread] = thread == 0 ? kOne : 0;
  }
  for (int p = thread; p < kPatchGradPixels; p += kPatchGradThreads) {
    const int row = p / t.tile_w;
    rows[p] = p < tile_pixels ? (row * t.patch_w + p - row * t.tile_w) * pitch_src : 0;
  }
  // Pixels that no tile has count as zero.
  for (int i = thread; i < (kPatchGradPixels - tile_pixels) * args.chunks_dst;
       i += kPatchGradThreads) {
    const patch_raw_t<T> zero[kPatchChunk] = {};
    store_chunk<kPlanes>(
        pixels_dst + (tile_pixels + i / args.chunks_dst) * pitch_dst + i % args.chunks_dst * 16,
        args.layout.plane_dst,
        zero);
  }

  // This lane's rows for ldmatrix: the second matrix along k is the third of a, the second of b.
  const int k_a = lane % 8 + lane / 16 * 8;
  const int k_b = lane % 16;
  const uint32_t row_a = ptx::shared_address(pixels_dst) + k_a * pitch_dst + lane / 8 % 2 * 16;
  const uint32_t ones = ptx::shared_address(constants);
  const uint32_t zeros = ones + 16;
  uint32_t row_b[kPairs];
  bool is_tap[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    const PatchColumn c = column(i, lane / 16);
    is_tap[i] = c.kind == PatchColumnKind::kTap;
    row_b[i] = is_tap[i] ? ptx::shared_address(pixels_src) +
                               (c.k_y * t.patch_w + c.k_x * t.phases) * pitch_src + c.chunk * 16
               : c.kind == PatchColumnKind::kOnes ? ones
                                                  : zeros;
  }

  float sum[kPatchGradRows][kPairs][2][4] = {};
  const int tiles = static_cast<int>(t.tiles);
  for (int i = split; i < tiles; i += args.splits) {
    const PatchTile tile = patch_tile(g, t, i);
    const int y = tile.y - g.pad_top;
    const int x = tile.x - g.pad_left;
    const TapRange taps_h = meeting_taps(y, t.tile_h, 1, g.dil_h, g.h_src, g.k_h);
    const TapRange taps_w = meeting_taps(x, t.tile_x, t.phases, g.dil_w, g.w_src, g.k_w);
    bool needed[kPairs];
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      needed[p] = false;
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const PatchColumn c = column(p, second);
        needed[p] |= c.kind == PatchColumnKind::kOnes ||
                     (c.kind == PatchColumnKind::kTap && c.k_y >= taps_h.begin &&
                      c.k_y < taps_h.end && c.k_x >= taps_w.begin && c.k_x < taps_w.end);
      }
    }

    __syncthreads();  // the previous tile has been read
    load_pixels<kPlanes>(args.dst,
                         args.tile,
                         tile.n,
                         tile.y,
                         tile.x,
                         tile.phases,
                         first_o / kPatchChunk,
                         pixels_dst);
    load_pixels<kPlanes>(args.src, args.patch, tile.n, y, x, INT_MAX, first_chunk, pixels_src);
    __syncthreads();  // pixels, and at first the tables, are written

    for (int step = 0; step < steps; ++step) {
      const uint32_t at_a = row_a + step * kPatchStep * pitch_dst;
      const int at_b = rows[step * kPatchStep + k_b];
      uint32_t a[kPatchGradRows][kPlanes][4];
#pragma unroll
      for (int m = 0; m < kPatchGradRows; ++m) {
        if (m < rows_o) {
#pragma unroll
          for (int p = 0; p < kPlanes; ++p) {
            ptx::ldmatrix<4, true>(
                a[m][p], at_a + m * 32 + static_cast<uint32_t>(p * args.layout.plane_dst));
          }
        }
      }
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        if (needed[pair]) {
          uint32_t b[kPlanes][2][2];
#pragma unroll
          for (int p = 0; p < kPlanes; ++p) {
            // The later parts of 1 are 0.
            const uint32_t constant = p == 0 ? row_b[pair] : zeros;
            const uint32_t row =
                is_tap[pair] ? row_b[pair] + at_b + static_cast<uint32_t>(p * args.layout.plane_src)
                             : constant;
            uint32_t both[4];
            ptx::ldmatrix<4, true>(both, row);
            b[p][0][0] = both[0];
            b[p][0][1] = both[1];
            b[p][1][0] = both[2];
            b[p][1][1] = both[3];
          }
#pragma unroll
          for (int m = 0; m < kPatchGradRows; ++m) {
            if (m < rows_o) {
              multiply<T, kPlanes, 2>(sum[m][pair], a[m], b);
            }
          }
        }
      }
    }
  }

  const int width = patch_sums(g, args.bias);
  float* partial = args.partial + int64_t{split} * g.c_dst * width;
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair) {
#pragma unroll
    for (int second = 0; second < 2; ++second) {
      const PatchColumn c = column(pair, second);
#pragma unroll
      for (int m = 0; m < kPatchGradRows; ++m) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const int o = first_o + m * kPatchStep + lane / 4 + v / 2 * 8;
          const int in_chunk = lane % 4 * 2 + v % 2;
          const int channel = (first_chunk + c.chunk) * kPatchChunk + in_chunk;
          if (o >= g.c_dst) {
            continue;
          }
          float* to = partial + static_cast<int64_t>(o) * width;
          if (c.kind == PatchColumnKind::kTap && channel < g.c_src) {
            to[(c.k_y * g.k_w + c.k_x) * g.c_src + channel] = sum[m][pair][second][v];
          } else if (c.kind == PatchColumnKind::kOnes && in_chunk == 0) {
            to[width - 1] = sum[m][pair][second][v];
          }
        }
      }
    }
  }
}

template <class T>
struct PatchSumArgs {
  PatchGeometry g;
  const float* partial;
  int64_t splits;
  T* grad_weight;
  Strides4 strides;
  T* grad_bias;
};

// Adds the splits: lanes own neighbouring sums, slices of the block every 8th split, and the slices
// are added in their order.
template <class T>
__global__ void __launch_bounds__(kPatchSumThreads)
    dilated_conv2d_patch_sum_kernel(PatchSumArgs<T> args) {
  constexpr int kSlices = kPatchSumThreads / kPatchSumLanes;
  const PatchGeometry& g = args.g;
  const int lane = static_cast<int>(threadIdx.x) % kPatchSumLanes;
  const int slice = static_cast<int>(threadIdx.x) / kPatchSumLanes;
  const int width = patch_sums(g, args.grad_bias != nullptr);
  const int count = g.c_dst * width;
  auto* slices = dynamic_shared<float>();

  const int i = static_cast<int>(blockIdx.x) * kPatchSumLanes + lane;
  float sum = 0;
  if (i < count) {
#pragma unroll 8
    for (int64_t split = slice; split < args.splits; split += kSlices) {
      sum += args.partial[split * count + i];
    }
  }
  slices[threadIdx.x] = sum;
  __syncthreads();  // the slices are written
  if (slice != 0 || i >= count) {
    return;
  }
  sum = 0;
  for (int s = 0; s < kSlices; ++s) {
    sum += slices[s * kPatchSumLanes + lane];
  }
  const int o = i / width;
  const int rest = i - o * width;
  const int tap = rest / g.c_src;
  if (tap == g.k_h * g.k_w) {
    store(args.grad_bias + o, sum);
  } else {
    store(args.grad_weight + o * args.strides.n + (rest - tap * g.c_src) * args.strides.c +
              tap / g.k_w * args.strides.h + tap % g.k_w * args.strides.w,
          sum);
  }
}

template <class T, int kPlanes>
cudaError_t launch_grad(const DilatedConv2dGradWeightParams& p,
                        const PatchPlan& plan,
                        Stream stream) {
  const PatchGeometry g = patch::geometry(p.shape);
  const bool bias = p.grad_bias != nullptr;
  PatchGradArgs<T> args{};
  args.g = g;
  args.t = plan.tiling;
  args.chunks = plan.chunks;
  args.taps = plan.taps;
  args.chunks_dst = patch::grad_chunks_dst(g);
  args.layout = patch::grad_layout(plan.tiling, kPlanes, plan.chunks, args.chunks_dst);
  args.src = patch_source<T>(p.input, p.input_strides, g.c_src, g.h_src, g.w_src);
  args.dst = patch_source<T>(p.grad_output, p.grad_output_strides, g.c_dst, g.h_dst, g.w_dst);
  args.patch = patch_rows_of(g,
                             args.t,
                             args.t.patch_h,
                             args.t.patch_w,
                             plan.chunks,
                             args.layout.pitch_src,
                             args.layout.plane_src);
  args.tile = patch_rows_of(g,
                            args.t,
                            args.t.tile_h,
                            args.t.tile_w,
                            args.chunks_dst,
                            args.layout.pitch_dst,
                            args.layout.plane_dst);
  args.partial = static_cast<float*>(p.workspace);
  args.groups_m = static_cast<int>(plan.groups_m);
  args.groups_c = static_cast<int>(plan.groups_c);
  args.groups_t = static_cast<int>(plan.groups_t);
  args.splits = static_cast<int>(plan.splits);
  args.bias = bias;
  const cudaError_t status = launch(dilated_conv2d_patch_grad_weight_kernel<T, kPlanes>,
                                    plan.blocks,
                                    kPatchGradThreads,
                                    plan.shared_bytes,
                                    stream,
                                    args);
  if (status != cudaSuccess) {
    return status;
  }
  const PatchSumArgs<T> sums{g,
                             args.partial,
                             plan.splits,
                             static_cast<T*>(p.grad_weight),
                             p.grad_weight_strides,
                             static_cast<T*>(p.grad_bias)};
  return launch(dilated_conv2d_patch_sum_kernel<T>,
                grid_for(int64_t{g.c_dst} * patch_sums(g, bias), kPatchSumLanes),
                kPatchSumThreads,
                kPatchSumThreads * sizeof(float),
                stream,
                sums);
}

}  // namespace

Status launch_patch(const DilatedConv2dGradWeightParams& p, const PatchPlan& plan, Stream stream) {
  return dispatch_patch(p.dtype, plan.planes, [&]<class T, int kPlanes>() {
    return launch_grad<T, kPlanes>(p, plan, stream);
  });
}

}  // namespace dilseg::cuda
