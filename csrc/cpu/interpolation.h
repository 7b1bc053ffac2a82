// SPDX-License-Identifier: Apache-2.0
//
// One axis of a bilinear map, prepared for whole rows: `Stretch` makes a row of outputs from a row
// of inputs, `Gather` is its transpose. Index rule and weights are those of upsample_index.h. No
// include guard, see cpu/instruction_sets.h.

template <class A>
std::vector<UpsampleTaps<A>> all_taps(const UpsampleAxis<A>& axis) {
  std::vector<UpsampleTaps<A>> taps(static_cast<size_t>(axis.size_out));
  for (int32_t dst = 0; dst < axis.size_out; ++dst) {
    taps[static_cast<size_t>(dst)] = upsample_taps(axis, dst);
  }
  return taps;
}

template <class A>
struct UpsampleAxes {
  UpsampleAxis<A> h, w;

  explicit UpsampleAxes(const UpsampleGeometry& g)
      : h(make_upsample_axis<A>(g.h_in, g.h_out, g.origin_h, g.scale_h, g.align_corners, g.border)),
        w(make_upsample_axis<A>(
            g.w_in, g.w_out, g.origin_w, g.scale_w, g.align_corners, g.border)) {}
};

// output[x] = w0(x) input[i0(x)] + w1(x) input[i1(x)].
template <class A>
class Stretch {
 public:
  explicit Stretch(const UpsampleAxis<A>& axis)
      : size_in_(axis.size_in),
        weights0_(static_cast<size_t>(axis.size_out + kLanes<A>)),
        weights1_(weights0_.size()),
        taps_(all_taps(axis)) {
    for (int32_t x = 0; x < axis.size_out; ++x) {
      const UpsampleTaps<A>& tap = taps_[static_cast<size_t>(x)];
      weights0_[static_cast<size_t>(x)] = tap.w0;
      weights1_[static_cast<size_t>(x)] = tap.w1;
      if (runs_.empty() || runs_.back().i0 != place(tap.i0) || runs_.back().i1 != place(tap.i1)) {
        runs_.push_back({x, x, place(tap.i0), place(tap.i1)});
      }
      runs_.back().end = x + 1;
    }
  }

  int64_t size_in() const { return size_in_; }
  const UpsampleTaps<A>& tap(int64_t x) const { return taps_[static_cast<size_t>(x)]; }

  // Outputs [begin, end) of one row. `input` has size_in + 1 values, of which the last is 0, what
  // lies beyond a zero border. Up to one vector beyond `end` is written too.
  void row(const A* __restrict input, A* __restrict output, int64_t begin, int64_t end) const {
    // Outputs that read the same two inputs lie together, and are computed together.
    for (auto run = first_run(begin); run != runs_.end() && run->begin < end; ++run) {
      const Vec<A> a = vec_set<A>(input[run->i0]);
      const Vec<A> b = vec_set<A>(input[run->i1]);
      const int64_t from = std::max<int64_t>(run->begin, begin);
      const int64_t to = std::min<int64_t>(run->end, end);
      for (int64_t x = from; x < to; x += kLanes<A>) {
        vec_store(output + (x - begin),
                  vec_load(&weights0_[static_cast<size_t>(x)]) * a +
                      vec_load(&weights1_[static_cast<size_t>(x)]) * b);
      }
    }
  }

  // The same for pixels of `inner` values each.
  void pixels(const A* __restrict input, A* __restrict output, int64_t inner) const {
    for (const UpsampleTaps<A>& tap : taps_) {
      const A* __restrict a = input + place(tap.i0) * inner;
      const A* __restrict b = input + place(tap.i1) * inner;
      for (int64_t c = 0; c < inner; ++c) {
        output[c] = tap.w0 * a[c] + tap.w1 * b[c];
      }
      output += inner;
    }
  }

 private:
  // Outputs [begin, end) that read the inputs i0 and i1.
  struct Run {
    int32_t begin, end;
    int32_t i0, i1;
  };

  int32_t place(int32_t i) const { return i < 0 ? static_cast<int32_t>(size_in_) : i; }
  typename std::vector<Run>::const_iterator first_run(int64_t x) const {
    return std::upper_bound(
        runs_.begin(), runs_.end(), x, [](int64_t at, const Run& run) { return at < run.end; });
  }

  int64_t size_in_;
  std::vector<A> weights0_, weights1_;  // a vector longer than the outputs
  std::vector<UpsampleTaps<A>> taps_;
  std::vector<Run> runs_;
};

// input[i] = sum_x weight(x, i) output[x], over exactly the outputs that read input i.
template <class A>
class Gather {
 public:
  explicit Gather(const UpsampleAxis<A>& axis) {
    ranges_.reserve(static_cast<size_t>(axis.size_in));
    for (int32_t i = 0; i < axis.size_in; ++i) {
      const UpsampleRange range = upsample_range(axis, i);
      ranges_.push_back({range.begin, range.end, static_cast<int64_t>(weights_.size())});
      for (int32_t x = range.begin; x < range.end; ++x) {
        weights_.push_back(upsample_weight(upsample_taps(axis, x), i));
      }
    }
  }

  int64_t size_in() const { return static_cast<int64_t>(ranges_.size()); }
  int32_t begin(int64_t i) const { return ranges_[static_cast<size_t>(i)].begin; }
  int32_t end(int64_t i) const { return ranges_[static_cast<size_t>(i)].end; }
  // Weights of the outputs [begin(i), end(i)).
  const A* weights(int64_t i) const {
    return weights_.data() + ranges_[static_cast<size_t>(i)].first;
  }

  // The part of input i's sum that lies in outputs [first, first + count), of which `output` holds
  // the first. Vectors of partial sums keep the rounding of long sums at the level of short ones.
  A dot(int64_t i, const A* __restrict output, int64_t first, int64_t count) const {
    const int64_t from = std::max<int64_t>(begin(i), first);
    const int64_t to = std::min<int64_t>(end(i), first + count);
    const int64_t n = to - from;
    if (n <= 0) {
      return A(0);
    }
    const A* __restrict w = weights(i) + (from - begin(i));
    const A* __restrict v = output + (from - first);
    A total = 0;
    int64_t x = 0;
    while (x + kLanes<A> <= n) {
      // Terms of one chain of additions, per lane, before it joins the total.
      const int64_t last = std::min(n - kLanes<A>, x + 31 * kLanes<A>);
      Vec<A> sum{};
      for (; x <= last; x += kLanes<A>) {
        sum = sum + vec_load(w + x) * vec_load(v + x);
      }
      A lanes = 0;
      for (int64_t i = 0; i < kLanes<A>; ++i) {
        lanes += sum[i];
      }
      total += lanes;
    }
    A rest = 0;
    for (; x < n; ++x) {
      rest += w[x] * v[x];
    }
    return total + rest;
  }

 private:
  struct Range {
    int32_t begin, end;
    int64_t first;  // of its weights
  };
  std::vector<Range> ranges_;
  std::vector<A> weights_;
};
