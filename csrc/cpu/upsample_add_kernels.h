// SPDX-License-Identifier: Apache-2.0
//
// output[n,c,y,x] = sum_ij wy(y,i) wx(x,j) input[n,c,i,j] + skip[n,c,y+offset_h,x+offset_w], and
// its gradient. Both directions work on lines: one (n, c, y) row of w pixels, or, when the tensor
// written is channels_last, one (n, y) row of w * c values. Forward widens an input row, stretches
// it along x once, keeps the last two stretched rows, and blends them for each output row. Backward
// gathers: the output rows that read an input row are summed with their weights, then the sum is
// gathered along x. A line belongs to one thread, so results do not depend on the number of
// threads. No include guard, see cpu/instruction_sets.h.
#include "cpu/interpolation.h"

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

inline bool is_dense(const Strides4& s, int64_t inner) {
  return s.w == inner && (inner == 1 || s.c == 1);
}

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

// A line of values of type A: the line itself where it is dense and needs no widening, else a copy.
template <class T>
const acc_t<T>* widened(
    const T* line, int64_t w, int64_t inner, const Strides4& s, acc_t<T>* __restrict copy) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    if (is_dense(s, inner)) {
      return line;
    }
  }
  for_line(w, inner, s, [=](int64_t k, int64_t offset) { copy[k] = load(line + offset); });
  return copy;
}

// Stretched input rows of one plane, the last two of them kept.
template <class T>
class RowCache {
 public:
  using A = acc_t<T>;

  RowCache(const UpsampleAddParams& params, const Stretch<A>& stretch, int64_t inner)
      : params_(params),
        stretch_(stretch),
        inner_(inner),
        source_(stretch.input_size() * inner),
        rows_{Row(params.geometry.w_out * inner), Row(params.geometry.w_out * inner)} {
    // Beyond a zero border.
    std::fill_n(source_.get() + params.geometry.w_in * inner, inner, A(0));
  }

  void enter_plane(const T* plane) {
    plane_ = plane;
    rows_[0].index = rows_[1].index = kNone;
  }

  // The stretched row `index`; -1 is the row of zeros beyond the border. `keep` is not evicted.
  const A* get(int32_t index, int32_t keep) {
    for (const Row& row : rows_) {
      if (row.index == index) {
        return row.values.get();
      }
    }
    Row& row = rows_[rows_[0].index == keep ? 1 : 0];
    row.index = index;
    fill(index, row.values.get());
    return row.values.get();
  }

 private:
  static constexpr int32_t kNone = -2;
  struct Row {
    explicit Row(int64_t size) : values(size + kLanes<A>) {}
    int32_t index = kNone;
    Aligned<A> values;
  };

  void fill(int32_t index, A* __restrict row) {
    const int64_t w_in = params_.geometry.w_in;
    const int64_t w_out = params_.geometry.w_out;
    if (index < 0) {
      std::fill_n(row, w_out * inner_, A(0));
      return;
    }
    const Strides4& s = params_.input_strides;
    const T* line = plane_ + index * s.h;
    A* __restrict source = source_.get();
    for_line(w_in, inner_, s, [=](int64_t k, int64_t offset) { source[k] = load(line + offset); });
    if (inner_ == 1) {
      stretch_.row(source, row, 0, w_out);
    } else {
      stretch_.pixels(source, row, inner_);
    }
  }

  const UpsampleAddParams& params_;
  const Stretch<A>& stretch_;
  const int64_t inner_;
  const T* plane_ = nullptr;
  Aligned<A> source_;
  Row rows_[2];
};

// to[k] = w0 row0[k] + w1 row1[k] + added[k], rounded once.
template <bool kAdds, class T, class A>
void blend_line(T* __restrict to,
                const A* __restrict row0,
                const A* __restrict row1,
                A w0,
                A w1,
                const A* __restrict added,
                int64_t length,
                bool streamed) {
  const auto blend = [=](int64_t k) {
    const A value = w0 * row0[k] + w1 * row1[k];
    return kAdds ? value + added[k] : value;
  };
  int64_t k = 0;
  if constexpr (std::is_same_v<T, float>) {
    for (; k < length && !is_vector_aligned(to + k); ++k) {
      to[k] = blend(k);
    }
    for (; k + kLanes<A> <= length; k += kLanes<A>) {
      Vec<A> value = w0 * vec_load(row0 + k) + w1 * vec_load(row1 + k);
      if constexpr (kAdds) {
        value = value + vec_load(added + k);
      }
      vec_write(to + k, value, streamed);
    }
  }
  for (; k < length; ++k) {
    store(to + k, blend(k));
  }
}

template <class T>
void forward(const UpsampleAddParams& params, const ParallelFor& pool) {
  using A = acc_t<T>;
  const UpsampleGeometry& g = params.geometry;
  const UpsampleAxes<A> axes(g);
  const auto taps_h = all_taps(axes.h);
  const Stretch<A> stretch(axes.w);
  const Lines lines(params.output_strides, g.c);
  const int64_t inner = lines.inner;
  const int64_t length = g.w_out * inner;
  const auto* input = static_cast<const T*>(params.input);
  const auto* skip = static_cast<const T*>(params.skip);
  auto* output = static_cast<T*>(params.output);
  const bool dense = is_dense(params.output_strides, inner);
  const bool streamed =
      g.n * g.c * g.h_out * g.w_out * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes;

  const auto run = [&](int64_t begin, int64_t end) {
    RowCache<T> cache(params, stretch, inner);
    Aligned<A> skip_copy(length);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t y = line % g.h_out;
      const int64_t plane = line / g.h_out;
      const int64_t n = plane / lines.outer;
      const int64_t c = plane % lines.outer;
      if (line == begin || y == 0) {
        cache.enter_plane(line_at(input, params.input_strides, n, c, 0));
      }
      const UpsampleTaps<A>& tap = taps_h[static_cast<size_t>(y)];
      const A* row0 = cache.get(tap.i0, tap.i1);
      const A* row1 = cache.get(tap.i1, tap.i0);
      const A* added = nullptr;
      if (skip != nullptr) {
        const T* at = line_at(skip, params.skip_strides, n, c, y + params.offset_h) +
                      params.offset_w * params.skip_strides.w;
        added = widened(at, g.w_out, inner, params.skip_strides, skip_copy.get());
      }
      T* out = line_at(output, params.output_strides, n, c, y);
      if (dense) {
        if (added == nullptr) {
          blend_line<false>(out, row0, row1, tap.w0, tap.w1, added, length, streamed);
        } else {
          blend_line<true>(out, row0, row1, tap.w0, tap.w1, added, length, streamed);
        }
        continue;
      }
      for_line(g.w_out, inner, params.output_strides, [&](int64_t k, int64_t offset) {
        const A value = tap.w0 * row0[k] + tap.w1 * row1[k];
        store(out + offset, value + (added == nullptr ? A(0) : added[k]));
      });
    }
    finish_streaming();
  };
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length));
  parallel_for(pool, g.n * lines.outer * g.h_out, grain, run);
}

// columns[k] = sum_y weights[y] rows[y * stride + k] over `count` rows. Sums stay in registers for
// a whole column of vectors.
template <class T, class A>
void sum_rows(A* __restrict columns,
              const T* __restrict rows,
              int64_t stride,
              const A* __restrict weights,
              int32_t count,
              int64_t length) {
  int64_t k = 0;
  if constexpr (std::is_same_v<T, A>) {
    constexpr int64_t kWidth = 4 * kLanes<A>;
    for (; k + kWidth <= length; k += kWidth) {
      Vec<A> total[4] = {};
      for (int32_t first = 0; first < count; first += kChain) {
        Vec<A> chain[4] = {};
        for (int32_t y = first; y < std::min(first + kChain, count); ++y) {
          const T* __restrict row = rows + y * stride + k;
          for (int i = 0; i < 4; ++i) {
            chain[i] = chain[i] + weights[y] * vec_load(row + i * kLanes<A>);
          }
        }
        for (int i = 0; i < 4; ++i) {
          total[i] = total[i] + chain[i];
        }
      }
      for (int i = 0; i < 4; ++i) {
        vec_store(columns + k + i * kLanes<A>, total[i]);
      }
    }
  }
  constexpr int64_t kBlock = 64;
  for (; k < length; k += kBlock) {
    const int64_t width = std::min(kBlock, length - k);
    A total[kBlock] = {};
    for (int32_t first = 0; first < count; first += kChain) {
      A chain[kBlock] = {};
      for (int32_t y = first; y < std::min(first + kChain, count); ++y) {
        const T* __restrict row = rows + y * stride + k;
        for (int64_t i = 0; i < width; ++i) {
          chain[i] += weights[y] * load(row + i);
        }
      }
      for (int64_t i = 0; i < width; ++i) {
        total[i] += chain[i];
      }
    }
    std::copy_n(total, width, columns + k);
  }
}

// The same over rows of any strides.
template <class T, class A>
void sum_strided_rows(A* __restrict columns,
                      const T* rows,
                      const Strides4& s,
                      const A* weights,
                      int32_t count,
                      int64_t w,
                      int64_t inner,
                      A* __restrict chain) {
  const int64_t length = w * inner;
  std::fill_n(columns, length, A(0));
  for (int32_t first = 0; first < count; first += kChain) {
    std::fill_n(chain, length, A(0));
    for (int32_t y = first; y < std::min(first + kChain, count); ++y) {
      const T* row = rows + y * s.h;
      const A weight = weights[y];
      for_line(
          w, inner, s, [=](int64_t k, int64_t offset) { chain[k] += weight * load(row + offset); });
    }
    for (int64_t k = 0; k < length; ++k) {
      columns[k] += chain[k];
    }
  }
}

// to[c] = sum over the columns that read input pixel j, of `inner` values each.
template <class A>
void gather_pixel(const Gather<A>& gather,
                  int64_t j,
                  const A* __restrict columns,
                  int64_t inner,
                  A* __restrict to,
                  A* __restrict chain) {
  std::fill_n(to, inner, A(0));
  const int32_t begin = gather.begin(j);
  const int32_t count = gather.end(j) - begin;
  const A* weights = gather.weights(j);
  for (int32_t first = 0; first < count; first += kChain) {
    std::fill_n(chain, inner, A(0));
    for (int32_t x = first; x < std::min(first + kChain, count); ++x) {
      const A* __restrict column = columns + (begin + x) * inner;
      for (int64_t c = 0; c < inner; ++c) {
        chain[c] += weights[x] * column[c];
      }
    }
    for (int64_t c = 0; c < inner; ++c) {
      to[c] += chain[c];
    }
  }
}

template <class T>
void backward(const UpsampleAddBackwardParams& params, const ParallelFor& pool) {
  using A = acc_t<T>;
  const UpsampleGeometry& g = params.geometry;
  const UpsampleAxes<A> axes(g);
  const Gather<A> gather_h(axes.h);
  const Gather<A> gather_w(axes.w);
  const Lines lines(params.grad_input_strides, g.c);
  const int64_t inner = lines.inner;
  const int64_t length = g.w_out * inner;
  const Strides4& s_out = params.grad_output_strides;
  const Strides4& s_in = params.grad_input_strides;
  const auto* grad_output = static_cast<const T*>(params.grad_output);
  auto* grad_input = static_cast<T*>(params.grad_input);
  const bool dense = is_dense(s_out, inner);

  const auto run = [&](int64_t begin, int64_t end) {
    Aligned<A> columns(length), chain(length), pixel(inner), pixel_chain(inner);
    for (int64_t line = begin; line < end; ++line) {
      const int64_t i = line % g.h_in;
      const int64_t plane = line / g.h_in;
      const int64_t n = plane / lines.outer;
      const int64_t c = plane % lines.outer;
      const int32_t first = gather_h.begin(i);
      const int32_t count = gather_h.end(i) - first;
      const T* rows = line_at(grad_output, s_out, n, c, first);
      if (dense) {
        sum_rows(columns.get(), rows, s_out.h, gather_h.weights(i), count, length);
      } else {
        sum_strided_rows(
            columns.get(), rows, s_out, gather_h.weights(i), count, g.w_out, inner, chain.get());
      }
      T* out = line_at(grad_input, s_in, n, c, i);
      if (inner == 1) {
        for (int64_t j = 0; j < g.w_in; ++j) {
          store(out + j * s_in.w, gather_w.dot(j, columns.get(), 0, g.w_out));
        }
        continue;
      }
      for (int64_t j = 0; j < g.w_in; ++j) {
        gather_pixel(gather_w, j, columns.get(), inner, pixel.get(), pixel_chain.get());
        for (int64_t ci = 0; ci < inner; ++ci) {
          store(out + j * s_in.w + ci * s_in.c, pixel.get()[ci]);
        }
      }
    }
  };
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, length));
  parallel_for(pool, g.n * lines.outer * g.h_in, grain, run);
}

inline void upsample_add(const UpsampleAddParams& params, const ParallelFor& pool) {
  dispatch_dtype(params.dtype, [&]<class T>() { forward<T>(params, pool); });
}

inline void upsample_add_backward(const UpsampleAddBackwardParams& params,
                                  const ParallelFor& pool) {
  dispatch_dtype(params.dtype, [&]<class T>() { backward<T>(params, pool); });
}
