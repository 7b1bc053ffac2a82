// SPDX-License-Identifier: Apache-2.0
//
// Depthwise dilated convolution, c_out = m * c_in, input channel c feeding o = c*m + k:
//   output[n, o, y, x]   = act(bias[o] + sum_ij weight[o, i, j] input[n, c, Y(y, i), X(x, j)])
//   grad_input[n, c]     = sum over the m channels o and the (y, x, i, j) that read the pixel
//   grad_weight[o, i, j] = sum_nyx grad_output[n, o, y, x] input[n, c, Y(y, i), X(x, j)]
// with Y(y, i) = y*stride_h - pad_top + i*dil_h and X alike.
// A band of one map is copied into planes with zeros around it (padded_planes.h). Results in rows
// of the same pitch then are plain sums over shifted memory:
//   result[f] = sum over taps of weight[tap] * source[offset[tap] + f]
// for every f, in vectors that know nothing of rows; what falls between the rows is not stored.
// With a stride, the pixels that a tap reads lie side by side in planes of their own; going back,
// the results are taken stride apart, each phase with the taps that reach it.
// A thread owns bands of the results of one channel, or shares of the pixels of its grad_weight.
// Both depend on the shape alone, so results do not depend on the number of threads. Tensors may
// have any strides. No include guard, see cpu/instruction_sets.h.
#include "cpu/padded_planes.h"

// Products added in one chain before they join the total: keeps the rounding of long sums at the
// level of short ones.
constexpr int64_t kChain = 32;
// Vectors of results whose sums stay in registers.
constexpr int64_t kUnroll = 8;
// Rows of results that are summed at once; their sums and nine weights stay in registers.
constexpr int64_t kRowsAtOnce = DILSEG_VECTOR_BYTES == 64 ? 8 : 4;
// Values of a band, which stay in the level-2 cache with their source.
constexpr int64_t kBandValues = 8192;
// Values of a strip, which stay in the level-1 cache between their sums and their stores.
constexpr int64_t kStripValues = 1024;
// Multiply-adds a thread should own at least.
constexpr int64_t kGrain = 65536;
// Shares into which grad_weight cuts its work at least, where there are as many bands.
constexpr int64_t kShares = 64;

// All weights, widened, [c_out][k_h * k_w].
template <class T>
Aligned<acc_t<T>> read_weights(const DilatedConv2dShape& s,
                               const void* weight,
                               const Strides4& strides) {
  Aligned<acc_t<T>> values(s.c_out * s.k_h * s.k_w);
  acc_t<T>* to = values.get();
  for (int64_t o = 0; o < s.c_out; ++o) {
    for (int64_t i = 0; i < s.k_h; ++i) {
      for (int64_t j = 0; j < s.k_w; ++j) {
        *to++ = load(static_cast<const T*>(weight) + o * strides.n + i * strides.h + j * strides.w);
      }
    }
  }
  return values;
}

template <class A>
bool all_finite(const A* values, int64_t count) {
  A sum = 0;
  for (int64_t k = 0; k < count; ++k) {
    sum += values[k] * A(0);  // nan where not
  }
  return sum == A(0);
}

// The taps of one phase, and of every map of the source.
struct Phase {
  size_t h, w;
  std::vector<int64_t> offsets;  // into the source
  std::vector<int64_t> weights;  // index, [maps][k_h * k_w]
};

template <class T>
std::vector<Phase> make_phases(const DilatedConv2dShape& s,
                               const Layout& layout,
                               const Source<T>& source,
                               int64_t maps) {
  std::vector<Phase> phases;
  for (size_t h = 0; h < layout.h.phases.size(); ++h) {
    for (size_t w = 0; w < layout.w.phases.size(); ++w) {
      Phase phase{h, w, {}, {}};
      for (int64_t map = 0; map < maps; ++map) {
        for (const AxisTap& tap_h : layout.h.phases[h]) {
          for (const AxisTap& tap_w : layout.w.phases[w]) {
            phase.offsets.push_back(source.offset(map, tap_h, tap_w));
            phase.weights.push_back((map * s.k_h + tap_h.index) * s.k_w + tap_w.index);
          }
        }
      }
      phases.push_back(std::move(phase));
    }
  }
  return phases;
}

// What one strip of results is summed from.
template <class A>
struct Terms {
  const A* source;
  const int64_t* offsets;
  const A* weights;
  int64_t count;
  A bias;
  bool relu;  // values below 0 become 0; nan stays
};

// kVectors vectors of results from place f on.
template <int64_t kVectors, class A>
DILSEG_INLINE void sum_block(const Terms<A>& terms, int64_t f, A* __restrict to) {
  Vec<A> total[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) {
    total[v] = vec_set<A>(terms.bias);
  }
  for (int64_t first = 0; first < terms.count; first += kChain) {
    Vec<A> chain[kVectors] = {};
    const int64_t end = std::min(terms.count, first + kChain);
    for (int64_t t = first; t < end; ++t) {
      const Vec<A> weight = vec_set<A>(terms.weights[t]);
      const A* from = terms.source + terms.offsets[t] + f;
      for (int64_t v = 0; v < kVectors; ++v) {
        chain[v] = chain[v] + weight * vec_load(from + v * kLanes<A>);
      }
    }
    for (int64_t v = 0; v < kVectors; ++v) {
      total[v] = total[v] + chain[v];
    }
  }
  for (int64_t v = 0; v < kVectors; ++v) {
    vec_store(to + f + v * kLanes<A>, terms.relu ? vec_max<A>(total[v], Vec<A>{}) : total[v]);
  }
}

// The first `count` results, and what else is in their last vector.
template <class A>
void sum_strip(const Terms<A>& terms, int64_t count, A* to) {
  int64_t f = 0;
  for (; f + (kUnroll - 1) * kLanes<A> < count; f += kUnroll * kLanes<A>) {
    sum_block<kUnroll>(terms, f, to);
  }
  for (; f + kLanes<A> < count; f += 2 * kLanes<A>) {
    sum_block<2>(terms, f, to);
  }
  if (f < count) {
    sum_block<1>(terms, f, to);
  }
}

// A window of 3x3 taps, of which tap (i, j) reads place base + i * row + j * column of the source.
struct Grid {
  int64_t base, row, column;
};

inline std::optional<Grid> find_grid(const Phase& phase, const DilatedConv2dShape& s) {
  const std::vector<int64_t>& at = phase.offsets;
  const bool whole = s.k_h == 3 && s.k_w == 3 && s.stride_h == 1 && s.stride_w == 1;
  return whole && at.size() == 9 ? std::optional(Grid{at[0], at[3] - at[0], at[1] - at[0]})
                                 : std::nullopt;
}

// One vector of results in each of kRows rows that are grid.row apart in the source: a value that
// several of them read is loaded once.
template <int64_t kRows, class A>
DILSEG_INLINE void sum_column(const Vec<A> (&weights)[9],
                              const Terms<A>& terms,
                              const Grid& grid,
                              const A* from,
                              A* __restrict to,
                              int64_t to_row) {
  Vec<A> sum[kRows] = {};
#pragma GCC unroll 16
  for (int64_t i = 0; i < kRows + 2; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < 3; ++j) {
      const Vec<A> value = vec_load(from + i * grid.row + j * grid.column);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r) {
        if (r <= i && i <= r + 2) {
          sum[r] = sum[r] + weights[3 * (i - r) + j] * value;
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < kRows; ++r) {
    const Vec<A> total = vec_set<A>(terms.bias) + sum[r];
    vec_store(to + r * to_row, terms.relu ? vec_max<A>(total, Vec<A>{}) : total);
  }
}

template <int64_t kRows, class A>
DILSEG_INLINE void sum_rows(const Vec<A> (&weights)[9],
                            const Terms<A>& terms,
                            const Grid& grid,
                            const A* from,
                            int64_t columns,
                            A* __restrict to,
                            int64_t to_row) {
  int64_t x = 0;
  for (; x + kLanes<A> < columns; x += kLanes<A>) {
    sum_column<kRows>(weights, terms, grid, from + x, to + x, to_row);
  }
  x = columns - kLanes<A>;
  sum_column<kRows>(weights, terms, grid, from + x, to + x, to_row);
}

// `rows` rows of at least a vector of results. Those that share rows of the source lie as far apart
// as its taps, upwards or downwards.
template <class A>
void sum_map(const Terms<A>& terms,
             const Grid& grid,
             int64_t pitch,
             int64_t rows,
             int64_t columns,
             A* to,
             int64_t to_row) {
  Vec<A> weights[9];
  for (int64_t t = 0; t < 9; ++t) {
    weights[t] = vec_set<A>(terms.weights[t]);
  }
  const int64_t step = grid.row / pitch;
  const int64_t apart = std::abs(step);
  const auto sum = [&]<int64_t kRows>(int64_t row) {
    const int64_t first = step > 0 ? row : row + (kRows - 1) * apart;
    const A* from = terms.source + grid.base + first * pitch;
    sum_rows<kRows>(weights, terms, grid, from, columns, to + first * to_row, step * to_row);
  };
  for (int64_t first = 0; first < std::min(apart, rows); ++first) {
    int64_t row = first;
    for (; row + (kRowsAtOnce - 1) * apart < rows; row += kRowsAtOnce * apart) {
      sum.template operator()<kRowsAtOnce>(row);
    }
    for (; row + apart < rows; row += 2 * apart) {
      sum.template operator()<2>(row);
    }
    for (; row < rows; row += apart) {
      sum.template operator()<1>(row);
    }
  }
}

// Results that follow each other in memory, map by map, and are written around the caches: in whole
// lines, since a line that is written in parts costs as much as a thousand results.
class Stream {
 public:
  // Before the first whole line, up to two lines less two values may wait.
  explicit Stream(int64_t most) : values_(most + 2 * kLine) {}
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() {
    flush();
    finish_streaming();
  }

  // Where to put up to `most` results that belong at `to`.
  float* place(float* to) {
    if (to != to_ + count_) {
      flush();
      to_ = to;
    }
    return values_.get() + count_;
  }

  // `count` results are where `place` said.
  void add(int64_t count) {
    count_ += count;
    const auto places = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to_) / sizeof(float));
    const int64_t first = round_up(places, kLine) - places;
    const int64_t last = first + (count_ - first) / kLine * kLine;
    if (last <= first) {
      return;
    }
    write(first);
    for (int64_t k = 0; k < last - first; k += kLanes<float>) {
      vec_write(to_ + k, vec_load(values_.get() + first + k), true);
    }
    to_ += last - first;
    count_ -= last;
    std::copy_n(values_.get() + last, count_, values_.get());
  }

 private:
  static constexpr int64_t kLine = 64 / sizeof(float);

  void write(int64_t count) {
    std::copy_n(values_.get(), count, to_);
    to_ += count;
  }
  void flush() {
    write(count_);
    count_ = 0;
  }

  Aligned<float> values_;
  float* to_ = nullptr;
  int64_t count_ = 0;
};

// Results [n, c_in * results, ...] from the sources [n, c_in * maps, ...].
template <class T>
struct Pass {
  const DilatedConv2dShape& shape;
  const Layout layout;
  const T* source;
  Strides4 source_strides;
  int64_t maps;  // of the source, per input channel
  T* result;
  Strides4 result_strides;
  int64_t results;  // per input channel
  int64_t h, w;     // of the results
  const acc_t<T>* weights;
  const T* bias;  // [results of all channels] or null
  bool relu;
};

template <class T>
void run_pass(const Pass<T>& pass, const ParallelFor& pool) {
  using A = acc_t<T>;
  const DilatedConv2dShape& s = pass.shape;
  const Layout& layout = pass.layout;
  const int64_t window = s.k_h * s.k_w;
  const int64_t strip_rows = std::clamp<int64_t>(kStripValues / layout.pitch, 1, layout.rows);

  const int64_t bytes =
      s.n * s.c_in * pass.results * pass.h * pass.w * static_cast<int64_t>(sizeof(T));
  // Half of what others ask for: the source, of the same size, goes through the caches too. A band
  // has to stay in a cache until it is written.
  const bool streamed = 2 * bytes >= kStreamedBytes && layout.rows * pass.w <= kBandValues;

  const auto run = [&](int64_t begin, int64_t end) {
    Source<T> source(layout, pass.maps);
    const std::vector<Phase> phases = make_phases(s, layout, source, pass.maps);
    Aligned<A> strip(strip_rows * layout.pitch + Source<T>::kSlack);
    Aligned<A> weights(pass.maps * window);
    Stream stream(streamed ? layout.rows * pass.w : 0);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t band = piece % layout.bands;
      const int64_t c = piece / layout.bands % s.c_in;
      const int64_t n = piece / layout.bands / s.c_in;
      for (int64_t map = 0; map < pass.maps; ++map) {
        const T* from = map_at(pass.source, pass.source_strides, n, c * pass.maps + map);
        source.fill(map, band, from, pass.source_strides);
      }
      for (int64_t k = 0; k < pass.results; ++k) {
        const int64_t o = c * pass.results + k;
        T* result = map_at(pass.result, pass.result_strides, n, o);
        const A* first_weight = pass.weights + o * pass.maps * window;
        const A bias = pass.bias == nullptr ? A(0) : load(pass.bias + o);
        for (const Phase& phase : phases) {
          const size_t taps = phase.offsets.size();
          for (size_t t = 0; t < taps; ++t) {
            weights.get()[t] = first_weight[phase.weights[t]];
          }
          const int64_t columns = layout.w.count_of(phase.w, pass.w);
          const int64_t first_row = band * layout.rows;
          const int64_t rows =
              std::min(layout.rows, layout.h.count_of(phase.h, pass.h) - first_row);
          if constexpr (std::is_same_v<T, float>) {
            const std::optional<Grid> grid = find_grid(phase, s);
            if (grid.has_value() && pass.result_strides.w == 1 && columns >= kLanes<float>) {
              const Terms<float> terms{source.get(), nullptr, weights.get(), 9, bias, pass.relu};
              const int64_t to_row = pass.result_strides.h;
              float* to = result + first_row * to_row;
              const bool gather = streamed && to_row == columns;
              float* place = gather ? stream.place(to) : to;
              sum_map(terms, *grid, layout.pitch, rows, columns, place, to_row);
              if (gather) {
                stream.add(rows * columns);
              }
              continue;
            }
          }
          for (int64_t row = 0; row < rows; row += strip_rows) {
            const int64_t count = std::min(strip_rows, rows - row);
            const Terms<A> terms{source.get() + row * layout.pitch,
                                 phase.offsets.data(),
                                 weights.get(),
                                 static_cast<int64_t>(taps),
                                 bias,
                                 pass.relu};
            sum_strip(terms, (count - 1) * layout.pitch + columns, strip.get());
            for (int64_t r = 0; r < count; ++r) {
              const int64_t y =
                  (first_row + row + r) * layout.h.stride + static_cast<int64_t>(phase.h);
              write_line(strip.get() + r * layout.pitch,
                         columns,
                         result + y * pass.result_strides.h +
                             static_cast<int64_t>(phase.w) * pass.result_strides.w,
                         layout.w.stride * pass.result_strides.w);
            }
          }
        }
      }
    }
  };
  const int64_t each = layout.rows * layout.pitch * s.c_out / s.c_in * window;
  parallel_for(pool, s.n * s.c_in * layout.bands, std::max<int64_t>(1, kGrain / each), run);
}

inline Layout forward_layout(const DilatedConv2dShape& s) {
  return {forward_axis(s.k_h, s.dil_h, s.stride_h, s.pad_top, s.h_in, s.h_out),
          forward_axis(s.k_w, s.dil_w, s.stride_w, s.pad_left, s.w_in, s.w_out),
          kBandValues};
}

template <class T>
bool forward(const DilatedConv2dParams& params, const ParallelFor& pool) {
  const DilatedConv2dShape& s = params.shape;
  const auto weights = read_weights<T>(s, params.weight, params.weight_strides);
  if (!all_finite(weights.get(), s.c_out * s.k_h * s.k_w)) {
    return false;
  }
  run_pass<T>({.shape = s,
               .layout = forward_layout(s),
               .source = static_cast<const T*>(params.input),
               .source_strides = params.input_strides,
               .maps = 1,
               .result = static_cast<T*>(params.output),
               .result_strides = params.output_strides,
               .results = s.c_out / s.c_in,
               .h = s.h_out,
               .w = s.w_out,
               .weights = weights.get(),
               .bias = static_cast<const T*>(params.bias),
               .relu = params.relu},
              pool);
  return true;
}

template <class T>
bool grad_input(const DilatedConv2dGradInputParams& params, const ParallelFor& pool) {
  const DilatedConv2dShape& s = params.shape;
  const auto weights = read_weights<T>(s, params.weight, params.weight_strides);
  if (!all_finite(weights.get(), s.c_out * s.k_h * s.k_w)) {
    return false;
  }
  run_pass<T>({.shape = s,
               .layout = {backward_axis(s.k_h, s.dil_h, s.stride_h, s.pad_top, s.h_out, s.h_in),
                          backward_axis(s.k_w, s.dil_w, s.stride_w, s.pad_left, s.w_out, s.w_in),
                          kBandValues},
               .source = static_cast<const T*>(params.grad_output),
               .source_strides = params.grad_output_strides,
               .maps = s.c_out / s.c_in,
               .result = static_cast<T*>(params.grad_input),
               .result_strides = params.grad_input_strides,
               .results = 1,
               .h = s.h_in,
               .w = s.w_in,
               .weights = weights.get(),
               .bias = nullptr,
               .relu = false},
              pool);
  return true;
}

// Products per lane that grad_weight adds in one chain, and chains that it adds in one block.
constexpr int64_t kDotChain = 64;
// Taps whose sums stay in registers.
constexpr int64_t kDotTaps = 9;

// Sums of products on three levels: vectors of at most kDotChain products per lane, vectors of at
// most kDotChain of those, and a total in double.
template <class A>
class DotSums {
 public:
  explicit DotSums(int64_t count) : count_(count), block_(count * kLanes<A>), total_(count) {
    std::fill_n(block_.get(), count * kLanes<A>, A(0));
    std::fill_n(total_.get(), count, 0.0);
  }

  DILSEG_INLINE void add(int64_t k, Vec<A> chain) {
    A* block = block_.get() + k * kLanes<A>;
    vec_store(block, vec_load(block) + chain);
  }

  // After one chain of each sum.
  void join() {
    if (++joined_ == kDotChain) {
      flush();
    }
  }

  // The totals, which start again at 0.
  void take(double* to) {
    flush();
    std::copy_n(total_.get(), count_, to);
    std::fill_n(total_.get(), count_, 0.0);
  }

 private:
  void flush() {
    for (int64_t k = 0; k < count_; ++k) {
      for (int64_t lane = 0; lane < kLanes<A>; ++lane) {
        total_.get()[k] += static_cast<double>(block_.get()[k * kLanes<A> + lane]);
      }
    }
    std::fill_n(block_.get(), count_ * kLanes<A>, A(0));
    joined_ = 0;
  }

  const int64_t count_;
  int64_t joined_ = 0;
  Aligned<A> block_;
  Aligned<double> total_;
};

// One chain of each of kTaps sums: `vectors` vectors of grad times the source at each tap's offset.
template <int64_t kTaps, class A>
DILSEG_INLINE void add_taps(const A* grad,
                            const A* source,
                            const int64_t* offsets,
                            int64_t vectors,
                            int64_t first,
                            DotSums<A>& sums) {
  Vec<A> sum[kTaps] = {};
  for (int64_t f = 0; f < vectors * kLanes<A>; f += kLanes<A>) {
    const Vec<A> factor = vec_load(grad + f);
    for (int64_t k = 0; k < kTaps; ++k) {
      sum[k] = sum[k] + factor * vec_load(source + offsets[first + k] + f);
    }
  }
  for (int64_t k = 0; k < kTaps; ++k) {
    sums.add(first + k, sum[k]);
  }
}

template <class A>
DILSEG_INLINE void add_bias(const A* grad, int64_t vectors, int64_t k, DotSums<A>& sums) {
  Vec<A> sum[4] = {};
  for (int64_t v = 0; v < vectors; ++v) {
    sum[v % 4] = sum[v % 4] + vec_load(grad + v * kLanes<A>);
  }
  sums.add(k, (sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
bool grad_weight(const DilatedConv2dGradWeightParams& params, const ParallelFor& pool) {
  using A = acc_t<T>;
  const DilatedConv2dShape& s = params.shape;
  const int64_t multiplier = s.c_out / s.c_in;
  const int64_t window = s.k_h * s.k_w;
  const int64_t sums_each = window + 1;  // the last one is grad_bias
  const Layout layout = forward_layout(s);
  // Between its rows, grad_output is zero.
  const Layout grad_layout = [&] {
    Layout copy = layout;
    copy.h = {{{0, 1}}, {}, 1, s.h_out, layout.rows, 0};
    copy.w = {{{0, 1}}, {}, 1, s.w_out, s.w_out, 0};
    return copy;
  }();
  const int64_t pieces = s.n * layout.bands;
  const int64_t shares = std::max<int64_t>(1, std::min(pieces, ceil_div(kShares, s.c_in)));
  const auto* grad_output = static_cast<const T*>(params.grad_output);
  const auto* input = static_cast<const T*>(params.input);
  std::vector<double> partials(static_cast<size_t>(shares * s.c_out * sums_each));

  const auto run = [&](int64_t begin, int64_t end) {
    Source<T> source(layout, 1);
    Source<T> grads(grad_layout, 1);
    const Phase taps = make_phases(s, layout, source, 1)[0];
    std::vector<DotSums<A>> sums;
    for (int64_t k = 0; k < multiplier; ++k) {
      sums.emplace_back(sums_each);
    }
    for (int64_t item = begin; item < end; ++item) {
      const int64_t c = item / shares;
      const int64_t share = item % shares;
      for (int64_t piece = pieces * share / shares; piece < pieces * (share + 1) / shares;
           ++piece) {
        const int64_t n = piece / layout.bands;
        const int64_t band = piece % layout.bands;
        source.fill(0, band, map_at(input, params.input_strides, n, c), params.input_strides);
        const int64_t rows = std::min(layout.rows, s.h_out - band * layout.rows);
        const int64_t vectors = ceil_div(rows * layout.pitch, kLanes<A>);
        for (int64_t k = 0; k < multiplier; ++k) {
          DotSums<A>& sum = sums[static_cast<size_t>(k)];
          const T* grad_map =
              map_at(grad_output, params.grad_output_strides, n, c * multiplier + k);
          grads.fill(0, band, grad_map, params.grad_output_strides);
          for (int64_t v = 0; v < vectors; v += kDotChain) {
            const int64_t count = std::min(kDotChain, vectors - v);
            const A* grad = grads.get() + v * kLanes<A>;
            const A* from = source.get() + v * kLanes<A>;
            const int64_t* offsets = taps.offsets.data();
            int64_t t = 0;
            for (; t + kDotTaps <= window; t += kDotTaps) {
              add_taps<kDotTaps>(grad, from, offsets, count, t, sum);
            }
            for (; t + 3 <= window; t += 3) {
              add_taps<3>(grad, from, offsets, count, t, sum);
            }
            for (; t < window; ++t) {
              add_taps<1>(grad, from, offsets, count, t, sum);
            }
            if (params.grad_bias != nullptr) {
              add_bias(grad, count, window, sum);
            }
            sum.join();
          }
        }
      }
      for (int64_t k = 0; k < multiplier; ++k) {
        sums[static_cast<size_t>(k)].take(
            &partials[static_cast<size_t>((share * s.c_out + c * multiplier + k) * sums_each)]);
      }
    }
  };
  const int64_t each = pieces / shares * layout.rows * layout.pitch * multiplier * window;
  parallel_for(
      pool, s.c_in * shares, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, each)), run);

  auto* weight = static_cast<T*>(params.grad_weight);
  auto* bias = static_cast<T*>(params.grad_bias);
  const Strides4& w = params.grad_weight_strides;
  double check = 0;
  for (int64_t o = 0; o < s.c_out; ++o) {
    for (int64_t k = 0; k < sums_each; ++k) {
      double total = 0;
      for (int64_t share = 0; share < shares; ++share) {
        total += partials[static_cast<size_t>((share * s.c_out + o) * sums_each + k)];
      }
      check += total * 0;
      if (k < window) {
        store(weight + o * w.n + k / s.k_w * w.h + k % s.k_w * w.w, static_cast<A>(total));
      } else if (bias != nullptr) {
        store(bias + o, static_cast<A>(total));
      }
    }
  }
  return check == 0;
}

inline bool depthwise(const DilatedConv2dParams& params, const ParallelFor& pool) {
  return dispatch_dtype(params.dtype, [&]<class T>() { return forward<T>(params, pool); });
}

inline bool depthwise_grad_input(const DilatedConv2dGradInputParams& params,
                                 const ParallelFor& pool) {
  return dispatch_dtype(params.dtype, [&]<class T>() { return grad_input<T>(params, pool); });
}

inline bool depthwise_grad_weight(const DilatedConv2dGradWeightParams& params,
                                  const ParallelFor& pool) {
  return dispatch_dtype(params.dtype, [&]<class T>() { return grad_weight<T>(params, pool); });
}
