// SPDX-License-Identifier: Apache-2.0
//
// The transforms of Winograd's F(2x2, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional
// Neural Networks", 2015) for dilated convolutions: the pixels of one phase of the dilation are a
// map of their own, and the results of the same phase its undilated convolution. Tiles of 2x2
// results need 16 products per channel instead of 36:
//   U[k] = (G g G^T)[k]     V[k] = (B^T d B)[k]     M[k] = U[k] V[k]     results = A^T M A + bias
// for k < 16, where U[k] is [results' channels][source's channels], V[k] [channels][tiles] and M[k]
// [channels][tiles]; the caller multiplies. A piece is a band of tile rows of one phase of one
// image, a chunk is several pieces. No include guard, see cpu/instruction_sets.h.
#include "cpu/padded_planes.h"

// Values that pass through local memory at once: whole cache lines of each of 16 streams.
constexpr int64_t kBlock = 64;

inline Layout tile_layout(const WinogradParams& p, int64_t phase_h, int64_t phase_w) {
  const auto axis = [](int64_t dilation, int64_t pad, int64_t size, int64_t results) {
    return forward_axis(4, dilation, 2 * dilation, pad, size, results);
  };
  return {axis(p.dil_h, p.pad_top - phase_h, p.h_in, ceil_div(ceil_div(p.h_out, p.dil_h), 2)),
          axis(p.dil_w, p.pad_left - phase_w, p.w_in, ceil_div(ceil_div(p.w_out, p.dil_w), 2)),
          kWinogradBand};
}

// Where a piece lies.
struct Piece {
  Piece(const WinogradParams& p, const WinogradPlan& plan, int64_t piece)
      : band(piece % plan.bands),
        phase_w(piece / plan.bands % plan.phases_w),
        phase_h(piece / plan.bands / plan.phases_w % plan.phases_h),
        n(piece / plan.bands / plan.phases_w / plan.phases_h),
        layout(tile_layout(p, phase_h, phase_w)) {}

  int64_t band, phase_w, phase_h, n;
  Layout layout;
};

inline WinogradPlan plan_of(const WinogradParams& p) {
  const Layout layout = tile_layout(p, 0, 0);
  WinogradPlan plan;
  plan.phases_h = std::min(p.dil_h, p.h_out);
  plan.phases_w = std::min(p.dil_w, p.w_out);
  plan.bands = layout.bands;
  plan.rows = layout.rows;
  plan.columns = layout.w.count;
  return plan;
}

// [3] to [4] by G, in steps of `step` values.
template <class V>
DILSEG_INLINE void transform_weight(const V* g, int64_t from_step, V* u, int64_t step) {
  const V ends = (g[0] + g[2 * from_step]) * 0.5f;
  const V middle = g[from_step] * 0.5f;
  u[0] = g[0];
  u[step] = ends + middle;
  u[2 * step] = ends - middle;
  u[3 * step] = g[2 * from_step];
}

inline void winograd_weight(const WinogradParams& p, float* u, const ParallelFor& pool) {
  const Strides4& s = p.weight_strides;
  parallel_for(pool, p.c_out, 1, [&](int64_t begin, int64_t end) {
    float g[9][kBlock] = {};
    float result[16][kBlock];
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t first = 0; first < p.c_in; first += kBlock) {
        const int64_t count = std::min(kBlock, p.c_in - first);
        for (int64_t c = 0; c < count; ++c) {
          const float* from = p.weight + o * s.n + (first + c) * s.c;
          for (int64_t k = 0; k < 9; ++k) {
            g[k][c] = from[k / 3 * s.h + k % 3 * s.w];
          }
        }
        for (int64_t c = 0; c < kBlock; c += kLanes<float>) {
          Vec<float> taps[9], rows[12], all[16];
          for (int64_t k = 0; k < 9; ++k) {
            taps[k] = vec_load(g[k] + c);
          }
          for (int64_t j = 0; j < 3; ++j) {
            transform_weight(taps + j, 3, rows + j, 3);
          }
          for (int64_t i = 0; i < 4; ++i) {
            transform_weight(rows + 3 * i, 1, all + 4 * i, 1);
          }
          for (int64_t k = 0; k < 16; ++k) {
            vec_store(result[k] + c, all[k]);
          }
        }
        for (int64_t k = 0; k < 16; ++k) {
          std::copy_n(result[k], count, u + (k * p.c_out + o) * p.c_in + first);
        }
      }
    }
  });
}

// [4] to [4] by B^T.
DILSEG_INLINE void transform_input(const Vec<float>* d, Vec<float>* v, int64_t step) {
  v[0] = d[0] - d[2 * step];
  v[step] = d[step] + d[2 * step];
  v[2 * step] = d[2 * step] - d[step];
  v[3 * step] = d[step] - d[3 * step];
}

inline void winograd_input(const WinogradParams& p,
                           const WinogradPlan& plan,
                           int64_t first_piece,
                           int64_t pieces,
                           const WinogradMatrix& v,
                           const ParallelFor& pool) {
  parallel_for(pool, p.c_in, 1, [&](int64_t begin, int64_t end) {
    std::vector<Piece> all;
    std::vector<Source<float>> sources;
    all.reserve(static_cast<size_t>(pieces));
    sources.reserve(static_cast<size_t>(pieces));
    for (int64_t q = 0; q < pieces; ++q) {
      all.emplace_back(p, plan, first_piece + q);
      sources.emplace_back(all.back().layout, 1);
    }
    for (int64_t c = begin; c < end; ++c) {
      float* to = v.data + c * v.row;
      for (size_t q = 0; q < all.size(); ++q) {
        const Layout& layout = all[q].layout;
        sources[q].fill(
            0, all[q].band, map_at(p.source, p.source_strides, all[q].n, c), p.source_strides);
        const float* places[16];
        for (size_t k = 0; k < 16; ++k) {
          places[k] = sources[q].get() +
                      sources[q].offset(0, layout.h.phases[0][k / 4], layout.w.phases[0][k % 4]);
        }
        for (int64_t r = 0; r < plan.rows; ++r) {
          // The last vector of a row may reach into what is written next.
          for (int64_t x = 0; x < plan.columns; x += kLanes<float>) {
            Vec<float> d[16], rows[16];
            for (int64_t k = 0; k < 16; ++k) {
              d[k] = vec_load(places[k] + r * layout.pitch + x);
            }
            for (int64_t j = 0; j < 4; ++j) {
              transform_input(d + j, rows + j, 4);
            }
            for (int64_t i = 0; i < 4; ++i) {
              transform_input(rows + 4 * i, d + 4 * i, 1);
            }
            for (int64_t k = 0; k < 16; ++k) {
              vec_store(to + k * v.matrix + x, d[k]);
            }
          }
          to += plan.columns;
        }
      }
    }
  });
}

// [4] to [2] by A^T.
DILSEG_INLINE void transform_output(const Vec<float>* m,
                                    int64_t from_step,
                                    Vec<float>* y,
                                    int64_t step) {
  y[0] = m[0] + m[from_step] + m[2 * from_step];
  y[step] = m[from_step] - m[2 * from_step] - m[3 * from_step];
}

inline bool winograd_output(const WinogradParams& p,
                            const WinogradPlan& plan,
                            int64_t first_piece,
                            int64_t pieces,
                            const WinogradMatrix& m,
                            const ParallelFor& pool) {
  const int64_t tiles = plan.tiles();
  const int64_t count = pieces * tiles;
  std::vector<char> finite(static_cast<size_t>(p.c_out));
  parallel_for(pool, p.c_out, 1, [&](int64_t begin, int64_t end) {
    const int64_t padded = round_up(count, kBlock);
    Aligned<float> results(4 * padded);  // [2][2][pieces][tiles]
    float block[16][kBlock] = {};
    for (int64_t o = begin; o < end; ++o) {
      const Vec<float> bias = vec_set(p.bias == nullptr ? 0.0f : p.bias[o]);
      Vec<float> check{};
      for (int64_t f = 0; f < count; f += kBlock) {
        const int64_t some = std::min(kBlock, count - f);
        for (int64_t k = 0; k < 16; ++k) {
          std::copy_n(m.data + k * m.matrix + o * m.row + f, some, block[k]);
        }
        for (int64_t x = 0; x < some; x += kLanes<float>) {
          Vec<float> all[16], rows[8], y[4];
          for (int64_t k = 0; k < 16; ++k) {
            all[k] = vec_load(block[k] + x);
          }
          for (int64_t j = 0; j < 4; ++j) {
            transform_output(all + j, 4, rows + j, 4);
          }
          for (int64_t i = 0; i < 2; ++i) {
            transform_output(rows + 4 * i, 1, y + 2 * i, 1);
          }
          for (int64_t k = 0; k < 4; ++k) {
            const Vec<float> value = y[k] + bias;
            check = check + value * 0.0f;  // nan where not finite
            vec_store(results.get() + k * padded + f + x,
                      p.relu ? vec_max<float>(value, Vec<float>{}) : value);
          }
        }
      }
      bool good = true;
      for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
        good = good && check[lane] == 0.0f;
      }
      finite[static_cast<size_t>(o)] = good;
      for (int64_t q = 0; q < pieces; ++q) {
        const Piece piece(p, plan, first_piece + q);
        float* map = map_at(p.result, p.result_strides, piece.n, o);
        for (int64_t r = 0; r < 2 * plan.rows; ++r) {
          const int64_t y = piece.phase_h + (2 * piece.band * plan.rows + r) * p.dil_h;
          if (y >= p.h_out) {
            break;
          }
          for (int64_t b = 0; b < 2; ++b) {
            const int64_t x = piece.phase_w + b * p.dil_w;
            const float* from =
                results.get() + (r % 2 * 2 + b) * padded + q * tiles + r / 2 * plan.columns;
            write_line(from,
                       std::max<int64_t>(0, ceil_div(p.w_out - x, 2 * p.dil_w)),
                       map + y * p.result_strides.h + x * p.result_strides.w,
                       2 * p.dil_w * p.result_strides.w);
          }
        }
      }
    }
  });
  return std::find(finite.begin(), finite.end(), 0) == finite.end();
}
