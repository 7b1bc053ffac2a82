// SPDX-License-Identifier: Apache-2.0
//
// Weight gradient of the convolution on sm_90a, half types, one group, stride 1:
//   grad_weight[o, c, i, j] = sum_{n, y, x} grad_output[n, o, y, x] *
//                             input[n, c, y - pad_top + i * dil_h, x - pad_left + j * dil_w]
// For every tap a product of matrices, c_out x c_in, summed over the pixels whose window meets the
// map at that tap: a rectangle of every image, the same in both tensors but for a shift. Each tap
// has a pair of TMA's im2col maps whose windows are these rectangles, so that one walk in step
// through both brings in all products that are not with padding, and no others: 64 pixels at a
// time, across rows and images, zeros after the last.
// A block owns tiles of 128 x kN weights of one tap and one part ("split") of its pixels, one after
// the other. Operands lie as [pixel][64 channels] in shared memory, as they do in the tensors, and
// are transposed by wgmma; two warpgroups multiply 64 output channels each. Two blocks with
// neighbouring output channels form a cluster: each copies half of the input to both. Pipeline:
// wgmma.cuh.
// Sums are float, in the order of the pixels. They go to the workspace, where the kernel of
// gemm_grad_weight.cu adds the splits in order, or with one split straight to a weight that has c
// innermost: no atomics, the same bits every run.
// Flops: 2 per weight and pixel of its rectangle, tiles filled up. Bytes: a step reads 16 KiB of
// grad_output and 128 kN (half of it with a cluster) of input, from L2 mostly; shared memory
// delivers 16 KiB + 256 kN to the products; partial sums 8 per weight and split. Limits:
// wgmma_grad_weight.h. Tensors: pack.h; the weight has any strides.
// Source: the weight gradients of CUTLASS for sm90, whose one window for all taps reads padding.
#include "cuda/common/vec.cuh"
#include "cuda/dilated_conv2d/direct.cuh"
#include "cuda/dilated_conv2d/pixel_walk.cuh"
#include "cuda/dilated_conv2d/wgmma.cuh"
#include "cuda/dilated_conv2d/wgmma_grad_weight.h"
#include "cuda/dilated_conv2d/workspace.h"

namespace dilseg::cuda {
namespace {

constexpr int kBoxChannels = 64;
constexpr int kBoxBytes = kStepK * 2 * kBoxChannels;

template <int kN>
struct Shared {
  unsigned char stages[Stages<kN>::kCount][Stages<kN>::kBytes];
  uint64_t full[Stages<kN>::kCount], empty[Stages<kN>::kCount];
};

struct WgmmaGradWeightArgs {
  // Of each tap that meets the map.
  CUtensorMap grad_output[kWgmmaMostTaps], input[kWgmmaMostTaps];
  DirectShape s;
  int column_tiles, row_groups;  // a row group holds a row tile for each block of a cluster
  int splits, cluster;
  int64_t tiles;
  float* partials;  // null: the sums go to grad_weight
  GradWeightPartials layout;
  void* grad_weight;
  Strides4 s_grad_weight;
};

// What a block does next. Blocks that run together share pixels, then channels of grad_output.
struct Job {
  int row, column, split;
  int tap, i, j;
  Range rows, columns;
  int64_t first;  // step
  int steps;
};

__device__ __forceinline__ Job job_of(const WgmmaGradWeightArgs& g,
                                      int64_t tile,
                                      int rank,
                                      int tile_n) {
  const DirectShape& s = g.s;
  Job job;
  job.column = split(tile, g.column_tiles) * tile_n;
  job.tap = split(tile, s.k_h * s.k_w);
  job.row = (split(tile, g.row_groups) * g.cluster + rank) * kM;
  job.split = static_cast<int>(tile);
  job.i = job.tap / s.k_w;
  job.j = job.tap - job.i * s.k_w;
  job.rows = meeting(job.i * s.dil_h, 1, s.pad_top, s.h_in, s.h_out);
  job.columns = meeting(job.j * s.dil_w, 1, s.pad_left, s.w_in, s.w_out);
  const int64_t pixels =
      s.n * (job.rows.end - job.rows.begin) * (job.columns.end - job.columns.begin);
  const int64_t all = ceil_div(pixels, kStepK);
  job.first = all * job.split / g.splits;
  job.steps = static_cast<int>(all * (job.split + 1) / g.splits - job.first);
  return job;
}

// The one thread that copies.
template <int kN>
__device__ __forceinline__ void copy_stages(const WgmmaGradWeightArgs& g,
                                            Shared<kN>& shared,
                                            int rank) {
  using S = Stages<kN>;
  constexpr uint16_t kNoOffset[2] = {0, 0};
  const DirectShape& s = g.s;
  const uint32_t full = ptx::shared_address(shared.full);
  const uint32_t empty = ptx::shared_address(shared.empty);
  const uint16_t everyone = static_cast<uint16_t>((1 << g.cluster) - 1);
  const int boxes = kN / kBoxChannels / g.cluster;  // of input, that this block copies
  Ring<S::kCount> ring;
  for (int64_t tile = blockIdx.x / g.cluster; tile < g.tiles; tile += gridDim.x / g.cluster) {
    const Job job = job_of(g, tile, rank, kN);
    const CUtensorMap* const grad_output = &g.grad_output[job.tap];
    const CUtensorMap* const input = &g.input[job.tap];
    PixelWalk<int> pixel(static_cast<int>(s.n), job.rows, job.columns, job.first * kStepK, kStepK);
    for (int step = 0; step < job.steps; ++step) {
      const uint32_t bar = full + 8 * ring.stage;
      const uint32_t a = ptx::shared_address(shared.stages[ring.stage]);
      ptx::mbarrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(bar, S::kBytes);
#pragma unroll
      for (int box = 0; box < kM / kBoxChannels; ++box) {
        const int at[4] = {job.row + box * kBoxChannels, pixel.x, pixel.y, pixel.n};
        ptx::tma_load_im2col(a + box * kBoxBytes, grad_output, bar, at, kNoOffset);
      }
      for (int i = 0; i < boxes; ++i) {
        const int box = rank * boxes + i;
        const int at[4] = {job.column + box * kBoxChannels,
                           pixel.x - s.pad_left + job.j * s.dil_w,
                           pixel.y - s.pad_top + job.i * s.dil_h,
                           pixel.n};
        const uint32_t to = a + kABytes + box * kBoxBytes;
        if (g.cluster > 1) {
          ptx::tma_load_im2col_multicast(to, input, bar, at, kNoOffset, everyone);
        } else {
          ptx::tma_load_im2col(to, input, bar, at, kNoOffset);
        }
      }
      ring.advance();
      pixel.next();
    }
  }
}

// The products of one stage: one box of grad_output with all of the input.
template <class T, int kN>
__device__ __forceinline__ void multiply(float (&sums)[kN / 2], uint32_t a, uint32_t b) {
  constexpr int kK = 16;
  constexpr int kSwizzle128 = 1;
#pragma unroll
  for (int k = 0; k < kStepK; k += kK) {
    wgmma<T, kN, 1, 1>(
        sums,
        ptx::wgmma_descriptor(a + k * kRowBytes, kBoxBytes, kEightRows, kSwizzle128),
        ptx::wgmma_descriptor(b + k * kRowBytes, kBoxBytes, kEightRows, kSwizzle128));
  }
}

// Registers 4 q .. 4 q + 3 of a thread are two neighbouring columns, from 8 q + 2 (lane % 4) on, of
// row lane / 4 of its warp's 16 and of the row 8 further down.
template <class T, int kN>
__device__ __forceinline__ void write_sums(const WgmmaGradWeightArgs& g,
                                           const Job& job,
                                           const float (&sums)[kN / 2]) {
  const DirectShape& s = g.s;
  const Strides4& strides = g.s_grad_weight;
  const int thread = static_cast<int>(threadIdx.x) - kGroupThreads;
  const int column = job.column + thread % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = job.row + thread / 32 * 16 + thread % 32 / 4 + 8 * half;
    if (row >= s.c_out) {
      continue;
    }
    if (g.partials != nullptr) {
      const int64_t matrix = static_cast<int64_t>(job.split) * (s.k_h * s.k_w) + job.tap;
      float* const to = g.partials + (matrix * s.c_out + row) * g.layout.pitch + column;
#pragma unroll
      for (int q = 0; q < kN / 8; ++q) {
        if (column + 8 * q < s.c_in) {
          store_vec(to + 8 * q,
                    Vec<float, 2>{{sums[4 * q + 2 * half], sums[4 * q + 2 * half + 1]}});
        }
      }
      continue;
    }
    // Channels lie side by side here, unless there is but one.
    T* const to = static_cast<T*>(g.grad_weight) + row * strides.n + job.i * strides.h +
                  job.j * strides.w + column;
    const bool aligned = reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0;
#pragma unroll
    for (int q = 0; q < kN / 8; ++q) {
      const float low = sums[4 * q + 2 * half];
      const float high = sums[4 * q + 2 * half + 1];
      const int left = s.c_in - (column + 8 * q);
      if (left >= 2 && aligned) {
        *reinterpret_cast<uint32_t*>(to + 8 * q) = pack2(T{}, low, high);
        continue;
      }
      if (left >= 1) {
        store(to + 8 * q, low);
      }
      if (left >= 2) {
        store(to + 8 * q + 1, high);
      }
    }
  }
}

template <class T, int kN>
__device__ __forceinline__ void multiply_tiles(const WgmmaGradWeightArgs& g,
                                               Shared<kN>& shared,
                                               int rank) {
  const auto group = (threadIdx.x - kGroupThreads) / kGroupThreads;
  Ring<Stages<kN>::kCount> ring;
  for (int64_t tile = blockIdx.x / g.cluster; tile < g.tiles; tile += gridDim.x / g.cluster) {
    float sums[kN / 2];
#pragma unroll
    for (float& sum : sums) {
      sum = 0;
    }
    multiply_stages<kN>(
        shared, ring, job_of(g, tile, rank, kN).steps, g.cluster, [&](uint32_t stage) {
          multiply<T, kN>(sums, stage + group * kBoxBytes, stage + kABytes);
        });
    write_sums<T, kN>(g, job_of(g, tile, rank, kN), sums);
  }
}

template <class T, int kN>
__global__ void __launch_bounds__(kThreads, 1)
    wgmma_grad_weight_kernel(const __grid_constant__ WgmmaGradWeightArgs g) {
#ifdef DILSEG_HAS_WGMMA
  auto& shared = *dynamic_shared<Shared<kN>>();
  const int rank = g.cluster > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  run_roles<kN>(
      shared,
      g.cluster,
      [&] { copy_stages<kN>(g, shared, rank); },
      [&] { multiply_tiles<T, kN>(g, shared, rank); });
#endif
}

template <class T, int kN>
cudaError_t run(const WgmmaGradWeightArgs& g, Stream stream) {
  const int64_t slots = std::max(1, current_gpu().multiprocessors / g.cluster);
  return launch_clusters(wgmma_grad_weight_kernel<T, kN>,
                         static_cast<unsigned>(std::min(g.tiles, slots) * g.cluster),
                         kThreads,
                         static_cast<unsigned>(g.cluster),
                         sizeof(Shared<kN>),
                         stream,
                         g);
}

template <class T>
cudaError_t run_tile(const WgmmaGradWeightArgs& g, int tile_n, Stream stream) {
  switch (tile_n) {
    case 256:
      return run<T, 256>(g, stream);
    case 128:
      return run<T, 128>(g, stream);
    default:
      return run<T, 64>(g, stream);
  }
}

// The map whose window is one tap's pixels.
cudaError_t make_window(CUtensorMap& map,
                        const Packed& tensor,
                        const Sizes4& sizes,
                        const WgmmaWindow& x,
                        const WgmmaWindow& y) {
  return make_im2col_map(map,
                         tensor.data,
                         map_shape(tensor.strides, sizes),
                         {.lower = {x.lower, y.lower},
                          .upper = {x.upper, y.upper},
                          .channels = kBoxChannels,
                          .pixels = kStepK});
}

cudaError_t make_windows(WgmmaGradWeightArgs& g,
                         const DilatedConv2dShape& shape,
                         const Packed& grad_output,
                         const Packed& input) {
  const DirectShape& s = g.s;
  for (int i = 0; i < s.k_h; ++i) {
    const WgmmaTap y = wgmma_tap(i, s.dil_h, s.pad_top, s.h_in, s.h_out);
    for (int j = 0; j < s.k_w; ++j) {
      const WgmmaTap x = wgmma_tap(j, s.dil_w, s.pad_left, s.w_in, s.w_out);
      if (y.pixels.begin == y.pixels.end || x.pixels.begin == x.pixels.end) {
        continue;
      }
      const int tap = i * s.k_w + j;
      cudaError_t status =
          make_window(g.grad_output[tap], grad_output, output_sizes(shape), x.output, y.output);
      if (status == cudaSuccess) {
        status = make_window(g.input[tap], input, input_sizes(shape), x.input, y.input);
      }
      if (status != cudaSuccess) {
        return status;
      }
    }
  }
  return cudaSuccess;
}

}  // namespace

Status launch_wgmma(const DilatedConv2dGradWeightParams& p, const WgmmaPlan& plan, Stream stream) {
  const DilatedConv2dShape& s = p.shape;
  if (plan.cluster > 1 && plan.tile_n < 2 * kBoxChannels) {
    return cudaErrorInvalidValue;  // input that cannot be halved
  }
  Workspace workspace(p.workspace, p.dtype, stream);
  const Packed grad_output =
      workspace.pack(plan.pack_grad_output, p.grad_output, p.grad_output_strides, output_sizes(s));
  const Packed input = workspace.pack(plan.pack_input, p.input, p.input_strides, input_sizes(s));
  const bool direct = grad_weight_is_direct(p, plan.splits);
  float* const partials = workspace.rest();
  WgmmaGradWeightArgs g{};
  g.s = direct_shape(s);
  g.column_tiles = static_cast<int>(tiles_of(s.c_in, plan.tile_n));
  g.row_groups = static_cast<int>(tiles_of(tiles_of(s.c_out, kM), plan.cluster));
  g.splits = plan.splits;
  g.cluster = plan.cluster;
  g.tiles = s.k_h * s.k_w * g.column_tiles * g.row_groups * plan.splits;
  g.partials = direct ? nullptr : partials;
  g.layout = grad_weight_partials(s);
  g.grad_weight = p.grad_weight;
  g.s_grad_weight = p.grad_weight_strides;
  Status status = workspace.status();
  if (status == cudaSuccess) {
    status = make_windows(g, s, grad_output, input);
  }
  if (status == cudaSuccess) {
    status = p.dtype == Dtype::kFloat16 ? run_tile<__half>(g, plan.tile_n, stream)
                                        : run_tile<__nv_bfloat16>(g, plan.tile_n, stream);
  }
  if (status == cudaSuccess && !direct) {
    status = launch_grad_weight_sum(p, plan.splits, partials, stream);
  }
  if (status != cudaSuccess || p.grad_bias == nullptr) {
    return status;
  }
  return launch_packed_bias(grad_output.data,
                            grad_output.strides,
                            output_sizes(s),
                            p.dtype,
                            partials + wgmma_partial_bytes(p, plan.splits) / sizeof(float),
                            p.grad_bias,
                            stream);
}

}  // namespace dilseg::cuda
