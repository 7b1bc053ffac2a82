// SPDX-License-Identifier: Apache-2.0
//
// Weight gradient of the convolution on the tensor cores of sm_80 and newer:
//   grad_weight[o, c, i, j] = sum_{n, y, x} grad_output[n, o, y, x] *
//       input[n, g*group_in + c, y*stride_h - pad_top + i*dil_h, x*stride_w - pad_left + j*dil_w]
// For every group and tap a product of matrices, c_out x c_in of the group, summed over the pixels
// whose window meets the map at that tap: a rectangle of every image, so padding costs nothing.
// Layouts: both tensors packed (pack.h), by a pass before where they are not; the weight in any
// strides. One block owns a tile of one tap's matrix and one part ("split") of its pixels. A
// pipeline of four stages brings in chunks of 16 bytes by cp.async, [pixel][channel] for both
// operands, which ldmatrix.trans (or 4-byte loads) turns into fragments. A thread copies from one
// pixel of every stage and walks to its next one without a division.
// Sums are float. They go to the workspace, [split][group][tap][o][c], and a second kernel adds the
// splits in their order, turns the tap inwards and rounds once: no atomics, the same bits every
// run. Where there is one split and the weight has c innermost the first kernel writes it itself:
// a large weight is several times the size of what else is moved.
// Flops: 2 per weight and pixel of its rectangle, tiles filled up. Bytes: tiles of 128 (64) read
// each operand c / 128 (64) times per tap, mostly from the cache; partial sums 8 per weight and
// split. Limits: see plan_gemm; offsets inside an image are 32-bit, everything else 64-bit.
// Source: the multistage GEMM with split k of CUTLASS, its iterators replaced by the rectangle.
#include "cuda/dilated_conv2d/direct.cuh"
#include "cuda/dilated_conv2d/gemm_grad_weight.h"
#include "cuda/dilated_conv2d/mma_tile.cuh"
#include "cuda/dilated_conv2d/pixel_walk.cuh"

#include <type_traits>

namespace dilseg::cuda {
namespace {

constexpr int kStages = kGradWeightStages;

// A packed tensor; axes of size 1 have stride 0.
template <class T>
struct Operand {
  const T* data;
  int64_t image;
  int row, pixel;
};

template <class T>
struct GradWeightArgs {
  DirectShape s;
  Operand<T> grad_output, input;
  int tiles_m, tiles_n;
  int splits;
  float* partials;  // null: the sums go to grad_weight
  GradWeightPartials layout;
  T* grad_weight;
  Strides4 s_grad_weight;
};

// Takes the remainder of `i` by `extent` off.
__device__ __forceinline__ int take(unsigned& i, int extent) {
  const auto divisor = static_cast<unsigned>(extent);
  const unsigned quotient = i / divisor;
  const unsigned remainder = i - quotient * divisor;
  i = quotient;
  return static_cast<int>(remainder);
}

// How a block's threads share the chunks of one operand's tile: neighbouring threads take one
// pixel's chunks.
template <class Shape>
struct Copies {
  using T = typename Shape::T;
  using Tile = StagedTile<T, Shape::kM, false>;
  static_assert(Shape::kM == Shape::kN);
  static constexpr int kLanes = Shape::kThreads / kStageK<T>;  // of one pixel
  static constexpr int kCount = Tile::kRowChunks / kLanes;     // of one thread
  static_assert(kLanes * kStageK<T> == Shape::kThreads && kLanes * kCount == Tile::kRowChunks);

  // Eight threads write 128 bytes. Where they cover two pixels these lie four rows apart, which the
  // swizzle sends to different banks.
  static __device__ __forceinline__ int row() {
    const int i = threadIdx.x / kLanes;
    if constexpr (kLanes == 4) {
      return (i & ~7) | (i & 1) << 2 | (i >> 1 & 3);
    } else {
      return i;
    }
  }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % kLanes; }

  // Copies this thread's chunks of a pixel whose first channel is at `from`; `channels` are left
  // from its first chunk on, what lies beyond them becomes zero.
  static __device__ __forceinline__ void issue(unsigned char* tile, const T* from, int channels) {
    const uint32_t to = ptx::shared_address(tile);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = chunk() + i * kLanes;
      const int valid = min(max(channels - i * kLanes * kChunk<T>, 0), kChunk<T>);
      ptx::cp_async_cg(to + Tile::at(row(), at),
                       valid > 0 ? from + at * kChunk<T> : from,
                       valid * static_cast<int>(sizeof(T)));
    }
  }
};

// What a block computes: blocks that run together share pixels, then channels of grad_output, then
// shifted input.
struct Place {
  int n, tap, m, group, split;
  int tap_y, tap_x;
};

template <class Shape, class T>
__device__ __forceinline__ Place place_of(unsigned block, const GradWeightArgs<T>& a) {
  Place at;
  at.n = take(block, a.tiles_n) * Shape::kN;
  at.tap = take(block, a.s.k_h * a.s.k_w);
  at.m = take(block, a.tiles_m) * Shape::kM;
  at.group = take(block, a.s.c_in / a.s.group_in);
  at.split = static_cast<int>(block);
  at.tap_y = at.tap / a.s.k_w;
  at.tap_x = at.tap - at.tap_y * a.s.k_w;
  return at;
}

template <class Shape, int kBlocks>
__global__ void __launch_bounds__(Shape::kThreads, kBlocks)
    dilated_conv2d_grad_weight_gemm_kernel(GradWeightArgs<typename Shape::T> a) {
  using T = typename Shape::T;
  using Product = BlockProduct<Shape, false, false>;
  using Copy = Copies<Shape>;
  constexpr int kK = kStageK<T>;
  const DirectShape& s = a.s;
  const Place at = place_of<Shape>(blockIdx.x, a);
  const int shift_y = at.tap_y * s.dil_h;
  const int shift_x = at.tap_x * s.dil_w;
  const Range rows = meeting(shift_y, s.stride_h, s.pad_top, s.h_in, s.h_out);
  const Range columns = meeting(shift_x, s.stride_w, s.pad_left, s.w_in, s.w_out);
  const int64_t pixels = s.n * (rows.end - rows.begin) * (columns.end - columns.begin);
  const int64_t all = ceil_div(pixels, kK);
  const int64_t first = all * at.split / a.splits;
  const int steps = static_cast<int>(all * (at.split + 1) / a.splits - first);

  const T* const grad_output = a.grad_output.data + at.group * s.group_out + at.m;
  const T* const input = a.input.data + at.group * s.group_in + at.n;
  const int left_m = s.group_out - at.m - Copy::chunk() * kChunk<T>;
  const int left_n = s.group_in - at.n - Copy::chunk() * kChunk<T>;
  unsigned char* const stages = dynamic_shared<unsigned char>();
  PixelWalk<int> pixel(static_cast<int>(s.n), rows, columns, first * kK + Copy::row(), kK);

  const auto fill = [&](int stage) {
    unsigned char* const to = stages + stage * Product::kStageBytes;
    const T* from_output = grad_output;
    const T* from_input = input;
    const bool inside = !pixel.done();
    if (inside) {
      const int y = pixel.y * s.stride_h - s.pad_top + shift_y;
      const int x = pixel.x * s.stride_w - s.pad_left + shift_x;
      from_output += pixel.n * a.grad_output.image +
                     (pixel.y * a.grad_output.row + pixel.x * a.grad_output.pixel);
      from_input += pixel.n * a.input.image + (y * a.input.row + x * a.input.pixel);
    }
    Copy::issue(to, from_output, inside ? left_m : 0);
    Copy::issue(to + Product::TileA::kBytes, from_input, inside ? left_n : 0);
    pixel.next();
  };

#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) {
      fill(stage);
    }
    ptx::cp_async_commit();
  }
  Product product;
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    // Everybody's copies of this stage have landed, and nobody reads the previous one any more.
    __syncthreads();
    if (step + kStages - 1 < steps) {
      fill((step + kStages - 1) % kStages);
    }
    ptx::cp_async_commit();
    product.add(stages + step % kStages * Product::kStageBytes);
    product.promote(step + 1);
  }

  // Worked out again: kept, it would cost the loop its last registers.
  const Place to = place_of<Shape>(ptx::opaque(blockIdx.x), a);
  const int64_t matrix = static_cast<int64_t>(to.split) * (s.c_in / s.group_in) + to.group;
  const int64_t first_row = (matrix * (s.k_h * s.k_w) + to.tap) * s.group_out + to.m;
  const Strides4& strides = a.s_grad_weight;
  T* const weight = a.grad_weight + (to.group * s.group_out + to.m) * strides.n + to.n * strides.c +
                    to.tap_y * strides.h + to.tap_x * strides.w;
  product.finish([&](int m, int n, const float (&sums)[2]) {
    if (to.m + m >= s.group_out || to.n + n >= s.group_in) {
      return;
    }
    if (a.partials != nullptr) {
      *reinterpret_cast<float2*>(a.partials + (first_row + m) * a.layout.pitch + to.n + n) =
          make_float2(sums[0], sums[1]);
      return;
    }
    T* const pair = weight + m * strides.n + n * strides.c;
    store(pair, sums[0]);
    if (to.n + n + 1 < s.group_in) {
      store(pair + strides.c, sums[1]);
    }
  });
}

// ---- adding the splits --------------------------------------------------------------------------

constexpr int kSumThreads = 256;
constexpr int kSumValues = 2048;  // of a tile, about

// A block owns `taps` x `channels` weights of one output channel: it reads them along the channels
// and writes them as the weight lies in memory.
struct SumTile {
  int taps, channels;
  int pitch;  // floats from channel to channel in shared memory, odd
  int64_t tap_tiles, channel_tiles;
};

SumTile plan_sum(const DilatedConv2dShape& s) {
  constexpr int64_t kMostTaps = 64;
  const int64_t taps = s.k_h * s.k_w;
  const int64_t group_in = s.c_in / s.groups;
  SumTile tile{};
  tile.tap_tiles = ceil_div(taps, kMostTaps);
  tile.taps = static_cast<int>(ceil_div(taps, tile.tap_tiles));
  tile.channel_tiles = ceil_div(group_in, std::max(kWarpLanes, kSumValues / tile.taps));
  tile.channels = static_cast<int>(ceil_div(group_in, tile.channel_tiles));
  tile.pitch = tile.taps | 1;
  return tile;
}

template <class T>
__global__ void __launch_bounds__(kSumThreads)
    dilated_conv2d_grad_weight_sum_kernel(GradWeightArgs<T> a, SumTile tile) {
  const DirectShape& s = a.s;
  float* const turned = dynamic_shared<float>();
  const int64_t tiles = tile.tap_tiles * tile.channel_tiles * s.c_out;
  const int taps = s.k_h * s.k_w;
  for (int64_t block = blockIdx.x; block < tiles; block += gridDim.x) {
    int64_t i = block;
    const int first_tap = split(i, static_cast<int>(tile.tap_tiles)) * tile.taps;
    const int first_channel = split(i, static_cast<int>(tile.channel_tiles)) * tile.channels;
    const int out = static_cast<int>(i);
    const int group = out / s.group_out;
    const int these_taps = min(tile.taps, taps - first_tap);
    const int channels = min(tile.channels, s.group_in - first_channel);
    const int values = these_taps * channels;

    const float* const from = a.partials +
                              ((static_cast<int64_t>(group) * taps + first_tap) * s.group_out +
                               (out - group * s.group_out)) *
                                  a.layout.pitch +
                              first_channel;
    for (int k = threadIdx.x; k < values; k += kSumThreads) {
      const int tap = k / channels;
      const int c = k - tap * channels;
      const float* part = from + static_cast<int64_t>(tap) * s.group_out * a.layout.pitch + c;
      float sum = 0;
#pragma unroll 8
      for (int p = 0; p < a.splits; ++p) {
        sum += *part;
        part += a.layout.elements;
      }
      turned[c * tile.pitch + tap] = sum;
    }
    __syncthreads();  // the tile is whole before it is read across
    const bool along_channels = a.s_grad_weight.c == 1;
    for (int k = threadIdx.x; k < values; k += kSumThreads) {
      const int outer = k / (along_channels ? channels : these_taps);
      const int inner = k - outer * (along_channels ? channels : these_taps);
      const int c = along_channels ? inner : outer;
      const int tap = along_channels ? outer : inner;
      const int tap_y = (first_tap + tap) / s.k_w;
      const int tap_x = first_tap + tap - tap_y * s.k_w;
      store(a.grad_weight + out * a.s_grad_weight.n + (first_channel + c) * a.s_grad_weight.c +
                tap_y * a.s_grad_weight.h + tap_x * a.s_grad_weight.w,
            turned[c * tile.pitch + tap]);
    }
    __syncthreads();  // all have read before the next tile is written
  }
}

template <class T>
cudaError_t launch_sum(const GradWeightArgs<T>& a, const DilatedConv2dShape& s, Stream stream) {
  const SumTile tile = plan_sum(s);
  return launch(dilated_conv2d_grad_weight_sum_kernel<T>,
                grid_for(tile.tap_tiles * tile.channel_tiles * s.c_out, 1),
                kSumThreads,
                sizeof(float) * static_cast<size_t>(tile.channels) * tile.pitch,
                stream,
                a,
                tile);
}

// ---- launching ----------------------------------------------------------------------------------

// All but the operands and their tiles.
template <class T>
GradWeightArgs<T> arguments(const DilatedConv2dGradWeightParams& p, int splits, float* partials) {
  GradWeightArgs<T> a{};
  a.s = direct_shape(p.shape);
  a.splits = splits;
  a.partials = partials;
  a.layout = grad_weight_partials(p.shape);
  a.grad_weight = static_cast<T*>(p.grad_weight);
  a.s_grad_weight = p.grad_weight_strides;
  return a;
}

template <class T>
Operand<T> operand(const void* data, const Strides4& strides, const Sizes4& s) {
  const auto step = [](int64_t size, int64_t stride) {
    return size > 1 ? static_cast<int>(stride) : 0;
  };
  return {static_cast<const T*>(data), strides.n, step(s.h, strides.h), step(s.w, strides.w)};
}

// The tensor as it is, or packed to `to`.
template <class T>
cudaError_t pack_operand(Operand<T>& result,
                         bool pack,
                         const void* data,
                         const Strides4& strides,
                         const Sizes4& s,
                         Dtype dtype,
                         void* to,
                         Stream stream) {
  if (!pack) {
    result = operand<T>(data, strides, s);
    return cudaSuccess;
  }
  result = operand<T>(to, packed_strides(s, dtype), s);
  return static_cast<cudaError_t>(launch_pack(data, strides, s, dtype, to, stream));
}

template <class Math, GemmTile kTile, int kWarpM, int kWarpN>
cudaError_t launch_tile(GradWeightArgs<typename Math::T>& a, Stream stream) {
  constexpr int kSize = gemm_tile_size(kTile);
  using Shape = TileShape<Math, kSize, kSize, kWarpM, kWarpN>;
  constexpr int kBlocks = grad_weight_blocks(kTile, Math::kPromotes);
  constexpr int kBytes = kStages * BlockProduct<Shape, false, false>::kStageBytes;
  static_assert(kBytes == grad_weight_shared_bytes(kTile));
  const auto kernel = dilated_conv2d_grad_weight_gemm_kernel<Shape, kBlocks>;
  a.tiles_m = static_cast<int>(ceil_div(a.s.group_out, kSize));
  a.tiles_n = static_cast<int>(ceil_div(a.s.group_in, kSize));
  const int64_t tiles =
      static_cast<int64_t>(a.s.c_in / a.s.group_in) * a.s.k_h * a.s.k_w * a.tiles_m * a.tiles_n;
  return launch(kernel, grid_for(tiles * a.splits, 1), Shape::kThreads, kBytes, stream, a);
}

template <class Math>
cudaError_t launch_math(const DilatedConv2dGradWeightParams& p,
                        const GemmPlan& plan,
                        Stream stream) {
  using T = typename Math::T;
  auto* const workspace = static_cast<unsigned char*>(p.workspace);
  const GradWeightSpace space = grad_weight_space(p, plan);
  const bool direct = grad_weight_is_direct(p, plan.splits);
  auto a = arguments<T>(
      p, plan.splits, direct ? nullptr : reinterpret_cast<float*>(workspace + space.partials));
  cudaError_t status = pack_operand(a.grad_output,
                                    plan.pack_grad_output,
                                    p.grad_output,
                                    p.grad_output_strides,
                                    output_sizes(p.shape),
                                    p.dtype,
                                    workspace + space.grad_output,
                                    stream);
  if (status == cudaSuccess) {
    status = pack_operand(a.input,
                          plan.pack_input,
                          p.input,
                          p.input_strides,
                          input_sizes(p.shape),
                          p.dtype,
                          workspace + space.input,
                          stream);
  }
  if (status == cudaSuccess) {
    // Two sets of accumulators leave a warp half the tile.
    status = plan.tile == GemmTile::kSmall
                 ? launch_tile<Math, GemmTile::kSmall, 32, 32>(a, stream)
                 : launch_tile<Math, GemmTile::kLarge, Math::kPromotes ? 32 : 64, 64>(a, stream);
  }
  return status != cudaSuccess || direct ? status : launch_sum(a, p.shape, stream);
}

cudaError_t launch_weight(const DilatedConv2dGradWeightParams& p,
                          const GemmPlan& plan,
                          Stream stream) {
  switch (p.dtype) {
    case Dtype::kFloat16:
      return launch_math<HalfMath<__half>>(p, plan, stream);
    case Dtype::kBFloat16:
      return launch_math<HalfMath<__nv_bfloat16>>(p, plan, stream);
    case Dtype::kFloat64:
      return cudaErrorInvalidValue;
    case Dtype::kFloat32:
      break;
  }
  switch (p.precision) {
    case Float32Precision::kTf32:
      return launch_math<Tf32Math>(p, plan, stream);
    case Float32Precision::kBf16x3:
      return launch_math<SplitMath<2>>(p, plan, stream);
    case Float32Precision::kIeee:
      break;
  }
  return launch_math<SplitMath<3>>(p, plan, stream);
}

}  // namespace

Status launch_grad_weight_sum(const DilatedConv2dGradWeightParams& p,
                              int splits,
                              float* partials,
                              Stream stream) {
  return p.dtype == Dtype::kFloat16
             ? launch_sum(arguments<__half>(p, splits, partials), p.shape, stream)
             : launch_sum(arguments<__nv_bfloat16>(p, splits, partials), p.shape, stream);
}

Status launch_gemm(const DilatedConv2dGradWeightParams& p, const GemmPlan& plan, Stream stream) {
  const cudaError_t status = launch_weight(p, plan, stream);
  if (status != cudaSuccess || p.grad_bias == nullptr) {
    return status;
  }
  auto* const workspace = static_cast<unsigned char*>(p.workspace);
  const GradWeightSpace space = grad_weight_space(p, plan);
  const Sizes4 sizes = output_sizes(p.shape);
  return launch_packed_bias(
      plan.pack_grad_output ? workspace + space.grad_output : p.grad_output,
      plan.pack_grad_output ? packed_strides(sizes, p.dtype) : p.grad_output_strides,
      sizes,
      p.dtype,
      reinterpret_cast<float*>(workspace + space.bias),
      p.grad_bias,
      stream);
}

}  // namespace dilseg::cuda
