// SPDX-License-Identifier: Apache-2.0
//
// label[n,y,x] = argmax_k z_k, confidence[n,y,x] = 1 / sum_k exp(z_k - max_j z_j), where
// z_k = sum_ij wy(y,i) wx(x,j) input[n,k,i,j]. A thread owns a band of output rows of one image and
// takes them in tiles of neighbouring pixels: the two input rows that an output row blends are
// stretched along x once and kept. No upsampled value is stored. No include guard, see
// cpu/instruction_sets.h.
#include "cpu/upsampled_tile.h"

// Output rows of one thread's task.
constexpr int64_t kBandRows = 32;

// The first class with the largest value, or the first nan, of the pixels of one vector.
template <class A>
struct Winner {
  Vec<A> value;
  VecInt<A> label;
};

template <class A>
DILSEG_INLINE Winner<A> find_winner(
    const A* row0, const A* row1, A w0, A w1, int64_t c, int64_t pitch) {
  Winner<A> best{w0 * vec_load(row0) + w1 * vec_load(row1), VecInt<A>{}};
  for (int64_t k = 1; k < c; ++k) {
    const Vec<A> value = w0 * vec_load(row0 + k * pitch) + w1 * vec_load(row1 + k * pitch);
    // Written so that a nan wins over numbers, and nothing over a nan.
    const VecInt<A> better = ~(value <= best.value) & (best.value == best.value);
    best.value = better ? value : best.value;
    const VecInt<A> label = VecInt<A>{} + static_cast<decltype(best.label[0] + 0)>(k);
    best.label = better ? label : best.label;
  }
  return best;
}

inline void write_labels(const UpsampleArgmaxParams& params,
                         int64_t pixel,
                         const int64_t* __restrict labels,
                         int64_t count) {
  switch (params.label_type) {
    case IndexType::kInt64:
      std::copy_n(labels, count, static_cast<int64_t*>(params.label) + pixel);
      return;
    case IndexType::kInt32:
      std::transform(
          labels, labels + count, static_cast<int32_t*>(params.label) + pixel, [](int64_t label) {
            return static_cast<int32_t>(label);
          });
      return;
    case IndexType::kUInt8:
      std::transform(
          labels, labels + count, static_cast<uint8_t*>(params.label) + pixel, [](int64_t label) {
            return static_cast<uint8_t>(label);
          });
  }
}

template <class T>
void argmax(const UpsampleArgmaxParams& params, const ParallelFor& pool) {
  using A = acc_t<T>;
  const UpsampleGeometry& g = params.geometry;
  const UpsampleAxes<A> axes(g);
  const auto taps_h = all_taps(axes.h);
  const Stretch<A> stretch(axes.w);
  const int64_t capacity = upsampled_tile_pixels(g.c);
  const int64_t pitch = capacity + 64 / static_cast<int64_t>(sizeof(A));
  const int64_t bands = (g.h_out + kBandRows - 1) / kBandRows;
  const auto* input = static_cast<const T*>(params.input);
  auto* confidence = static_cast<A*>(params.confidence);

  const auto run = [&](int64_t begin, int64_t end) {
    StretchedRow<A> rows[2] = {StretchedRow<A>(g.c * pitch), StretchedRow<A>(g.c * pitch)};
    Aligned<A> source(stretch.input_size()), shares(pitch);
    std::vector<int64_t> labels(static_cast<size_t>(pitch));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bands;
      const int64_t first_y = task % bands * kBandRows;
      const int64_t last_y = std::min(first_y + kBandRows, g.h_out);
      const T* image = input + n * params.input_strides.n;
      for (int64_t x = 0; x < g.w_out; x += capacity) {
        const TileColumns tile = tile_columns(stretch, x, std::min(capacity, g.w_out - x));
        rows[0].index = rows[1].index = StretchedRow<A>::kNone;
        const auto row = [&](int32_t index, int32_t keep) -> const A* {
          for (StretchedRow<A>& kept : rows) {
            if (kept.index == index) {
              return kept.values.get();
            }
          }
          StretchedRow<A>& fresh = rows[rows[0].index == keep ? 1 : 0];
          fresh.index = index;
          stretch_channels(stretch,
                           tile,
                           image,
                           params.input_strides,
                           g.c,
                           index,
                           source.get(),
                           fresh.values.get(),
                           pitch);
          return fresh.values.get();
        };
        for (int64_t y = first_y; y < last_y; ++y) {
          const UpsampleTaps<A>& tap = taps_h[static_cast<size_t>(y)];
          const A* row0 = row(tap.i0, tap.i1);
          const A* row1 = row(tap.i1, tap.i0);
          const int64_t pixel = (n * g.h_out + y) * g.w_out + x;
          for (int64_t b = 0; b < tile.count; b += kLanes<A>) {
            const Winner<A> best = find_winner(row0 + b, row1 + b, tap.w0, tap.w1, g.c, pitch);
            for (int64_t i = 0; i < kLanes<A>; ++i) {
              labels[static_cast<size_t>(b + i)] = best.label[i];
            }
            if (confidence == nullptr) {
              continue;
            }
            Vec<A> sum{};
            for (int64_t k = 0; k < g.c; ++k) {
              const Vec<A> value =
                  tap.w0 * vec_load(row0 + b + k * pitch) + tap.w1 * vec_load(row1 + b + k * pitch);
              sum = sum + vec_exp(value - best.value);
            }
            vec_store(shares.get() + b, A(1) / sum);
          }
          write_labels(params, pixel, labels.data(), tile.count);
          if (confidence != nullptr) {
            std::copy_n(shares.get(), tile.count, confidence + pixel);
          }
        }
      }
    }
  };
  parallel_for(pool, g.n * bands, 1, run);
}

inline void upsample_argmax(const UpsampleArgmaxParams& params, const ParallelFor& pool) {
  dispatch_dtype(params.dtype, [&]<class T>() { argmax<T>(params, pool); });
}
