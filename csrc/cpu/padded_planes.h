// SPDX-License-Identifier: Apache-2.0
//
// Maps that are copied into planes of their own, widened, with zeros around them and rows of one
// pitch, so that kernels read shifted rows and know nothing of edges, strides and dilation: the
// pixels that one place of the window reads lie side by side, in a plane per phase of the stride.
// No include guard, see cpu/instruction_sets.h.

// Division by a positive number, rounded down and up.
constexpr int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// Place r of an axis of a source holds place first + r * step of the map.
struct Line {
  int64_t first, step;

  // Places [begin, end) of the first `length` hold one of `size` places of the map.
  int64_t begin(int64_t length) const {
    return std::clamp<int64_t>(ceil_div(-first, step), 0, length);
  }
  int64_t end(int64_t size, int64_t length) const {
    return std::clamp<int64_t>(ceil_div(size - first, step), begin(length), length);
  }
  Line from(int64_t place) const { return {first + place * step, step}; }
};

// Place r of the window's place `index` is place r + shift of a line.
struct AxisTap {
  int64_t index;
  int64_t line;
  int64_t shift;
};

// One axis of a pass. Results of phase p are places p, p + stride, ... of the result's axis.
struct Axis {
  std::vector<Line> lines;
  std::vector<std::vector<AxisTap>> phases;
  int64_t stride;
  int64_t size;   // of the source's map
  int64_t count;  // of results in phase 0
  int64_t reach;  // largest shift

  // Results of a phase, of `results` in all.
  int64_t count_of(size_t phase, int64_t results) const {
    return ceil_div(results - static_cast<int64_t>(phase), stride);
  }
  int64_t length() const { return count + reach; }
  // Zeros at the end of every line that may as well be the zeros at the beginning of the next.
  int64_t shared() const {
    int64_t zeros = reach;
    for (const Line& line : lines) {
      zeros = std::min({zeros, line.begin(length()), length() - line.end(size, length())});
    }
    return zeros;
  }
};

inline Axis forward_axis(
    int64_t taps, int64_t dilation, int64_t stride, int64_t pad, int64_t size, int64_t results) {
  Axis axis{{}, {{}}, 1, size, results, (taps - 1) * dilation / stride};
  for (int64_t j = 0; j < taps; ++j) {
    const int64_t first = j * dilation % stride - pad;
    size_t line = 0;
    while (line < axis.lines.size() && axis.lines[line].first != first) {
      ++line;
    }
    if (line == axis.lines.size()) {
      axis.lines.push_back({first, stride});
    }
    axis.phases[0].push_back({j, static_cast<int64_t>(line), j * dilation / stride});
  }
  return axis;
}

inline Axis backward_axis(
    int64_t taps, int64_t dilation, int64_t stride, int64_t pad, int64_t size, int64_t results) {
  const int64_t phases = std::min(stride, results);
  const int64_t first = floor_div(pad - (taps - 1) * dilation, stride);
  Axis axis{{{first, 1}},
            std::vector<std::vector<AxisTap>>(static_cast<size_t>(phases)),
            stride,
            size,
            ceil_div(results, stride),
            floor_div(phases - 1 + pad, stride) - first};
  for (int64_t phase = 0; phase < phases; ++phase) {
    for (int64_t j = 0; j < taps; ++j) {
      const int64_t reads = phase + pad - j * dilation;
      if (floor_div(reads, stride) * stride == reads) {
        axis.phases[static_cast<size_t>(phase)].push_back({j, 0, reads / stride - first});
      }
    }
  }
  return axis;
}

// Bands of the results of a pass, and the planes that hold what they read.
struct Layout {
  Layout(Axis h_axis, Axis w_axis, int64_t band_values)
      : h(std::move(h_axis)), w(std::move(w_axis)) {
    pitch = w.length() - w.shared();
    // Rows around the band are copied again: four times as many of its own keep that cheap.
    rows = std::max(band_values / pitch, std::min(h.count, 4 * h.reach));
    rows = std::clamp<int64_t>(rows, 1, h.count);
    bands = ceil_div(h.count, rows);
  }

  // With room for the last vectors of results, which may end beyond their rows.
  int64_t plane(int64_t slack) const { return (rows + h.reach + 1) * pitch + slack; }

  Axis h, w;
  int64_t pitch;
  int64_t rows;  // of a band
  int64_t bands;
};

// Whole vectors, the last of which ends with the line. `count` fills at least one.
template <class A>
DILSEG_INLINE void copy_line(const A* __restrict from, int64_t count, A* __restrict to) {
  for (int64_t k = 0; k + kLanes<A> < count; k += kLanes<A>) {
    vec_store(to + k, vec_load(from + k));
    // Or the compiler would call memmove, which takes longer than a short line.
    std::atomic_signal_fence(std::memory_order_seq_cst);
  }
  vec_store(to + count - kLanes<A>, vec_load(from + count - kLanes<A>));
}

template <class T, class A>
DILSEG_INLINE void write_line(const A* __restrict from,
                              int64_t count,
                              T* __restrict to,
                              int64_t stride) {
  if (stride != 1) {
    for (int64_t k = 0; k < count; ++k) {
      store(to + k * stride, from[k]);
    }
    return;
  }
  if constexpr (std::is_same_v<T, A>) {
    if (count >= kLanes<A>) {
      copy_line(from, count, to);
      return;
    }
  }
  for (int64_t k = 0; k < count; ++k) {
    store(to + k, from[k]);
  }
}

// The planes of one band, [maps][lines of h][lines of w].
template <class T>
class Source {
 public:
  using A = acc_t<T>;
  // Values that may be read beyond the last row.
  static constexpr int64_t kSlack = 16 * kLanes<A>;

  Source(const Layout& layout, int64_t maps)
      : layout_(layout),
        plane_(round_up(layout.plane(kSlack), kLanes<A>)),
        maps_(maps),
        values_(maps * planes() * plane_) {
    std::fill_n(values_.get(), maps * planes() * plane_, A(0));
  }

  const A* get() const { return values_.get(); }

  int64_t offset(int64_t map, const AxisTap& tap_h, const AxisTap& tap_w) const {
    const int64_t lines = static_cast<int64_t>(layout_.w.lines.size());
    return (map * planes() + tap_h.line * lines + tap_w.line) * plane_ +
           tap_h.shift * layout_.pitch + tap_w.shift;
  }

  void fill(int64_t map, int64_t band, const T* from, const Strides4& strides) {
    A* to = values_.get() + map * planes() * plane_;
    for (const Line& line_h : layout_.h.lines) {
      for (const Line& line_w : layout_.w.lines) {
        fill_plane(line_h.from(band * layout_.rows), line_w, from, strides, to);
        to += plane_;
      }
    }
  }

 private:
  int64_t planes() const {
    return static_cast<int64_t>(layout_.h.lines.size() * layout_.w.lines.size());
  }

  // What is outside of the map in every band is zero from the beginning.
  void fill_plane(
      const Line& line_h, const Line& line_w, const T* from, const Strides4& strides, A* to) const {
    const int64_t length = layout_.rows + layout_.h.reach;
    const int64_t lo = line_w.begin(layout_.w.length());
    const int64_t hi = line_w.end(layout_.w.size, layout_.w.length());
    const int64_t begin = line_h.begin(length);
    const int64_t end = line_h.end(layout_.h.size, length);
    for (int64_t r = 0; r < length; ++r) {
      A* row = to + r * layout_.pitch + lo;
      if (r >= begin && r < end) {
        const T* first = from + (line_h.first + r * line_h.step) * strides.h +
                         (line_w.first + lo * line_w.step) * strides.w;
        read_line(first, line_w.step * strides.w, hi - lo, row);
      } else if (layout_.bands > 1) {
        std::fill(row, row + (hi - lo), A(0));
      }
    }
  }

  static void read_line(const T* __restrict from, int64_t stride, int64_t count, A* __restrict to) {
    if (stride != 1) {
      for (int64_t k = 0; k < count; ++k) {
        to[k] = load(from + k * stride);
      }
      return;
    }
    if constexpr (std::is_same_v<T, A>) {
      if (count >= kLanes<A>) {
        copy_line(from, count, to);
        return;
      }
    }
    for (int64_t k = 0; k < count; ++k) {
      to[k] = load(from + k);
    }
  }

  const Layout& layout_;
  const int64_t plane_;
  const int64_t maps_;
  Aligned<A> values_;
};

template <class P>
P* map_at(P* base, const Strides4& s, int64_t n, int64_t c) {
  return base + n * s.n + c * s.c;
}
