// SPDX-License-Identifier: Apache-2.0
//
// Gradient of the upsampling with respect to its input, a gather that reads grad_output once, for
// magnified channels_last maps in float and the half types:
//   grad_input[n,c,i,j] = sum_y wy(y,i) sum_x wx(x,j) grad_output[n,c,y,x]
// over exactly the outputs whose forward taps name (i, j); weights by the forward's own rule.
// A cell is the outputs with the same two lower taps (i, j): s * s of them, which lie between the
// input pixels (i, j) and (i + 1, j + 1) and contribute to those four only. One block owns a tile
// of input pixels and walks the rows of cells downwards; a thread takes a cell and a vector of
// channels (16 bytes; single channels if they fill no vectors) and makes its four sums. Those for
// the row above the next cells meet what the cells above left behind, in shared memory, and the
// neighbours along x are added there when the row is complete.
// Sums in float, in chains of at most 48 along an axis, in one fixed order; one rounding.
// Bytes: grad_input once, grad_output once plus the cells that neighbouring tiles share, one in
// tile_w and one in tile_h of them. Flops: 4 per output and 8 per cell and output row.
// Limits: axes and origins up to 2^16, scales up to about 32; 64-bit offsets.
// Source: the usual separable gather, reordered so that each element is read once.
#include "cuda/common/vec.cuh"
#include "cuda/upsample_add/tile.cuh"

#include <type_traits>

namespace dilseg::cuda {
namespace {

template <class T>
struct CellsArgs {
  UpsampleCellsPlan plan;
  const T* grad_output;
  T* grad_input;
};

template <class T, int kVector>
__global__ void __launch_bounds__(upsample_cell_threads(kVector), 2)
    upsample_backward_cells_kernel(CellsArgs<T> args) {
  // Rows of a cell summed side by side, for more loads under way where each is short.
  constexpr int kRows = kVector == 1 ? 4 : 1;
  const UpsampleCellsPlan& plan = args.plan;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  // Sums for the lower and for the upper column of every cell, [2, tile_w + 1, tile_c]: what the
  // cells above left behind, each element used by one thread only, and the complete row, twice.
  const int size = (plan.tile_w + 1) * plan.tile_c;
  float* carried = dynamic_shared<float>();
  float* complete = carried + 2 * size;
  auto* row_shares = reinterpret_cast<UpsampleShares*>(complete + 4 * size);   // [most_rows]
  UpsampleShares* column_shares = row_shares + plan.most_rows;                 // [most_columns]
  int* first_row = reinterpret_cast<int*>(column_shares + plan.most_columns);  // [tile_h + 2]
  int* first_column = first_row + plan.tile_h + 2;                             // [tile_w + 2]
  constexpr int kPart = kVector < 4 ? kVector : 4;  // floats of a vector of shared memory

  for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x) {
    int64_t rest = tile;
    const int c0 = static_cast<int>(rest % plan.tiles_c) * plan.tile_c;
    rest /= plan.tiles_c;
    const int j0 = static_cast<int>(rest % plan.tiles_w) * plan.tile_w;
    rest /= plan.tiles_w;
    const int i0 = static_cast<int>(rest % plan.tiles_h) * plan.tile_h;
    const int64_t image = rest / plan.tiles_h;
    const int width = min(plan.tile_w, plan.axis_w.size_in - j0);
    const int height = min(plan.tile_h, plan.axis_h.size_in - i0);
    const int inner = min(plan.tile_c, plan.channels - c0);
    const int vectors = inner / kVector;

    // Cell (r, p) has the lower taps (i0 - 1 + r, j0 - 1 + p); those before a clamped border are
    // empty. Outputs are counted from the first that the tile reads.
    const int y0 = upsample_first(plan.axis_h, i0 - 1);
    const int x0 = upsample_first(plan.axis_w, j0 - 1);
    const int rows = upsample_first(plan.axis_h, i0 + height) - y0;
    const int columns = upsample_first(plan.axis_w, j0 + width) - x0;
    __syncthreads();  // every read of the previous tile, before it is overwritten
    for (int r = thread; r < height + 2; r += threads) {
      first_row[r] = upsample_first(plan.axis_h, i0 - 1 + r) - y0;
    }
    for (int p = thread; p < width + 2; p += threads) {
      first_column[p] = upsample_first(plan.axis_w, j0 - 1 + p) - x0;
    }
    for (int y = thread; y < rows; y += threads) {
      const UpsampleShares shares = upsample_shares(plan.axis_h, y0 + y);
      row_shares[y].lower = shares.lower;
      row_shares[y].upper = shares.upper;
    }
    for (int x = thread; x < columns; x += threads) {
      const UpsampleShares shares = upsample_shares(plan.axis_w, x0 + x);
      column_shares[x].lower = shares.lower;
      column_shares[x].upper = shares.upper;
    }
    __syncthreads();  // every write of the shares, before their first read
    const T* source = args.grad_output + image * plan.output.plane + y0 * plan.output.row +
                      static_cast<int64_t>(x0) * plan.channels + c0;
    T* target = args.grad_input + image * plan.input.plane + i0 * plan.input.row +
                static_cast<int64_t>(j0) * plan.channels + c0;

    for (int r = 0; r <= height; ++r) {
      float* row = complete + (r % 2) * 2 * size;
      for (int item = thread; item < (width + 1) * vectors; item += threads) {
        const int p = item / vectors;
        const int c = item % vectors * kVector;
        const int begin = first_column[p];
        const int end = first_column[p + 1];
        // To the row and column of the lower taps (l) and of those after them (u).
        float ll[kVector] = {}, lu[kVector] = {}, ul[kVector] = {}, uu[kVector] = {};
        const int rows_end = first_row[r + 1];
        for (int y = first_row[r]; y < rows_end; y += kRows) {
          const T* from = source + y * plan.output.row + c;
          float to_lower[kRows][kVector] = {}, to_upper[kRows][kVector] = {};
#pragma unroll 4
          for (int x = begin; x < end; ++x) {
            const UpsampleShares shares = column_shares[x];
#pragma unroll
            for (int k = 0; k < kRows; ++k) {
              // A row behind the cell's last adds zeros; a select, so that all loads go out
              // together.
              Vec<T, kVector> loaded{};
              if (k == 0 || y + k < rows_end) {
                loaded = load_vec<kVector>(from + k * plan.output.row +
                                           static_cast<int64_t>(x) * plan.channels);
              }
#pragma unroll
              for (int v = 0; v < kVector; ++v) {
                const float value = load(&loaded.v[v]);
                to_lower[k][v] += shares.lower * value;
                to_upper[k][v] += shares.upper * value;
              }
            }
          }
#pragma unroll
          for (int k = 0; k < kRows; ++k) {
            if (k > 0 && y + k >= rows_end) {
              continue;
            }
            const UpsampleShares shares = row_shares[y + k];
#pragma unroll
            for (int v = 0; v < kVector; ++v) {
              ll[v] += shares.lower * to_lower[k][v];
              lu[v] += shares.lower * to_upper[k][v];
              ul[v] += shares.upper * to_lower[k][v];
              uu[v] += shares.upper * to_upper[k][v];
            }
          }
        }
#pragma unroll
        for (int part = 0; part < kVector; part += kPart) {
          const int at = p * inner + c + part;
          if (r > 0) {
            auto lower = load_vec<kPart>(carried + at);
            auto upper = load_vec<kPart>(carried + size + at);
#pragma unroll
            for (int v = 0; v < kPart; ++v) {
              lower.v[v] += ll[part + v];
              upper.v[v] += lu[part + v];
            }
            store_vec<kPart>(row + at, lower);
            store_vec<kPart>(row + size + at, upper);
          }
          Vec<float, kPart> lower, upper;
#pragma unroll
          for (int v = 0; v < kPart; ++v) {
            lower.v[v] = ul[part + v];
            upper.v[v] = uu[part + v];
          }
          store_vec<kPart>(carried + at, lower);
          store_vec<kPart>(carried + size + at, upper);
        }
      }
      if (r == 0) {
        continue;  // the cells above the tile only leave something behind
      }
      // Every write of the row before its first read. The row before it has been read when this
      // barrier is passed, so two are enough.
      __syncthreads();
      for (int item = thread; item < width * vectors; item += threads) {
        const int j = item / vectors;
        const int c = item % vectors * kVector;
        Vec<T, kVector> result;
#pragma unroll
        for (int part = 0; part < kVector; part += kPart) {
          const auto left = load_vec<kPart>(row + size + j * inner + c + part);
          const auto right = load_vec<kPart>(row + (j + 1) * inner + c + part);
#pragma unroll
          for (int v = 0; v < kPart; ++v) {
            store(&result.v[part + v], left.v[v] + right.v[v]);
          }
        }
        store_vec<kVector>(
            target + (r - 1) * plan.input.row + static_cast<int64_t>(j) * plan.channels + c,
            result);
      }
    }
  }
}

}  // namespace

cudaError_t launch_upsample_backward_cells(const UpsampleAddBackwardParams& p,
                                           const UpsampleCellsPlan& plan,
                                           Stream stream) {
  return dispatch_dtype(p.dtype, [&]<class T>() {
    if constexpr (std::is_same_v<T, double>) {
      return cudaErrorInvalidValue;
    } else {
      const CellsArgs<T> args{
          plan, static_cast<const T*>(p.grad_output), static_cast<T*>(p.grad_input)};
      const auto kernel = plan.vector == 1 ? &upsample_backward_cells_kernel<T, 1>
                                           : &upsample_backward_cells_kernel<T, 16 / sizeof(T)>;
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
