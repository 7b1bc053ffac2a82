// SPDX-License-Identifier: Apache-2.0
//
// The upsampled values of all channels over a tile of neighbouring pixels, one output row after
// another, without the upsampled map: what upsample_cross_entropy and upsample_argmax share. No
// include guard, see cpu/instruction_sets.h.
#include "cpu/interpolation.h"

// Input rows stretched along x over the outputs [begin, begin + count), [c][pitch] each: the two
// that the current output row blends. `Row` says what else is kept with a row.
template <class A>
struct StretchedRow {
  static constexpr int32_t kNone = -2;
  StretchedRow(int64_t size) : values(size) {}
  int32_t index = kNone;
  Aligned<A> values;
};

// A tile's extent, the same for every row of it.
struct TileColumns {
  int64_t begin, count;
  int64_t first_input, last_input;  // of the input columns that it reads; none if last < first
};

template <class A>
TileColumns tile_columns(const Stretch<A>& stretch, int64_t begin, int64_t count) {
  TileColumns tile{begin, count, stretch.size_in(), -1};
  for (int64_t x = begin; x < begin + count; ++x) {
    for (const int32_t i : {stretch.tap(x).i0, stretch.tap(x).i1}) {
      if (i >= 0) {
        tile.first_input = std::min<int64_t>(tile.first_input, i);
        tile.last_input = std::max<int64_t>(tile.last_input, i);
      }
    }
  }
  return tile;
}

// Pixels of a tile: enough that its edges cost little, few enough that its rows stay in a
// second-level cache.
constexpr int64_t upsampled_tile_pixels(int64_t c) {
  return std::clamp<int64_t>(round_up(16384 / c, 16), 16, 256);
}

// Stretches row `index` of one image's input, c channels, into values[k * pitch + x - begin]; the
// row -1, beyond a zero border, is zeros. `source` has stretch.input_size() values.
template <class T, class A>
void stretch_channels(const Stretch<A>& stretch,
                      const TileColumns& tile,
                      const T* image,
                      const Strides4& s,
                      int64_t c,
                      int32_t index,
                      A* __restrict source,
                      A* __restrict values,
                      int64_t pitch) {
  source[stretch.size_in()] = A(0);  // beyond a zero border
  for (int64_t k = 0; k < c; ++k, values += pitch) {
    if (index < 0) {
      std::fill_n(values, pitch, A(0));
      continue;
    }
    const T* line = image + k * s.c + index * s.h;
    for (int64_t j = tile.first_input; j <= tile.last_input; ++j) {
      source[j] = load(line + j * s.w);
    }
    stretch.row(source, values, tile.begin, tile.begin + tile.count);
  }
}
