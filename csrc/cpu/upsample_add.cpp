// SPDX-License-Identifier: Apache-2.0
//
// output[n,c,y,x] = sum_ij wy(y,i) wx(x,j) input[n,c,i,j] + skip[n,c,y+offset_h,x+offset_w], and
// its gradient, on the CPU. Both directions work on lines: one (n, c, y) row of w pixels, or, when
// the tensor written is channels_last, one (n, y) row of w * c values. Forward widens an input row,
// stretches it along x once, keeps the last two stretched rows, and blends them for each output
// row. Backward gathers: the output rows that read an input row are summed with their weights, then
// the sum is gathered along x. A line belongs to one thread, so results do not depend on the number
// of threads.
#include "dilseg/upsample_add.h"

#include "cpu/dtype.h"
#include "dilseg/upsample_index.h"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace dilseg::cpu {
namespace {

// Terms added in one chain before they join the total: keeps the rounding of long sums (a 64x
// upsampling, a map reduced to one pixel) at the level of short ones.
constexpr int32_t kChain = 32;
// Values a thread should own at least.
constexpr int64_t kGrain = 32768;

// The layout of lines: x-major pixels of `inner` channels each.
struct Lines {
  int64_t inner;  // channels inside a line: c for channels_last, else 1
  int64_t outer;  // channels outside: 1 or c

  Lines(const Strides4& written, int64_t c)
      : inner(written.c == 1 && c > 1 ? c : 1), outer(inner == 1 ? c : 1) {}
};

template <class P>
P* line_at(P* base, const Strides4& s, int64_t n, int64_t c, int64_t y) {
  return base + n * s.n + c * s.c + y * s.h;
}

bool is_dense(const Strides4& s, int64_t inner) { return s.w == inner && (inner == 1 || s.c == 1); }

// fn(line index, tensor offset) over one line, in the order of the line.
template <class F>
void for_line(int64_t w, int64_t inner, const Strides4& s, F&& fn) {
  if (is_dense(s, inner)) {
    for (int64_t k = 0; k < w * inner; ++k) {
      fn(k, k);
    }
  } else {
    for (int64_t x = 0; x < w; ++x) {
      for (int64_t c = 0; c < inner; ++c) {
        fn(x * inner + c, x * s.w + c * s.c);
      }
    }
  }
}

template <class A>
std::vector<UpsampleTaps<A>> all_taps(const UpsampleAxis<A>& axis) {
  std::vector<UpsampleTaps<A>> taps(static_cast<size_t>(axis.size_out));
  for (int32_t dst = 0; dst < axis.size_out; ++dst) {
    taps[static_cast<size_t>(dst)] = upsample_taps(axis, dst);
  }
  return taps;
}

template <class A>
struct Axes {
  UpsampleAxis<A> h, w;

  explicit Axes(const UpsampleGeometry& g)
      : h(make_upsample_axis<A>(g.h_in, g.h_out, g.origin_h, g.scale_h, g.align_corners, g.border)),
        w(make_upsample_axis<A>(
            g.w_in, g.w_out, g.origin_w, g.scale_w, g.align_corners, g.border)) {}
};

// Stretched input rows of one plane, the last two of them kept.
template <class T>
class RowCache {
 public:
  using A = acc_t<T>;

  RowCache(const UpsampleAddParams& params, const std::vector<UpsampleTaps<A>>& taps, int64_t inner)
      : params_(params),
        taps_(taps),
        inner_(inner),
        zero_slot_(params.geometry.w_in),
        source_(static_cast<size_t>((params.geometry.w_in + 1) * inner)) {
    for (auto& row : rows_) {
      row.values.resize(static_cast<size_t>(params.geometry.w_out * inner));
    }
  }

  void enter_plane(const T* plane) {
    plane_ = plane;
    rows_[0].index = rows_[1].index = kNone;
  }

  // The stretched row `index`; -1 is the row of zeros beyond the border. `keep` is not evicted.
  const A* get(int32_t index, int32_t keep) {
    for (const auto& row : rows_) {
      if (row.index == index) {
        return row.values.data();
      }
    }
    Row& row = rows_[rows_[0].index == keep ? 1 : 0];
    row.index = index;
    stretch(index, row.values.data());
    return row.values.data();
  }

 private:
  static constexpr int32_t kNone = -2;
  struct Row {
    int32_t index = kNone;
    std::vector<A> values;
  };

  void stretch(int32_t index, A* __restrict row) {
    const int64_t w_in = params_.geometry.w_in;
    const int64_t w_out = params_.geometry.w_out;
    if (index < 0) {
      std::fill_n(row, w_out * inner_, A(0));
      return;
    }
    const Strides4& s = params_.input_strides;
    const T* line = plane_ + index * s.h;
    A* __restrict source = source_.data();  // its slot w_in stays zero
    for_line(w_in, inner_, s, [=](int64_t k, int64_t offset) { source[k] = load(line + offset); });
    for (int64_t x = 0; x < w_out; ++x) {
      const UpsampleTaps<A>& tap = taps_[static_cast<size_t>(x)];
      const A* a = source + (tap.i0 < 0 ? zero_slot_ : tap.i0) * inner_;
      const A* b = source + (tap.i1 < 0 ? zero_slot_ : tap.i1) * inner_;
      for (int64_t c = 0; c < inner_; ++c) {
        row[x * inner_ + c] = tap.w0 * a[c] + tap.w1 * b[c];
      }
    }
  }

  const UpsampleAddParams& params_;
  const std::vector<UpsampleTaps<A>>& taps_;
  const int64_t inner_;
  const int64_t zero_slot_;
  const T* plane_ = nullptr;
  std::vector<A> source_;
  Row rows_[2];
};

template <class T>
void forward(const UpsampleAddParams& params, const ParallelFor& pool) {
  using A = acc_t<T>;
  const UpsampleGeometry& g = params.geometry;
  const Axes<A> axes(g);
  const auto taps_h = all_taps(axes.h);
  const auto taps_w = all_taps(axes.w);
  const Lines lines(params.output_strides, g.c);
  const int64_t inner = lines.inner;
  const int64_t length = g.w_out * inner;
  const auto* input = static_cast<const T*>(params.input);
  const auto* skip = static_cast<const T*>(params.skip);
  auto* output = static_cast<T*>(params.output);
  const bool dense = is_dense(params.output_strides, inner) &&
                     (skip == nullptr || is_dense(params.skip_strides, inner));

  const auto run = [&](int64_t begin, int64_t end) {
    RowCache<T> cache(params, taps_w, inner);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t y = line % g.h_out;
      const int64_t plane = line / g.h_out;
      const int64_t n = plane / lines.outer;
      const int64_t c = plane % lines.outer;
      if (line == begin || y == 0) {
        cache.enter_plane(line_at(input, params.input_strides, n, c, 0));
      }
      const UpsampleTaps<A>& tap = taps_h[static_cast<size_t>(y)];
      const A* __restrict row0 = cache.get(tap.i0, tap.i1);
      const A* __restrict row1 = cache.get(tap.i1, tap.i0);
      const A w0 = tap.w0;
      const A w1 = tap.w1;
      T* __restrict out = line_at(output, params.output_strides, n, c, y);
      const T* __restrict add =
          skip == nullptr ? nullptr
                          : line_at(skip, params.skip_strides, n, c, y + params.offset_h) +
                                params.offset_w * params.skip_strides.w;
      if (dense && add != nullptr) {
        for (int64_t k = 0; k < length; ++k) {
          store(out + k, (w0 * row0[k] + w1 * row1[k]) + load(add + k));
        }
      } else if (dense) {
        for (int64_t k = 0; k < length; ++k) {
          store(out + k, w0 * row0[k] + w1 * row1[k]);
        }
      } else {
        for (int64_t x = 0; x < g.w_out; ++x) {
          for (int64_t ci = 0; ci < inner; ++ci) {
            const int64_t k = x * inner + ci;
            const A added =
                add == nullptr ? A(0)
                               : load(add + x * params.skip_strides.w + ci * params.skip_strides.c);
            store(out + x * params.output_strides.w + ci * params.output_strides.c,
                  (w0 * row0[k] + w1 * row1[k]) + added);
          }
        }
      }
    }
  };
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length));
  parallel_for(pool, g.n * lines.outer * g.h_out, grain, run);
}

// The outputs that read each input position of one axis, and the taps they read with.
template <class A>
struct Readers {
  std::vector<UpsampleTaps<A>> taps;
  std::vector<UpsampleRange> ranges;

  explicit Readers(const UpsampleAxis<A>& axis) : taps(all_taps(axis)) {
    ranges.reserve(static_cast<size_t>(axis.size_in));
    for (int32_t i = 0; i < axis.size_in; ++i) {
      ranges.push_back(upsample_range(axis, i));
    }
  }
  UpsampleRange range(int64_t i) const { return ranges[static_cast<size_t>(i)]; }
  A weight(int32_t dst, int64_t i) const {
    return upsample_weight(taps[static_cast<size_t>(dst)], static_cast<int32_t>(i));
  }
};

template <class T>
void backward(const UpsampleAddBackwardParams& params, const ParallelFor& pool) {
  using A = acc_t<T>;
  const UpsampleGeometry& g = params.geometry;
  const Axes<A> axes(g);
  const Readers<A> readers_h(axes.h);
  const Readers<A> readers_w(axes.w);
  const Lines lines(params.grad_input_strides, g.c);
  const int64_t inner = lines.inner;
  const int64_t length = g.w_out * inner;
  const Strides4& s_out = params.grad_output_strides;
  const auto* grad_output = static_cast<const T*>(params.grad_output);
  auto* grad_input = static_cast<T*>(params.grad_input);

  const auto run = [&](int64_t begin, int64_t end) {
    std::vector<A> columns(static_cast<size_t>(length)), chain(static_cast<size_t>(length));
    std::vector<A> total(static_cast<size_t>(inner)), partial(static_cast<size_t>(inner));
    for (int64_t line = begin; line < end; ++line) {
      const int64_t i = line % g.h_in;
      const int64_t plane = line / g.h_in;
      const int64_t n = plane / lines.outer;
      const int64_t c = plane % lines.outer;

      // columns[x] = sum_y wy(y, i) grad_output[y, x]
      std::fill(columns.begin(), columns.end(), A(0));
      const UpsampleRange rows = readers_h.range(i);
      for (int32_t first = rows.begin; first < rows.end; first += kChain) {
        A* __restrict sum = chain.data();
        std::fill_n(sum, length, A(0));
        for (int32_t y = first; y < std::min(first + kChain, rows.end); ++y) {
          const A weight = readers_h.weight(y, i);
          const T* grad = line_at(grad_output, s_out, n, c, y);
          for_line(g.w_out, inner, s_out, [=](int64_t k, int64_t offset) {
            sum[k] += weight * load(grad + offset);
          });
        }
        for (int64_t k = 0; k < length; ++k) {
          columns[static_cast<size_t>(k)] += sum[k];
        }
      }

      // grad_input[j] = sum_x wx(x, j) columns[x]
      T* out = line_at(grad_input, params.grad_input_strides, n, c, i);
      for (int64_t j = 0; j < g.w_in; ++j) {
        std::fill(total.begin(), total.end(), A(0));
        const UpsampleRange range = readers_w.range(j);
        for (int32_t first = range.begin; first < range.end; first += kChain) {
          A* __restrict sum = partial.data();
          std::fill_n(sum, inner, A(0));
          for (int32_t x = first; x < std::min(first + kChain, range.end); ++x) {
            const A weight = readers_w.weight(x, j);
            const A* __restrict column = columns.data() + x * inner;
            for (int64_t ci = 0; ci < inner; ++ci) {
              sum[ci] += weight * column[ci];
            }
          }
          for (int64_t ci = 0; ci < inner; ++ci) {
            total[static_cast<size_t>(ci)] += sum[ci];
          }
        }
        for (int64_t ci = 0; ci < inner; ++ci) {
          store(out + j * params.grad_input_strides.w + ci * params.grad_input_strides.c,
                total[static_cast<size_t>(ci)]);
        }
      }
    }
  };
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length));
  parallel_for(pool, g.n * lines.outer * g.h_in, grain, run);
}

}  // namespace

void upsample_add(const UpsampleAddParams& params, const ParallelFor& pool) {
  dispatch_dtype(params.dtype, [&]<class T>() { forward<T>(params, pool); });
}

void upsample_add_backward(const UpsampleAddBackwardParams& params, const ParallelFor& pool) {
  dispatch_dtype(params.dtype, [&]<class T>() { backward<T>(params, pool); });
}

}  // namespace dilseg::cpu
