// SPDX-License-Identifier: Apache-2.0
//
// Gradient of the upsampling with respect to its input, a gather that reads grad_output once, for
// magnified contiguous maps in float and the half types:
//   grad_input[n,c,i,j] = sum_x wx(x,j) sum_y wy(y,i) grad_output[n,c,y,x]
// over exactly the outputs whose forward taps name (i, j); weights by the forward's own rule.
// One block owns a strip of input columns in a segment of input rows, of one plane or of several
// side by side if they are narrow. Each thread marches down the rows of grad_output at one vector
// of columns (16 bytes; single elements where rows begin elsewhere). An output row has two taps, i
// and i + 1, so it is read once and added to two sums in registers. When rows begin to name i + 1
// and i + 2, the sums of i are complete: they go to shared memory, where each thread gathers the
// columns that read its input pixels. Rows are loaded 8 (or 16) at a time while as many before them
// are summed.
// Sums in float, in chains of at most 32 that join a total, in one fixed order; one rounding.
// Bytes: grad_output and grad_input once, plus what two strips (or segments) share: the outputs
// between their neighbouring pixels, 1/tile_w (or 1/tile_h) of what they read. A map of up to 128
// vectors per row is one strip. Flops: 4 per output and 4 per output column of an input row.
// Limits: axes and origins up to 2^16; 64-bit offsets.
// Source: the usual separable gather, reordered so that each element is read once.
#include "cuda/common/vec.cuh"
#include "cuda/upsample_add/tile.cuh"

#include <type_traits>

namespace dilseg::cuda {
namespace {

template <class T>
struct ColumnsArgs {
  UpsampleColumnsPlan plan;
  const T* grad_output;
  T* grad_input;
};

// Sum of weights * sums over [begin, end).
__device__ __forceinline__ float gather_columns(const float* weights,
                                                const float* sums,
                                                int begin,
                                                int end) {
  float total = 0;
  for (int first = begin; first < end; first += kUpsampleChain) {
    float chain = 0;
    for (int x = first; x < min(first + kUpsampleChain, end); ++x) {
      chain += weights[upsample_padded(x)] * sums[upsample_padded(x)];
    }
    total += chain;
  }
  return total;
}

// What one thread has summed of its columns: for the lower tap of the current rows, and for the
// pixel after it.
template <int kVector>
struct ColumnSums {
  float lower[kVector], upper[kVector];              // chains that have ended
  float lower_chain[kVector], upper_chain[kVector];  // the running ones

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      lower[v] = upper[v] = lower_chain[v] = upper_chain[v] = 0;
    }
  }
  __device__ __forceinline__ void join() {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      lower[v] += lower_chain[v];
      upper[v] += upper_chain[v];
      lower_chain[v] = upper_chain[v] = 0;
    }
  }
  // The pixel after the lower tap becomes the lower tap. After join().
  __device__ __forceinline__ void advance() {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      lower[v] = upper[v];
      upper[v] = 0;
    }
  }
};

template <class T, int kVector>
__global__ void __launch_bounds__(upsample_column_threads(kVector), kVector == 1 ? 2 : 4)
    upsample_backward_columns_kernel(ColumnsArgs<T> args) {
  constexpr int kBatch = upsample_column_batch(kVector);
  static_assert(kUpsampleRowsHeld % kBatch == 0);
  const UpsampleColumnsPlan& plan = args.plan;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int line = upsample_padded(plan.vectors * kVector);
  auto* rows = dynamic_shared<Vec<T, kVector>>();  // [kBatch, threads], own slots only
  auto* row_lower = reinterpret_cast<int*>(rows + kBatch * threads);
  auto* row_shares = reinterpret_cast<float*>(row_lower + kUpsampleRowsHeld);  // lower, upper
  float* lower_weights = row_shares + 2 * kUpsampleRowsHeld;                   // [line]
  float* upper_weights = lower_weights + line;                                 // [line]
  float* sums = upper_weights + line;                                          // [2, lanes, line]
  auto* first_column = reinterpret_cast<int*>(sums + 2 * plan.lanes * line);   // [tile_w + 2]

  const int lane = thread / plan.vectors;
  const int vector = thread % plan.vectors;
  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    const int j0 = static_cast<int>(tile % plan.strips) * plan.tile_w;
    const int64_t rest = tile / plan.strips;
    const int i0 = static_cast<int>(rest % plan.segments) * plan.tile_h;
    const int64_t plane = rest / plan.segments * plan.lanes + lane;
    const int width = min(plan.tile_w, plan.axis_w.size_in - j0);
    const int i1 = min(i0 + plan.tile_h, plan.axis_h.size_in);
    const bool active = lane < plan.lanes && plane < plan.planes;

    // The strip's columns begin at a vector of the row.
    const int columns_begin = upsample_first(plan.axis_w, j0 - 1) / kVector * kVector;
    const int columns_end = upsample_first(plan.axis_w, j0 + width);
    __syncthreads();  // every read of the previous tile, before it is overwritten
    for (int j = thread; j < width + 2; j += threads) {
      first_column[j] = upsample_first(plan.axis_w, j0 - 1 + j) - columns_begin;
    }
    for (int x = thread; x < columns_end - columns_begin; x += threads) {
      const UpsampleShares shares = upsample_shares(plan.axis_w, columns_begin + x);
      lower_weights[upsample_padded(x)] = shares.lower;
      upper_weights[upsample_padded(x)] = shares.upper;
    }
    const int y0 = upsample_first(plan.axis_h, i0 - 1);
    const int y1 = upsample_first(plan.axis_h, i1);
    const int column = columns_begin + vector * kVector;
    const bool sums_columns = active && column < columns_end;
    const T* source = args.grad_output + plane * plan.output.plane + column;
    T* target = args.grad_input + plane * plan.input.plane + j0;

    Vec<T, kVector> held[kBatch];
    const auto fetch = [&](int y) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        if (sums_columns && y + k < y1) {
          held[k] = load_vec<kVector>(source + (y + k) * plan.output.row);
        }
      }
    };
    ColumnSums<kVector> own;
    own.clear();
    int lower = i0 - 1;  // the input row that `own.lower` belongs to
    int terms = 0;       // of the running chains
    int buffer = 0;
    // Writes input row `lower` if it is the segment's, and goes on to the next.
    const auto finish = [&] {
      own.join();
      if (lower >= i0) {
        float* line_sums = sums + (buffer * plan.lanes + lane) * line;
        if (sums_columns) {
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            line_sums[upsample_padded(vector * kVector + v)] = own.lower[v];
          }
        }
        // Every write of the sums before their first read. Those of the row before have been read
        // when the next row's barrier is passed, so two buffers are enough.
        __syncthreads();
        if (active) {
          for (int j = vector; j < width; j += plan.vectors) {
            const float total =
                gather_columns(upper_weights, line_sums, first_column[j], first_column[j + 1]) +
                gather_columns(lower_weights, line_sums, first_column[j + 1], first_column[j + 2]);
            store(target + lower * plan.input.row + j, total);
          }
        }
        buffer ^= 1;
      }
      own.advance();
      terms = 0;
      ++lower;
    };

    fetch(y0);
    for (int batch = y0; batch < y1; batch += kBatch) {
      if (sums_columns) {
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (batch + k < y1) {
            rows[k * threads + thread] = held[k];
          }
        }
      }
      fetch(batch + kBatch);
      const int slot = (batch - y0) % kUpsampleRowsHeld;
      if (slot == 0) {
        __syncthreads();  // every read of the shares, before they are overwritten
        for (int r = thread; r < min(kUpsampleRowsHeld, y1 - batch); r += threads) {
          const UpsampleShares shares = upsample_shares(plan.axis_h, batch + r);
          row_lower[r] = upsample_lower(plan.axis_h, upsample_source(plan.axis_h, batch + r));
          row_shares[2 * r] = shares.lower;
          row_shares[2 * r + 1] = shares.upper;
        }
        __syncthreads();  // every write of the shares, before their first read
      }
      for (int k = 0; k < min(kBatch, y1 - batch); ++k) {
        const int next = row_lower[slot + k];
        while (lower < next) {
          finish();
        }
        if (terms == kUpsampleChain) {
          own.join();
          terms = 0;
        }
        ++terms;
        if (sums_columns) {
          const float to_lower = row_shares[2 * (slot + k)];
          const float to_upper = row_shares[2 * (slot + k) + 1];
          const Vec<T, kVector> row = rows[k * threads + thread];
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            const float value = load(&row.v[v]);
            own.lower_chain[v] += to_lower * value;
            own.upper_chain[v] += to_upper * value;
          }
        }
      }
    }
    while (lower < i1) {
      finish();
    }
  }
}

}  // namespace

cudaError_t launch_upsample_backward_columns(const UpsampleAddBackwardParams& p,
                                             const UpsampleColumnsPlan& plan,
                                             Stream stream) {
  return dispatch_dtype(p.dtype, [&]<class T>() {
    if constexpr (std::is_same_v<T, double>) {
      return cudaErrorInvalidValue;
    } else {
      const ColumnsArgs<T> args{
          plan, static_cast<const T*>(p.grad_output), static_cast<T*>(p.grad_input)};
      const auto kernel = plan.vector == 1 ? &upsample_backward_columns_kernel<T, 1>
                                           : &upsample_backward_columns_kernel<T, 16 / sizeof(T)>;
      return launch(kernel,
                    grid_for(plan.tiles, 1),
                    static_cast<unsigned>(plan.threads),
                    static_cast<size_t>(plan.shared_bytes),
                    stream,
                    args);
    }
  });
}

}  // namespace dilseg::cuda
