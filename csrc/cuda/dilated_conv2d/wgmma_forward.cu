// SPDX-License-Identifier: Apache-2.0
//
// Forward convolution and its gradient with respect to the input on sm_90a, half types and floats:
//   output[pixel, o] =
//       act(bias[o] + sum_{i, j, c} input[pixel moved by (i, j), c] * weight[o, i, j, c])
//   grad_input[pixel, c] =
//       sum_{i, j, o} grad_output[pixel moved by -(i, j), o] * weight[o, i, j, c]
// A block owns tiles of 128 pixels (a run in memory order, or a box of the map) times kN channels,
// one after the other, and walks k = (tap, 64 channels). One thread copies: TMA brings the moved
// pixels, zeros outside the map, and the weights, into a ring of stages (wgmma.cuh); for grad_input
// weights are read as they lie and transposed by wgmma. Two warpgroups multiply, 64 pixels each.
//
// Two blocks with neighbouring pixels form a cluster: each copies half of the weights to both.
// Taps that no pixel of the cluster's boxes meets are left out. Results pass through two slabs of
// 128 pixels x 64 channels on their way to memory, by TMA where the output allows it.
//
// A float is the sum of two or three bfloat16 parts, which a pass before has written as tensors of
// their own (split.cuh). A stage then holds each part of 64 channels, and of two parts i and j the
// products with i + j below the number of parts are added, the smallest first. Tensor cores
// truncate when they add: the sums move to ordinary float accumulators after every step (every
// fourth with two parts, which are coarser), so that few large sums are truncated.
//
// Sums over k may be split over tiles, which write floats to the workspace; a second kernel adds
// them in order. Flops: 256 kN for each of 64 channels of a step. Bytes: a step reads 16 KiB of
// pixels and 128 kN (half of it with a cluster) of weights, from L2 mostly; shared memory delivers
// 16 KiB + 256 kN to the products. Limits: wgmma.h. Tensors: pack.h; the output has any strides.
#include "cuda/common/vec.cuh"
#include "cuda/dilated_conv2d/wgmma.cuh"
#include "cuda/dilated_conv2d/workspace.h"

namespace dilseg::cuda {
namespace {

constexpr int kBoxColumns = kRowBytes / 2;  // of weights that are transposed
constexpr int kSlabBytes = kM * kRowBytes;
constexpr int kSlabs = 2;
constexpr int kMaxPlanes = 3;

// Channels of a row of a slab.
template <class T>
constexpr int kSlabColumns = kRowBytes / static_cast<int>(sizeof(T));
constexpr int kBarrier = 1;  // of the multipliers

// Of the tile.
template <int kN>
struct TileNotes {
  int64_t pixels[kM];  // offsets in the output, -1 for none
  float bias[kN];
};

template <int kN, int kPlanes>
struct Shared {
  using S = Stages<kN, kPlanes>;
  unsigned char stages[S::kCount][S::kBytes];
  unsigned char slabs[kSlabs][kSlabBytes];
  TileNotes<kN> notes;
  uint64_t full[S::kCount], empty[S::kCount];
};

struct WgmmaArgs {
  CUtensorMap a[kMaxPlanes], b[kMaxPlanes];
  CUtensorMap out;  // only with store_by_map
  bool store_by_map;
  bool runs;
  const void* bias;  // or null
  void* output;
  Strides4 s_output;
  int64_t n;
  int h, w;  // of the map that is written
  int columns;
  int h_a, w_a;
  int k_channels;
  int k_h, k_w, dil_h, dil_w, pad_h, pad_w;  // as in wgmma.h
  int box_h, box_w;
  int64_t row_tiles, row_groups, tiles;  // a row group holds a row tile for each block of a cluster
  int splits, cluster;
  float* partials;
  int64_t partial_pitch;
  bool relu;
};

struct Taps {
  int begin, end;
};

// The taps at which one of the rows [first, last] meets the map.
__device__ __forceinline__ Taps taps_met(int first, int last, int size_a, int k, int dil, int pad) {
  const int begin = pad - last <= 0 ? 0 : (pad - last + dil - 1) / dil;
  const int reach = size_a - 1 + pad - first;
  const int end = reach < 0 ? 0 : reach / dil + 1;
  return {begin, min(end, k)};
}

__device__ __forceinline__ Taps join(Taps a, Taps b) {
  if (a.begin >= a.end) {
    return b;
  }
  return b.begin >= b.end ? a : Taps{min(a.begin, b.begin), max(a.end, b.end)};
}

// The first pixel of a row tile; n is beyond the last image where there is none.
struct Origin {
  int64_t n;
  int y, x;
};

__device__ __forceinline__ Origin origin_of(const WgmmaArgs& g, int64_t row_tile) {
  if (g.runs) {
    const int64_t pixels = static_cast<int64_t>(g.h) * g.w;
    const int64_t n = row_tile * kM / pixels;
    const int rest = static_cast<int>(row_tile * kM - n * pixels);
    return n < g.n ? Origin{n, rest / g.w, rest % g.w} : Origin{g.n, 0, 0};
  }
  const int boxes_x = (g.w + g.box_w - 1) / g.box_w;
  const int boxes = boxes_x * ((g.h + g.box_h - 1) / g.box_h);
  const int64_t n = row_tile / boxes;
  const int box = static_cast<int>(row_tile - n * boxes);
  return {n, box / boxes_x * g.box_h, box % boxes_x * g.box_w};
}

// What all blocks of a cluster do together.
struct Job {
  int64_t row_tile;  // of this block
  int split, column;
  Taps i, j;
  int begin, end;  // steps
};

__device__ __forceinline__ Job job_of(const WgmmaArgs& g, int64_t tile, int rank, int tile_n) {
  Job job;
  const int64_t row_group = tile % g.row_groups;
  const int64_t rest = tile / g.row_groups;
  job.split = static_cast<int>(rest % g.splits);
  job.column = static_cast<int>(rest / g.splits) * tile_n;
  job.row_tile = row_group * g.cluster + rank;
  job.i = job.j = {0, 0};
  for (int r = 0; r < g.cluster; ++r) {
    const int64_t row_tile = row_group * g.cluster + r;
    if (row_tile >= g.row_tiles) {
      break;
    }
    const Origin o = origin_of(g, row_tile);
    int last_y = min(o.y + g.box_h, g.h) - 1;
    int last_x = min(o.x + g.box_w, g.w) - 1;
    int first_y = o.y;
    int first_x = o.x;
    if (g.runs) {
      // Whole rows, and whole images where the run goes on in the next one.
      const int64_t left =
          static_cast<int64_t>(g.h) * g.w - (static_cast<int64_t>(o.y) * g.w + o.x);
      first_y = left < kM && o.n + 1 < g.n ? 0 : o.y;
      last_y = left < kM ? g.h - 1
                         : static_cast<int>((static_cast<int64_t>(o.y) * g.w + o.x + kM - 1) / g.w);
      first_x = 0;
      last_x = g.w - 1;
    }
    job.i = join(job.i, taps_met(first_y, last_y, g.h_a, g.k_h, g.dil_h, g.pad_h));
    job.j = join(job.j, taps_met(first_x, last_x, g.w_a, g.k_w, g.dil_w, g.pad_w));
  }
  const int per_tap = (g.k_channels + kStepK - 1) / kStepK;
  const int64_t all = static_cast<int64_t>(max(job.i.end - job.i.begin, 0)) *
                      max(job.j.end - job.j.begin, 0) * per_tap;
  job.begin = static_cast<int>(all * job.split / g.splits);
  job.end = static_cast<int>(all * (job.split + 1) / g.splits);
  return job;
}

// The one thread that copies.
template <int kN, int kPlanes, bool kGradInput>
__device__ __forceinline__ void copy_stages(const WgmmaArgs& g,
                                            Shared<kN, kPlanes>& shared,
                                            int rank) {
  using S = Stages<kN, kPlanes>;
  constexpr int kBoxes = kGradInput ? kN / kBoxColumns : 1;  // of weights
  const uint32_t full = ptx::shared_address(shared.full);
  const uint32_t empty = ptx::shared_address(shared.empty);
  const int per_tap = (g.k_channels + kStepK - 1) / kStepK;
  const uint32_t pixel_bytes = static_cast<uint32_t>(g.runs ? kM : g.box_h * g.box_w) * kRowBytes;
  const uint16_t everyone = static_cast<uint16_t>((1 << g.cluster) - 1);
  Ring<S::kCount> ring;
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
    ptx::prefetch_tensor_map(&g.a[p]);
    ptx::prefetch_tensor_map(&g.b[p]);
  }
  for (int64_t tile = blockIdx.x / g.cluster; tile < g.tiles; tile += gridDim.x / g.cluster) {
    const Job job = job_of(g, tile, rank, kN);
    const Origin o = origin_of(g, job.row_tile);
    const int width = max(job.j.end - job.j.begin, 1);
    for (int step = job.begin; step < job.end; ++step) {
      const int tap = step / per_tap;
      const int c = (step - tap * per_tap) * kStepK;
      const int i = job.i.begin + tap / width;
      const int j = job.j.begin + tap % width;
      const uint32_t bar = full + 8 * ring.stage;
      const uint32_t stage = ptx::shared_address(shared.stages[ring.stage]);
      ptx::mbarrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(bar, kPlanes * (pixel_bytes + S::kBBytes));
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        const uint32_t a = stage + p * kABytes;
        const uint32_t b = stage + kPlanes * kABytes + p * S::kBBytes;
        if (g.runs) {
          // The walk begins at the corner that belongs to the pixel; the tap is an offset.
          const int at[4] = {c, o.x - g.pad_w, o.y - g.pad_h, static_cast<int>(o.n)};
          const uint16_t offset[2] = {static_cast<uint16_t>(j * g.dil_w),
                                      static_cast<uint16_t>(i * g.dil_h)};
          ptx::tma_load_im2col(a, &g.a[p], bar, at, offset);
        } else {
          const int at[4] = {
              c, o.x - g.pad_w + j * g.dil_w, o.y - g.pad_h + i * g.dil_h, static_cast<int>(o.n)};
          ptx::tma_load(a, &g.a[p], bar, at);
        }
        if constexpr (kGradInput) {
          const int per_block = kBoxes / g.cluster;
          for (int box = rank * per_block; box < (rank + 1) * per_block; ++box) {
            const int at[4] = {job.column + box * kBoxColumns, g.k_w - 1 - j, g.k_h - 1 - i, c};
            const uint32_t to = b + box * (kStepK * kRowBytes);
            if (g.cluster > 1) {
              ptx::tma_load_multicast(to, &g.b[p], bar, at, everyone);
            } else {
              ptx::tma_load(to, &g.b[p], bar, at);
            }
          }
        } else {
          const int rows = kN / g.cluster;
          const int at[4] = {c, j, i, job.column + rank * rows};
          const uint32_t to = b + rank * rows * kRowBytes;
          if (g.cluster > 1) {
            ptx::tma_load_multicast(to, &g.b[p], bar, at, everyone);
          } else {
            ptx::tma_load(to, &g.b[p], bar, at);
          }
        }
      }
      ring.advance();
    }
  }
}

// The products of one stage.
template <class T, int kN, bool kGradInput>
__device__ __forceinline__ void multiply(float (&sums)[kN / 2], uint32_t a, uint32_t b) {
  constexpr int kK = 16;
  constexpr int kSwizzle128 = 1;
#pragma unroll
  for (int k = 0; k < kStepK / kK; ++k) {
    const uint64_t pixels = ptx::wgmma_descriptor(a + k * (2 * kK), 0, kEightRows, kSwizzle128);
    const uint64_t weights =
        kGradInput ? ptx::wgmma_descriptor(
                         b + k * (kK * kRowBytes), kStepK * kRowBytes, kEightRows, kSwizzle128)
                   : ptx::wgmma_descriptor(b + k * (2 * kK), 0, kEightRows, kSwizzle128);
    wgmma<T, kN, 0, kGradInput ? 1 : 0>(sums, pixels, weights);
  }
}

// The products of one stage of parts.
template <class T, int kN, int kPlanes, bool kGradInput>
__device__ __forceinline__ void multiply_parts(float (&sums)[kN / 2],
                                               uint32_t stage,
                                               uint32_t own_rows) {
#pragma unroll
  for (int order = kPlanes - 1; order >= 0; --order) {
#pragma unroll
    for (int part = 0; part <= order; ++part) {
      multiply<T, kN, kGradInput>(sums,
                                  stage + (order - part) * kABytes + own_rows,
                                  stage + kPlanes * kABytes + part * Stages<kN, kPlanes>::kBBytes);
    }
  }
}

// max(v, 0) that lets nan through, as torch.relu does.
__device__ __forceinline__ float relu(float v) { return v <= 0.0f ? 0.0f : v; }

// Offset in a slab of a 16-byte chunk of a row: the swizzle of the output's map.
__device__ __forceinline__ uint32_t slab_at(int row, int chunk) {
  return static_cast<uint32_t>(row * kRowBytes + ((chunk ^ (row & 7)) << 4));
}

// From a slab to an output of any strides.
template <class T>
__device__ __forceinline__ void write_slab(const WgmmaArgs& g,
                                           const unsigned char* slab,
                                           const int64_t (&pixels)[kM],
                                           int column,
                                           int thread) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  constexpr int kChunks = kRowBytes / 16;
  T* const output = static_cast<T*>(g.output) + column * g.s_output.c;
  const int columns = min(kSlabColumns<T>, g.columns - column);
  if (g.s_output.c == 1) {
    for (int i = thread; i < kM * kChunks; i += kMultipliers) {
      const int row = i / kChunks;
      const int n = i % kChunks * kChunk;
      if (pixels[row] < 0 || n >= columns) {
        continue;
      }
      const T* const from = reinterpret_cast<const T*>(slab + slab_at(row, n / kChunk));
      T* const to = output + pixels[row] + n;
      if (n + kChunk <= columns && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
        store_vec(to, load_vec<kChunk>(from));
      } else {
        for (int c = 0; c < min(kChunk, columns - n); ++c) {
          to[c] = from[c];
        }
      }
    }
    return;
  }
  // Neighbouring threads write neighbouring pixels.
  for (int i = thread; i < kM * columns; i += kMultipliers) {
    const int row = i % kM;
    const int n = i / kM;
    if (pixels[row] >= 0) {
      output[pixels[row] + n * g.s_output.c] =
          reinterpret_cast<const T*>(slab + slab_at(row, n / kChunk))[n % kChunk];
    }
  }
}

// Registers 4 q .. 4 q + 3 of a thread are two neighbouring columns, from 8 q + 2 (lane % 4) on, of
// row lane / 4 of its warp's 16 and of the row 8 further down.
template <class T, int kN, int kPlanes, bool kGradInput>
__device__ __forceinline__ void multiply_tiles(const WgmmaArgs& g,
                                               Shared<kN, kPlanes>& shared,
                                               int rank) {
  using S = Stages<kN, kPlanes>;
  using Operand = std::conditional_t<kPlanes == 1, T, __nv_bfloat16>;
  const int thread = static_cast<int>(threadIdx.x) - kGroupThreads;
  const int lane = thread % 32;
  const int warp_row = thread / 32 * 16;
  const uint32_t own_rows = static_cast<uint32_t>(thread / kGroupThreads) * (kABytes / 2);
  Ring<S::kCount> ring;
  const auto sum_steps = [&](int steps, float (&sums)[kN / 2]) {
#pragma unroll
    for (float& sum : sums) {
      sum = 0;
    }
    multiply_stages<kN, kPlanes>(shared, ring, steps, g.cluster, [&](uint32_t stage) {
      multiply_parts<Operand, kN, kPlanes, kGradInput>(sums, stage, own_rows);
    });
  };
  TileNotes<kN>& notes = shared.notes;
  int slab = 0;
  for (int64_t tile = blockIdx.x / g.cluster; tile < g.tiles; tile += gridDim.x / g.cluster) {
    const Job job = job_of(g, tile, rank, kN);
    const Origin o = origin_of(g, job.row_tile);
    // Every read of the last tile's notes, before they are overwritten.
    ptx::barrier_sync(kBarrier, kMultipliers);
    if (thread < kM) {
      int64_t n = o.n;
      int y = o.y;
      int x = o.x;
      bool inside = true;
      if (g.runs) {
        const int64_t pixels = static_cast<int64_t>(g.h) * g.w;
        const int64_t at = static_cast<int64_t>(y) * g.w + x + thread;
        n += at / pixels;
        const int rest = static_cast<int>(at % pixels);
        y = rest / g.w;
        x = rest % g.w;
      } else {
        y += thread / g.box_w;
        x += thread % g.box_w;
        inside = thread < g.box_h * g.box_w && y < g.h && x < g.w;
      }
      inside = inside && n < g.n;
      notes.pixels[thread] = !inside ? -1
                             : g.splits > 1
                                 ? (n * g.h + y) * g.w + x
                                 : n * g.s_output.n + y * g.s_output.h + x * g.s_output.w;
    }
    for (int c = thread; c < kN; c += kMultipliers) {
      notes.bias[c] = g.bias != nullptr && job.column + c < g.columns
                          ? load(static_cast<const T*>(g.bias) + job.column + c)
                          : 0.0f;
    }

    float sums[kN / 2];
    if constexpr (kPlanes == 1) {
      sum_steps(job.end - job.begin, sums);
    } else {
      constexpr int kPromoteSteps = kPlanes == 3 ? 1 : 4;
      float part[kN / 2];
#pragma unroll
      for (float& sum : sums) {
        sum = 0;
      }
      for (int step = job.begin; step < job.end; step += kPromoteSteps) {
        sum_steps(min(kPromoteSteps, job.end - step), part);
#pragma unroll
        for (int q = 0; q < kN / 2; ++q) {
          sums[q] += part[q];
        }
      }
    }
    // Every write of the notes before their first read.
    ptx::barrier_sync(kBarrier, kMultipliers);

    if (g.splits > 1) {
      const int64_t part = job.split * (g.n * g.h * g.w);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t pixel = notes.pixels[warp_row + lane / 4 + 8 * half];
        if (pixel < 0) {
          continue;
        }
        float* const to = g.partials + (part + pixel) * g.partial_pitch;
#pragma unroll
        for (int q = 0; q < kN / 8; ++q) {
          const int column = job.column + 8 * q + lane % 4 * 2;
          if (column < g.partial_pitch) {
            store_vec(to + column,
                      Vec<float, 2>{{sums[4 * q + 2 * half], sums[4 * q + 2 * half + 1]}});
          }
        }
      }
      continue;
    }
#pragma unroll
    for (int part = 0; part < kN / kSlabColumns<T>; ++part) {
      const int column = job.column + part * kSlabColumns<T>;
      if (column >= g.columns) {
        break;
      }
      unsigned char* const to = shared.slabs[slab];
      slab ^= 1;
      // Registers 2 pair, 2 pair + 1 of a thread, ready to be stored.
      const auto finished = [&](int pair) {
        const int c = pair / 2 * 8 + lane % 4 * 2;
        const float low = sums[2 * pair] + notes.bias[c];
        const float high = sums[2 * pair + 1] + notes.bias[c + 1];
        return g.relu ? float2{relu(low), relu(high)} : float2{low, high};
      };
      if constexpr (kPlanes == 1) {
#pragma unroll
        for (int pair = 0; pair < kSlabColumns<T> / 16; ++pair) {
          uint32_t packed[4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            const int q = part * (kSlabColumns<T> / 8) + 2 * pair + r / 2;
            const float2 both = finished(2 * q + r % 2);
            packed[r] = pack2(T{}, both.x, both.y);
          }
          const int row = warp_row + lane % 16;
          ptx::stmatrix(ptx::shared_address(to) + slab_at(row, 2 * pair + lane / 16), packed);
        }
      } else {
#pragma unroll
        for (int r = 0; r < kSlabColumns<T> / 4; ++r) {
          const float2 both = finished(part * (kSlabColumns<T> / 4) + r);
          const int row = warp_row + lane / 4 + r % 2 * 8;
          const int chunk = r / 2 * 2 + lane % 4 / 2;
          store_vec(reinterpret_cast<float*>(to + slab_at(row, chunk)) + lane % 2 * 2,
                    Vec<float, 2>{{both.x, both.y}});
        }
      }
      if (g.store_by_map) {
        ptx::fence_proxy_async();
        if (thread == 0) {
          ptx::bulk_wait_read<0>();  // the other slab, which is written next
        }
      }
      // The slab is whole. Its last readers have passed the barrier of the slab between.
      ptx::barrier_sync(kBarrier, kMultipliers);
      if (!g.store_by_map) {
        write_slab<T>(g, to, notes.pixels, column, thread);
      } else if (thread == 0 && job.row_tile < g.row_tiles) {
        if (g.runs) {
          const int at[4] = {column, static_cast<int>(job.row_tile * kM), 0, 0};
          ptx::tma_store(&g.out, at, ptx::shared_address(to));
        } else {
          const int at[4] = {column, o.x, o.y, static_cast<int>(o.n)};
          ptx::tma_store(&g.out, at, ptx::shared_address(to));
        }
        ptx::bulk_commit();
      }
    }
  }
  if (thread == 0) {
    ptx::bulk_wait<0>();  // the slabs outlive their stores
  }
}

template <class T, int kN, int kPlanes, bool kGradInput>
__global__ void __launch_bounds__(kThreads, 1) wgmma_kernel(const __grid_constant__ WgmmaArgs g) {
#ifdef DILSEG_HAS_WGMMA
  using S = Stages<kN, kPlanes>;
  auto& shared = *dynamic_shared<Shared<kN, kPlanes>>();
  const int rank = g.cluster > 1 ? static_cast<int>(ptx::cluster_rank()) : 0;
  if (!g.runs) {
    // Rows that no box fills are multiplied all the same.
    const int filled = g.box_h * g.box_w * kRowBytes;
    for (int tile = 0; tile < S::kCount * kPlanes; ++tile) {
      unsigned char* const rows = shared.stages[tile / kPlanes] + tile % kPlanes * kABytes;
      for (int at = filled + static_cast<int>(threadIdx.x) * 16; at < kABytes;
           at += kThreads * 16) {
        *reinterpret_cast<uint4*>(rows + at) = uint4{0, 0, 0, 0};
      }
    }
    ptx::fence_proxy_async();
  }
  run_roles<kN, kPlanes>(
      shared,
      g.cluster,
      [&] { copy_stages<kN, kPlanes, kGradInput>(g, shared, rank); },
      [&] { multiply_tiles<T, kN, kPlanes, kGradInput>(g, shared, rank); });
#endif
}

// Adds the splits in order. A thread owns four channels of a pixel.
template <class T>
__global__ void __launch_bounds__(256) wgmma_sum_kernel(const __grid_constant__ WgmmaArgs g) {
  const int64_t chunks = g.partial_pitch / 4;
  const int64_t pixels = g.n * g.h * g.w;
  for (int64_t item = grid_thread(); item < pixels * chunks; item += grid_threads()) {
    const int64_t pixel = item / chunks;
    const int c = static_cast<int>(item % chunks) * 4;
    const float* const from = g.partials + pixel * g.partial_pitch + c;
    Vec<float, 4> sum = load_vec<4>(from);
    for (int split = 1; split < g.splits; ++split) {
      const Vec<float, 4> part = load_vec<4>(from + split * pixels * g.partial_pitch);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        sum.v[v] += part.v[v];
      }
    }
    const int64_t row = pixel / g.w;
    T* const to = static_cast<T*>(g.output) + row / g.h * g.s_output.n + row % g.h * g.s_output.h +
                  pixel % g.w * g.s_output.w;
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      if (c + v < g.columns) {
        const float value =
            sum.v[v] + (g.bias == nullptr ? 0.0f : load(static_cast<const T*>(g.bias) + c + v));
        store(to + (c + v) * g.s_output.c, g.relu ? relu(value) : value);
      }
    }
  }
}

template <class T, int kN, int kPlanes, bool kGradInput>
cudaError_t run(const WgmmaArgs& g, Stream stream) {
  const int64_t slots = std::max(1, current_gpu().multiprocessors / g.cluster);
  const auto grid = static_cast<unsigned>(std::min(g.tiles, slots) * g.cluster);
  const cudaError_t status = launch_clusters(wgmma_kernel<T, kN, kPlanes, kGradInput>,
                                             grid,
                                             kThreads,
                                             static_cast<unsigned>(g.cluster),
                                             sizeof(Shared<kN, kPlanes>),
                                             stream,
                                             g);
  if (status != cudaSuccess || g.splits == 1) {
    return status;
  }
  return launch(wgmma_sum_kernel<T>,
                grid_for(g.n * g.h * g.w * (g.partial_pitch / 4), 256),
                256,
                0,
                stream,
                g);
}

template <class T, int kPlanes, bool kGradInput>
cudaError_t run_tile(const WgmmaArgs& g, int tile_n, Stream stream) {
  if constexpr (kPlanes == 1) {
    if (tile_n == 256) {
      return run<T, 256, kPlanes, kGradInput>(g, stream);
    }
  }
  return tile_n == 128  ? run<T, 128, kPlanes, kGradInput>(g, stream)
         : tile_n == 64 ? run<T, 64, kPlanes, kGradInput>(g, stream)
                        : cudaErrorInvalidValue;
}

template <bool kGradInput>
cudaError_t run_parts(const WgmmaArgs& g, const WgmmaPlan& plan, Dtype dtype, Stream stream) {
  switch (plan.planes) {
    case 3:
      return run_tile<float, 3, kGradInput>(g, plan.tile_n, stream);
    case 2:
      return run_tile<float, 2, kGradInput>(g, plan.tile_n, stream);
    default:
      return dtype == Dtype::kFloat16
                 ? run_tile<__half, 1, kGradInput>(g, plan.tile_n, stream)
                 : run_tile<__nv_bfloat16, 1, kGradInput>(g, plan.tile_n, stream);
  }
}

// Maps of the parts of a tensor, of which `first` is the first.
template <class Make>
cudaError_t make_parts(CUtensorMap (&maps)[kMaxPlanes],
                       const Packed& first,
                       const Sizes4& sizes,
                       int planes,
                       Make&& make) {
  const TensorMapShape shape = map_shape(first.strides, sizes);
  cudaError_t status = cudaSuccess;
  for (int p = 0; p < planes && status == cudaSuccess; ++p) {
    status = make(
        maps[p], static_cast<const unsigned char*>(first.data) + p * plane_bytes(sizes), shape);
  }
  return status;
}

template <bool kGradInput>
Status launch_problem(const WgmmaProblem& p,
                      const WgmmaPlan& plan,
                      const Packed& a,
                      const Packed& b,
                      const void* bias,
                      bool relu,
                      void* output,
                      const Strides4& s_output,
                      float* partials,
                      Stream stream) {
  const auto narrow = [](int64_t value) { return static_cast<int>(value); };
  const bool runs = plan.box_h == 0;
  if (plan.cluster > 1 && plan.tile_n < 2 * kBoxColumns) {
    return cudaErrorInvalidValue;  // weights that cannot be halved
  }
  WgmmaArgs g{};
  g.runs = runs;
  g.bias = bias;
  g.output = output;
  g.s_output = s_output;
  g.n = p.n;
  g.h = narrow(p.y.size);
  g.w = narrow(p.x.size);
  g.columns = narrow(p.columns);
  g.h_a = narrow(p.y.size_a);
  g.w_a = narrow(p.x.size_a);
  g.k_channels = narrow(p.k_channels);
  g.k_h = narrow(p.y.k);
  g.k_w = narrow(p.x.k);
  g.dil_h = narrow(p.y.dil);
  g.dil_w = narrow(p.x.dil);
  g.pad_h = narrow(p.y.pad);
  g.pad_w = narrow(p.x.pad);
  g.box_h = plan.box_h;
  g.box_w = plan.box_w;
  g.row_tiles = wgmma_row_tiles(p, plan.box_h, plan.box_w);
  g.row_groups = tiles_of(g.row_tiles, plan.cluster);
  g.tiles = g.row_groups * tiles_of(p.columns, plan.tile_n) * plan.splits;
  g.splits = plan.splits;
  g.cluster = plan.cluster;
  g.partials = partials;
  g.partial_pitch = wgmma_partial_pitch(p.columns);
  g.relu = relu;

  const auto make_a = [&](CUtensorMap& map, const void* data, const TensorMapShape& shape) {
    return runs ? make_im2col_map(map,
                                  data,
                                  shape,
                                  {.lower = {-g.pad_w, -g.pad_h},
                                   .upper = {g.w - g.w_a - g.pad_w, g.h - g.h_a - g.pad_h},
                                   .channels = kStepK,
                                   .pixels = kM})
                : make_tiled_map(map, data, shape, {kStepK, plan.box_w, plan.box_h, 1});
  };
  const auto make_b = [&](CUtensorMap& map, const void* data, const TensorMapShape& shape) {
    const int rows = kGradInput ? kStepK : plan.tile_n / plan.cluster;
    return make_tiled_map(map, data, shape, {kStepK, 1, 1, rows});
  };
  cudaError_t status = make_parts(g.a, a, p.a, plan.planes, make_a);
  if (status == cudaSuccess) {
    status = make_parts(g.b, b, p.b, plan.planes, make_b);
  }
  // A run is neighbouring pixels of one long row, where rows and images follow on each other; maps
  // one pixel wide take the other way.
  const bool dense = (p.out.h == 1 || s_output.h == p.out.w * s_output.w) &&
                     (p.out.n == 1 || s_output.n == p.out.h * p.out.w * s_output.w);
  g.store_by_map =
      plan.splits == 1 && plan.planes == 1 && is_packed(output, s_output, p.out, p.dtype) &&
      tma_strides_fit(s_output, p.out) &&
      (!runs || (dense && p.out.w > 1 && p.n * p.out.h * p.out.w < (int64_t{1} << 31)));
  if (status == cudaSuccess && g.store_by_map) {
    status = runs ? make_tiled_map(g.out,
                                   output,
                                   map_shape(s_output, {1, p.out.c, 1, p.n * p.out.h * p.out.w}),
                                   {kSlabColumns<__half>, kM, 1, 1})
                  : make_tiled_map(g.out,
                                   output,
                                   map_shape(s_output, p.out),
                                   {kSlabColumns<__half>, plan.box_w, plan.box_h, 1});
  }
  if (status != cudaSuccess) {
    return status;
  }
  return run_parts<kGradInput>(g, plan, p.dtype, stream);
}

Packed operand(Workspace& workspace,
               const WgmmaPlan& plan,
               bool pack,
               const void* data,
               const Strides4& strides,
               const Sizes4& sizes) {
  return plan.planes > 1 ? workspace.split(plan.planes, data, strides, sizes)
                         : workspace.pack(pack, data, strides, sizes);
}

}  // namespace

Status launch_wgmma(const DilatedConv2dParams& p, const WgmmaPlan& plan, Stream stream) {
  const DilatedConv2dShape& s = p.shape;
  Workspace workspace(p.workspace, p.dtype, stream);
  const Packed a =
      operand(workspace, plan, plan.pack_input, p.input, p.input_strides, input_sizes(s));
  const Packed b =
      operand(workspace, plan, plan.pack_weight, p.weight, p.weight_strides, weight_sizes(s));
  if (workspace.status() != cudaSuccess) {
    return workspace.status();
  }
  return launch_problem<false>(wgmma_problem(p),
                               plan,
                               a,
                               b,
                               p.bias,
                               p.relu,
                               p.output,
                               p.output_strides,
                               workspace.rest(),
                               stream);
}

Status launch_wgmma(const DilatedConv2dGradInputParams& p, const WgmmaPlan& plan, Stream stream) {
  const DilatedConv2dShape& s = p.shape;
  Workspace workspace(p.workspace, p.dtype, stream);
  const Packed a = operand(
      workspace, plan, plan.pack_input, p.grad_output, p.grad_output_strides, output_sizes(s));
  const Packed b =
      operand(workspace, plan, plan.pack_weight, p.weight, p.weight_strides, weight_sizes(s));
  if (workspace.status() != cudaSuccess) {
    return workspace.status();
  }
  return launch_problem<true>(wgmma_problem(p),
                              plan,
                              a,
                              b,
                              nullptr,
                              false,
                              p.grad_input,
                              p.grad_input_strides,
                              workspace.rest(),
                              stream);
}

}  // namespace dilseg::cuda
