// SPDX-License-Identifier: Apache-2.0
//
// Forward convolution and its gradient with respect to the input as one implicit GEMM, for every
// group and every tap (i, j) that meets the map:
//   output[pixel, o] =
//       act(bias[o] + sum_{i, j, c} input[pixel moved by (i, j), c] * weight[o, i, j, c])
//   grad_input[pixel, c] =
//       sum_{i, j, o} grad_output[pixel moved by -(i, j), o] * weight[o, i, j, c]
// A block owns a tile of kM pixels (a run in memory order, or a box of the map) times kN channels
// and walks k = (tap, channels) in stages of 64 bytes per row: rows of A are gathered by cp.async
// of 16 bytes, zeros where the moved pixel lies outside; weights are read as they lie in memory,
// for grad_input transposed by the fragment loads. A tap that no pixel of the tile meets is left
// out. With a stride, grad_input goes through the map by phases (y mod stride_h, x mod stride_w):
// the pixels of a tile then meet the same taps, at one distance.
//
// Sums over k may be split over blocks, which write float tiles to the workspace; a second kernel
// adds them in order. Flops: 2 kM kN kStageK for every stage. Bytes: every (tile, tap) reads its
// pixels, from L2 mostly; the output is written once. Limits: gemm.h. Tensors: pack.h; the output
// has any strides.
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/dilated_conv2d/gemm.h"
#include "cuda/dilated_conv2d/mma_tile.cuh"
#include "cuda/dilated_conv2d/workspace.h"

namespace dilseg::cuda {
namespace {

constexpr int kStages = 4;

// Where a problem lies, for both directions: the map that is read (a), the map that is written.
struct GemmArgs {
  const void* a;
  int64_t a_n;  // strides in elements, within an image 32 bits
  int a_h, a_w;
  int h_a, w_a;
  int a_channels;  // of a group: the channels of k
  const void* b;
  int64_t b_o;
  int b_i, b_j;
  const void* bias;  // or null
  void* output;
  Strides4 s_output;
  int64_t n;
  int h_out, w_out;  // of the map that is written
  int out_channels;  // of a group
  int k_h, k_w;
  // A pixel (y, x) of a phase reads (y * step + tap * dil - pad) forward, with phases of 1; of the
  // phase (p, q) of grad_input (y + (p + pad - tap * dil) / phases).
  int step_h, step_w;
  int phases_h, phases_w;
  int dil_h, dil_w;
  int pad_h, pad_w;
  int box_h, box_w;  // 0 x 0 for runs
  int row_tiles, column_tiles, groups, splits;
  float* partials;
  bool relu;
};

// What a block owns; the phase of its pixels is part of the row tile.
struct Owned {
  int split, column_tile, group;
  int64_t row_tile;  // within its phase
  int phase_y, phase_x;
  int h, w;  // pixels of the phase
};

__device__ __forceinline__ Owned owned_by(const GemmArgs& g, int64_t block) {
  Owned o;
  o.column_tile = static_cast<int>(block % g.column_tiles);
  block /= g.column_tiles;
  o.row_tile = block % g.row_tiles;
  block /= g.row_tiles;
  o.phase_x = static_cast<int>(block % g.phases_w);
  block /= g.phases_w;
  o.phase_y = static_cast<int>(block % g.phases_h);
  block /= g.phases_h;
  o.group = static_cast<int>(block % g.groups);
  o.split = static_cast<int>(block / g.groups);
  o.h = (g.h_out - o.phase_y + g.phases_h - 1) / g.phases_h;
  o.w = (g.w_out - o.phase_x + g.phases_w - 1) / g.phases_w;
  return o;
}

struct Pixel {
  int64_t n;  // -1: the tile's row holds none
  int y, x;   // within the phase
};

template <int kM>
__device__ __forceinline__ Pixel pixel_of(const GemmArgs& g, const Owned& o, int row) {
  constexpr Pixel kNone = {-1, 0, 0};
  if (g.box_h == 0) {
    const int64_t index = o.row_tile * kM + row;
    const int64_t pixels = static_cast<int64_t>(o.h) * o.w;
    if (pixels == 0 || index >= g.n * pixels) {
      return kNone;
    }
    const int64_t n = index / pixels;
    const int rest = static_cast<int>(index - n * pixels);
    return {n, rest / o.w, rest % o.w};
  }
  const int boxes_x = (o.w + g.box_w - 1) / g.box_w;
  const int boxes = boxes_x * ((o.h + g.box_h - 1) / g.box_h);
  if (row >= g.box_h * g.box_w || boxes == 0) {
    return kNone;
  }
  const int64_t n = o.row_tile / boxes;
  const int box = static_cast<int>(o.row_tile - n * boxes);
  const int y = box / boxes_x * g.box_h + row / g.box_w;
  const int x = box % boxes_x * g.box_w + row % g.box_w;
  return n < g.n && y < o.h && x < o.w ? Pixel{n, y, x} : kNone;
}

// From a pixel of a phase (times the step) to what it reads at a tap; `meets` is false where the
// stride steps over it.
struct Distance {
  int by;
  bool meets;
};

template <bool kGradInput>
__device__ __forceinline__ Distance distance(int tap, int dil, int pad, int phase, int phases) {
  if constexpr (kGradInput) {
    const int by = phase + pad - tap * dil;
    return {by / phases, by % phases == 0};
  } else {
    return {tap * dil - pad, true};
  }
}

__device__ __forceinline__ bool inside(int at, int size) {
  return static_cast<unsigned>(at) < static_cast<unsigned>(size);
}

// Shared memory in front of the stages.
template <int kM>
struct Header {
  int64_t base[kM];        // of the pixel's image in a
  int64_t output[kM];      // offset of the pixel, -1 for none
  int y[kM], x[kM];        // times the step; far outside for none
  unsigned met[32];        // bit j of word i: tap (i, j) is met
  uint16_t taps[32 * 32];  // those taps, i * k_w + j
  int count;
  float bias[128];  // of the block's channels, 0 without
};

constexpr int kFarOutside = -(1 << 30);

template <class Shape>
__device__ __forceinline__ void begin_bias(const GemmArgs& g,
                                           const Owned& o,
                                           Header<Shape::kM>& header) {
  static_assert(Shape::kN <= 128);
  const int first = o.column_tile * Shape::kN;
  const auto* const bias = static_cast<const typename Shape::T*>(g.bias);
  for (int n = threadIdx.x; n < Shape::kN; n += Shape::kThreads) {
    header.bias[n] = bias != nullptr && first + n < g.out_channels
                         ? load(bias + o.group * g.out_channels + first + n)
                         : 0.0f;
  }
}

// Fills the rest of the header. All threads take part.
template <int kM, int kThreads, bool kGradInput>
__device__ __forceinline__ void begin(const GemmArgs& g, const Owned& o, Header<kM>& header) {
  for (int i = threadIdx.x; i < g.k_h; i += kThreads) {
    header.met[i] = 0;
  }
  __syncthreads();  // words are zero before bits are set
  for (int row = threadIdx.x; row < kM; row += kThreads) {
    const Pixel p = pixel_of<kM>(g, o, row);
    const int y = p.n < 0 ? kFarOutside : p.y * g.step_h;
    const int x = p.n < 0 ? kFarOutside : p.x * g.step_w;
    header.y[row] = y;
    header.x[row] = x;
    header.base[row] = p.n < 0 ? 0 : p.n * g.a_n;
    header.output[row] = p.n < 0
                             ? -1
                             : p.n * g.s_output.n + (p.y * g.phases_h + o.phase_y) * g.s_output.h +
                                   (p.x * g.phases_w + o.phase_x) * g.s_output.w;
    unsigned columns = 0;
    for (int j = 0; j < g.k_w; ++j) {
      const Distance d = distance<kGradInput>(j, g.dil_w, g.pad_w, o.phase_x, g.phases_w);
      columns |= static_cast<unsigned>(d.meets && inside(x + d.by, g.w_a)) << j;
    }
    for (int i = 0; i < g.k_h; ++i) {
      const Distance d = distance<kGradInput>(i, g.dil_h, g.pad_h, o.phase_y, g.phases_h);
      if (columns != 0 && d.meets && inside(y + d.by, g.h_a)) {
        atomicOr(&header.met[i], columns);
      }
    }
  }
  __syncthreads();  // all rows have set their bits
  if (threadIdx.x == 0) {
    int count = 0;
    for (int i = 0; i < g.k_h; ++i) {
      for (int j = 0; j < g.k_w; ++j) {
        if (header.met[i] >> j & 1) {
          header.taps[count++] = static_cast<uint16_t>(i * g.k_w + j);
        }
      }
    }
    header.count = count;
  }
  __syncthreads();  // the list is complete
}

// Copies stages. A thread owns the same chunk of the same rows in each.
template <class Shape, bool kGradInput>
class Loader {
 public:
  using T = typename Shape::T;
  using Product = BlockProduct<Shape, true, !kGradInput>;
  using TileA = typename Product::TileA;
  using TileB = typename Product::TileB;

  __device__ __forceinline__
  Loader(const GemmArgs& g, const Owned& o, const Header<Shape::kM>& header, int step)
      : g_(g), o_(o), header_(header) {
    const int per_tap = (g.a_channels + kStageK<T> - 1) / kStageK<T>;
    tap_ = step / per_tap;
    channel_ = step % per_tap * kStageK<T>;
    to_tap();
  }

  // The next stage into `stage`.
  __device__ __forceinline__ void load(unsigned char* stage) {
    const uint32_t address = ptx::shared_address(stage);
    const int chunk = threadIdx.x % kRowChunks;
    const int c = channel_ + chunk * kChunk<T>;
    const int left = bytes_of(g_.a_channels - c);
#pragma unroll
    for (int i = 0; i < kA; ++i) {
      const int row = threadIdx.x / kRowChunks + i * kRowsAtOnce;
      const bool read = (inside_ >> i & 1) != 0 && left > 0;
      ptx::cp_async_cg(address + TileA::at(row, chunk),
                       read ? pixel_[i] + c : static_cast<const T*>(g_.a),
                       read ? left : 0);
    }
    load_b(address + TileA::kBytes);
    channel_ += kStageK<T>;
    if (channel_ >= g_.a_channels) {
      channel_ = 0;
      ++tap_;
      to_tap();
    }
  }

 private:
  static constexpr int kThreads = Shape::kThreads;
  static constexpr int kRowChunks = TileA::kRowChunks;
  static constexpr int kRowsAtOnce = kThreads / kRowChunks;
  static constexpr int kA = Shape::kM / kRowsAtOnce;
  static constexpr int kB = TileB::kChunks / kThreads;
  static_assert(kA * kRowsAtOnce == Shape::kM && kB * kThreads == TileB::kChunks);

  static __device__ __forceinline__ int bytes_of(int elements) {
    return min(elements * static_cast<int>(sizeof(T)), kChunkBytes);
  }

  // Where the rows of A lie for the current tap.
  __device__ __forceinline__ void to_tap() {
    if (tap_ >= header_.count) {
      return;
    }
    const int i = header_.taps[tap_] / g_.k_w;
    const int j = header_.taps[tap_] - i * g_.k_w;
    const int by_y = distance<kGradInput>(i, g_.dil_h, g_.pad_h, o_.phase_y, g_.phases_h).by;
    const int by_x = distance<kGradInput>(j, g_.dil_w, g_.pad_w, o_.phase_x, g_.phases_w).by;
    weight_ = i * g_.b_i + j * g_.b_j;
    const T* const image = static_cast<const T*>(g_.a) + o_.group * g_.a_channels;
    inside_ = 0;
#pragma unroll
    for (int r = 0; r < kA; ++r) {
      const int row = threadIdx.x / kRowChunks + r * kRowsAtOnce;
      const int y = header_.y[row] + by_y;
      const int x = header_.x[row] + by_x;
      const bool meets = inside(y, g_.h_a) && inside(x, g_.w_a);
      inside_ |= static_cast<unsigned>(meets) << r;
      pixel_[r] = image + header_.base[row] + (meets ? y * g_.a_h + x * g_.a_w : 0);
    }
  }

  __device__ __forceinline__ void load_b(uint32_t address) {
    const T* const weight = static_cast<const T*>(g_.b) + weight_;
    const int first = o_.column_tile * Shape::kN;
#pragma unroll
    for (int r = 0; r < kB; ++r) {
      const int item = threadIdx.x + r * kThreads;
      const int row = item / TileB::kRowChunks;
      const int chunk = item % TileB::kRowChunks;
      // Forward: a row is an output channel; grad_input: a channel of k.
      int64_t filter;
      int c, rest;
      bool read;
      if constexpr (kGradInput) {
        filter = o_.group * g_.a_channels + channel_ + row;
        c = first + chunk * kChunk<T>;
        rest = g_.out_channels - c;
        read = channel_ + row < g_.a_channels && rest > 0;
      } else {
        filter = o_.group * g_.out_channels + first + row;
        c = channel_ + chunk * kChunk<T>;
        rest = g_.a_channels - c;
        read = first + row < g_.out_channels && rest > 0;
      }
      ptx::cp_async_cg(address + TileB::at(row, chunk),
                       read ? weight + filter * g_.b_o + c : static_cast<const T*>(g_.b),
                       read ? bytes_of(rest) : 0);
    }
  }

  const GemmArgs& g_;
  const Owned& o_;
  const Header<Shape::kM>& header_;
  int tap_, channel_;
  int weight_ = 0;
  const T* pixel_[kA];   // the moved pixels
  unsigned inside_ = 0;  // bit i: pixel i lies in the map
};

// max(v, 0) that lets nan through, as torch.relu does.
__device__ __forceinline__ float relu(float v) { return v <= 0.0f ? 0.0f : v; }

// The finished tile on its way from registers to memory: [pixel][channel] where channels are
// neighbours in the output, else [channel][pixel].
template <class Shape>
class OutputTile {
 public:
  using T = typename Shape::T;
  static constexpr int kPad = 16 / static_cast<int>(sizeof(T));
  static constexpr int kBytes =
      (Shape::kM + kPad) * (Shape::kN + kPad) * static_cast<int>(sizeof(T));

  __device__ __forceinline__
  OutputTile(const GemmArgs& g, const Owned& o, const Header<Shape::kM>& header, void* shared)
      : g_(g),
        bias_(header.bias),
        values_(static_cast<T*>(shared)),
        first_(o.group * g.out_channels + o.column_tile * Shape::kN),
        channels_(min(Shape::kN, g.out_channels - o.column_tile * Shape::kN)),
        by_pixel_(g.s_output.c == 1) {}

  // Bias and activation of the sum, then the one rounding.
  __device__ __forceinline__ void put(int m, int n, float sum) {
    sum += bias_[n];
    store(values_ + (by_pixel_ ? m * (Shape::kN + kPad) + n : n * (Shape::kM + kPad) + m),
          g_.relu ? relu(sum) : sum);
  }

  // All threads, after a barrier.
  __device__ __forceinline__ void write(const int64_t (&pixels)[Shape::kM]) {
    T* const output = static_cast<T*>(g_.output) + first_ * g_.s_output.c;
    if (!by_pixel_) {
      for (int i = threadIdx.x; i < Shape::kM * channels_; i += Shape::kThreads) {
        const int m = i % Shape::kM;
        const int n = i / Shape::kM;
        if (pixels[m] >= 0) {
          output[pixels[m] + n * g_.s_output.c] = values_[n * (Shape::kM + kPad) + m];
        }
      }
      return;
    }
    constexpr int kChunks = Shape::kN / kChunk<T>;
    for (int i = threadIdx.x; i < Shape::kM * kChunks; i += Shape::kThreads) {
      const int m = i / kChunks;
      const int n = i % kChunks * kChunk<T>;
      if (pixels[m] < 0 || n >= channels_) {
        continue;
      }
      const T* const from = values_ + m * (Shape::kN + kPad) + n;
      T* const to = output + pixels[m] + n;
      if (n + kChunk<T> <= channels_ && reinterpret_cast<uintptr_t>(to) % kChunkBytes == 0) {
        store_vec(to, load_vec<kChunk<T>>(from));
      } else {
        for (int c = 0; c < min(kChunk<T>, channels_ - n); ++c) {
          to[c] = from[c];
        }
      }
    }
  }

 private:
  const GemmArgs& g_;
  const float* bias_;
  T* values_;
  int first_, channels_;
  bool by_pixel_;
};

template <class Shape>
constexpr size_t header_bytes() {
  return (sizeof(Header<Shape::kM>) + 1023) / 1024 * 1024;
}

template <class Shape, bool kGradInput>
constexpr size_t shared_bytes() {
  return header_bytes<Shape>() +
         std::max<size_t>(kStages * Loader<Shape, kGradInput>::Product::kStageBytes,
                          OutputTile<Shape>::kBytes);
}

template <class Shape, bool kGradInput>
__global__ void __launch_bounds__(Shape::kThreads) gemm_kernel(const __grid_constant__ GemmArgs g) {
  using Load = Loader<Shape, kGradInput>;
  using Product = typename Load::Product;
  unsigned char* const shared = dynamic_shared<unsigned char>();
  Header<Shape::kM>& header = *reinterpret_cast<Header<Shape::kM>*>(shared);
  unsigned char* const stages = shared + header_bytes<Shape>();
  const Owned o = owned_by(g, blockIdx.x);
  begin_bias<Shape>(g, o, header);
  begin<Shape::kM, Shape::kThreads, kGradInput>(g, o, header);

  const int per_tap = (g.a_channels + kStageK<typename Shape::T> - 1) / kStageK<typename Shape::T>;
  const int64_t all = static_cast<int64_t>(header.count) * per_tap;
  const int first = static_cast<int>(all * o.split / g.splits);
  const int steps = static_cast<int>(all * (o.split + 1) / g.splits) - first;
  Load loader(g, o, header, first);
  Product product;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) {
      loader.load(stages + s * Product::kStageBytes);
    }
    ptx::cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage has landed for all, and all have read the one before it
    const int next = step + kStages - 1;
    if (next < steps) {
      loader.load(stages + next % kStages * Product::kStageBytes);
    }
    ptx::cp_async_commit();
    product.add(stages + step % kStages * Product::kStageBytes);
    product.promote(step + 1);
  }
  __syncthreads();  // all have read the last stage, whose place the output takes

  if (g.splits > 1) {
    float* const tile = g.partials + static_cast<int64_t>(blockIdx.x) * (Shape::kM * Shape::kN);
    product.finish([&](int m, int n, const float (&sums)[2]) {
      store_vec(tile + m * Shape::kN + n, Vec<float, 2>{{sums[0], sums[1]}});
    });
    return;
  }
  OutputTile<Shape> output(g, o, header, stages);
  product.finish([&](int m, int n, const float (&sums)[2]) {
    output.put(m, n, sums[0]);
    output.put(m, n + 1, sums[1]);
  });
  __syncthreads();  // the tile is whole
  output.write(header.output);
}

// Adds the splits of a tile in order. A block owns a tile.
template <class Shape>
__global__ void __launch_bounds__(Shape::kThreads)
    gemm_sum_kernel(const __grid_constant__ GemmArgs g, int64_t tiles) {
  unsigned char* const shared = dynamic_shared<unsigned char>();
  Header<Shape::kM>& header = *reinterpret_cast<Header<Shape::kM>*>(shared);
  const Owned o = owned_by(g, blockIdx.x);
  for (int row = threadIdx.x; row < Shape::kM; row += Shape::kThreads) {
    const Pixel p = pixel_of<Shape::kM>(g, o, row);
    header.output[row] = p.n < 0
                             ? -1
                             : p.n * g.s_output.n + (p.y * g.phases_h + o.phase_y) * g.s_output.h +
                                   (p.x * g.phases_w + o.phase_x) * g.s_output.w;
  }
  begin_bias<Shape>(g, o, header);
  __syncthreads();  // the bias is whole before it is added
  OutputTile<Shape> output(g, o, header, shared + header_bytes<Shape>());
  constexpr int kValues = Shape::kM * Shape::kN;
  const float* const tile = g.partials + static_cast<int64_t>(blockIdx.x) * kValues;
  for (int i = threadIdx.x * 4; i < kValues; i += Shape::kThreads * 4) {
    Vec<float, 4> sum = load_vec<4>(tile + i);
    for (int split = 1; split < g.splits; ++split) {
      const Vec<float, 4> part = load_vec<4>(tile + split * tiles * kValues + i);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        sum.v[v] += part.v[v];
      }
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      output.put(i / Shape::kN, i % Shape::kN + v, sum.v[v]);
    }
  }
  __syncthreads();  // tile and offsets are whole
  output.write(header.output);
}

template <class Shape, bool kGradInput>
cudaError_t run(const GemmArgs& g, Stream stream) {
  const int64_t tiles =
      static_cast<int64_t>(g.column_tiles) * g.row_tiles * g.phases_h * g.phases_w * g.groups;
  const cudaError_t status = launch(gemm_kernel<Shape, kGradInput>,
                                    static_cast<unsigned>(tiles * g.splits),
                                    Shape::kThreads,
                                    shared_bytes<Shape, kGradInput>(),
                                    stream,
                                    g);
  if (status != cudaSuccess || g.splits == 1) {
    return status;
  }
  return launch(gemm_sum_kernel<Shape>,
                static_cast<unsigned>(tiles),
                Shape::kThreads,
                header_bytes<Shape>() + OutputTile<Shape>::kBytes,
                stream,
                g,
                tiles);
}

template <bool kGradInput, class Math, int kWarpM, int kWarpN>
cudaError_t run_tile(const GemmArgs& g, GemmTile tile, Stream stream) {
  return tile == GemmTile::kLarge
             ? run<TileShape<Math, 128, 128, kWarpM, kWarpN>, kGradInput>(g, stream)
             : run<TileShape<Math, 64, 64, 32, 32>, kGradInput>(g, stream);
}

template <bool kGradInput>
cudaError_t run_dtype(
    const GemmArgs& g, GemmTile tile, Dtype dtype, Float32Precision precision, Stream stream) {
  switch (dtype) {
    case Dtype::kFloat16:
      return run_tile<kGradInput, HalfMath<__half>, 64, 64>(g, tile, stream);
    case Dtype::kBFloat16:
      return run_tile<kGradInput, HalfMath<__nv_bfloat16>, 64, 64>(g, tile, stream);
    case Dtype::kFloat32:
      switch (precision) {
        case Float32Precision::kIeee:
          return run_tile<kGradInput, SplitMath<3>, 32, 64>(g, tile, stream);
        case Float32Precision::kBf16x3:
          return run_tile<kGradInput, SplitMath<2>, 32, 64>(g, tile, stream);
        case Float32Precision::kTf32:
          return run_tile<kGradInput, Tf32Math, 64, 64>(g, tile, stream);
      }
      break;
    case Dtype::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

Status launch_gemm(const DilatedConv2dParams& p, const GemmPlan& plan, Stream stream) {
  const DilatedConv2dShape& s = p.shape;
  Workspace workspace(p.workspace, p.dtype, stream);
  const Packed a = workspace.pack(plan.pack_input, p.input, p.input_strides, input_sizes(s));
  const Packed b = workspace.pack(plan.pack_weight, p.weight, p.weight_strides, weight_sizes(s));
  if (workspace.status() != cudaSuccess) {
    return workspace.status();
  }
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  const GemmGrid grid = gemm_grid(plan, s.n, s.h_out, s.w_out, 1, 1, s.c_out / s.groups);
  return run_dtype<false>({.a = a.data,
                           .a_n = a.strides.n,
                           .a_h = narrow(a.strides.h),
                           .a_w = narrow(a.strides.w),
                           .h_a = narrow(s.h_in),
                           .w_a = narrow(s.w_in),
                           .a_channels = narrow(s.c_in / s.groups),
                           .b = b.data,
                           .b_o = b.strides.n,
                           .b_i = narrow(b.strides.h),
                           .b_j = narrow(b.strides.w),
                           .bias = p.bias,
                           .output = p.output,
                           .s_output = p.output_strides,
                           .n = s.n,
                           .h_out = narrow(s.h_out),
                           .w_out = narrow(s.w_out),
                           .out_channels = narrow(s.c_out / s.groups),
                           .k_h = narrow(s.k_h),
                           .k_w = narrow(s.k_w),
                           .step_h = narrow(s.stride_h),
                           .step_w = narrow(s.stride_w),
                           .phases_h = 1,
                           .phases_w = 1,
                           .dil_h = narrow(s.dil_h),
                           .dil_w = narrow(s.dil_w),
                           .pad_h = narrow(s.pad_top),
                           .pad_w = narrow(s.pad_left),
                           .box_h = plan.box_h,
                           .box_w = plan.box_w,
                           .row_tiles = narrow(grid.row_tiles),
                           .column_tiles = narrow(grid.column_tiles),
                           .groups = narrow(s.groups),
                           .splits = plan.splits,
                           .partials = workspace.rest(),
                           .relu = p.relu},
                          plan.tile,
                          p.dtype,
                          p.precision,
                          stream);
}

Status launch_gemm(const DilatedConv2dGradInputParams& p, const GemmPlan& plan, Stream stream) {
  const DilatedConv2dShape& s = p.shape;
  Workspace workspace(p.workspace, p.dtype, stream);
  const Packed a =
      workspace.pack(plan.pack_input, p.grad_output, p.grad_output_strides, output_sizes(s));
  const Packed b = workspace.pack(plan.pack_weight, p.weight, p.weight_strides, weight_sizes(s));
  if (workspace.status() != cudaSuccess) {
    return workspace.status();
  }
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  const GemmGrid grid =
      gemm_grid(plan, s.n, s.h_in, s.w_in, s.stride_h, s.stride_w, s.c_in / s.groups);
  return run_dtype<true>({.a = a.data,
                          .a_n = a.strides.n,
                          .a_h = narrow(a.strides.h),
                          .a_w = narrow(a.strides.w),
                          .h_a = narrow(s.h_out),
                          .w_a = narrow(s.w_out),
                          .a_channels = narrow(s.c_out / s.groups),
                          .b = b.data,
                          .b_o = b.strides.n,
                          .b_i = narrow(b.strides.h),
                          .b_j = narrow(b.strides.w),
                          .bias = nullptr,
                          .output = p.grad_input,
                          .s_output = p.grad_input_strides,
                          .n = s.n,
                          .h_out = narrow(s.h_in),
                          .w_out = narrow(s.w_in),
                          .out_channels = narrow(s.c_in / s.groups),
                          .k_h = narrow(s.k_h),
                          .k_w = narrow(s.k_w),
                          .step_h = 1,
                          .step_w = 1,
                          .phases_h = narrow(s.stride_h),
                          .phases_w = narrow(s.stride_w),
                          .dil_h = narrow(s.dil_h),
                          .dil_w = narrow(s.dil_w),
                          .pad_h = narrow(s.pad_top),
                          .pad_w = narrow(s.pad_left),
                          .box_h = plan.box_h,
                          .box_w = plan.box_w,
                          .row_tiles = narrow(grid.row_tiles),
                          .column_tiles = narrow(grid.column_tiles),
                          .groups = narrow(s.groups),
                          .splits = plan.splits,
                          .partials = workspace.rest(),
                          .relu = false},
                         plan.tile,
                         p.dtype,
                         p.precision,
                         stream);
}

}  // namespace dilseg::cuda
