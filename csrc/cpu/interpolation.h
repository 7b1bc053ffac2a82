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
        taps_(all_taps(axis)),
        weights_{std::vector<A>(padded()), std::vector<A>(padded())},
        offsets_{std::vector<Int>(padded()), std::vector<Int>(padded())} {
    for (size_t x = 0; x < taps_.size(); ++x) {
      weights_[0][x] = taps_[x].w0;
      weights_[1][x] = taps_[x].w1;
    }
    for (int64_t x = 0; x < size_out(); x += kLanes<A>) {
      Step step{place(tap(x).i0), place(tap(x).i1), true};
      for (int64_t i = x; i < std::min(x + kLanes<A>, size_out()); ++i) {
        const Int first = place(tap(i).i0) - step.first[0];
        const Int second = place(tap(i).i1) - step.first[1];
        offsets_[0][static_cast<size_t>(i)] = first;
        offsets_[1][static_cast<size_t>(i)] = second;
        step.near =
            step.near && 0 <= first && first < kLanes<A> && 0 <= second && second < kLanes<A>;
      }
      steps_.push_back(step);
    }
  }

  int64_t size_in() const { return size_in_; }
  int64_t size_out() const { return static_cast<int64_t>(taps_.size()); }
  const UpsampleTaps<A>& tap(int64_t x) const { return taps_[static_cast<size_t>(x)]; }
  // Values of an input row with what must follow them: the 0 that lies beyond a zero border, and
  // what whole vectors read behind it.
  int64_t input_size() const { return size_in_ + kLanes<A> + 1; }

  // Outputs [begin, end) of one row; begin is a multiple of the lanes. `input` has input_size()
  // values. Whole vectors are written, up to one vector beyond `end`.
  void row(const A* __restrict input, A* __restrict output, int64_t begin, int64_t end) const {
    for (int64_t x = begin; x < end; x += kLanes<A>) {
      const Step& step = steps_[static_cast<size_t>(x / kLanes<A>)];
      if (step.near) {
        // The inputs of a vector of outputs lie within a vector each.
        const Vec<A> a = permuted(input + step.first[0], offsets_[0], x);
        const Vec<A> b = permuted(input + step.first[1], offsets_[1], x);
        vec_store(output + (x - begin),
                  vec_load(&weights_[0][static_cast<size_t>(x)]) * a +
                      vec_load(&weights_[1][static_cast<size_t>(x)]) * b);
        continue;
      }
      for (int64_t i = x; i < std::min(x + kLanes<A>, end); ++i) {
        output[i - begin] =
            tap(i).w0 * input[place(tap(i).i0)] + tap(i).w1 * input[place(tap(i).i1)];
      }
    }
  }

  // All outputs of one row, for pixels of `inner` values each. `input` has size_in + 1 pixels, the
  // last of zeros.
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
  using Int = std::remove_cvref_t<decltype(VecInt<A>{}[0])>;
  // A vector of outputs: its first inputs, and whether all its inputs are within a vector of them.
  struct Step {
    Int first[2];
    bool near;
  };

  size_t padded() const { return static_cast<size_t>(round_up(size_out(), kLanes<A>)); }
  Int place(int32_t i) const { return i < 0 ? static_cast<Int>(size_in_) : i; }
  DILSEG_INLINE Vec<A> permuted(const A* from, const std::vector<Int>& offsets, int64_t x) const {
    VecInt<A> lanes;
    std::memcpy(&lanes, &offsets[static_cast<size_t>(x)], sizeof(lanes));
    return vec_permute<A>(vec_load(from), lanes);
  }

  int64_t size_in_;
  std::vector<UpsampleTaps<A>> taps_;
  std::vector<A> weights_[2];    // of the taps, in whole vectors
  std::vector<Int> offsets_[2];  // of the taps from the first of their vector
  std::vector<Step> steps_;
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
  DILSEG_INLINE A dot(int64_t i, const A* __restrict output, int64_t first, int64_t count) const {
    const int64_t from = std::max<int64_t>(begin(i), first);
    const int64_t to = std::min<int64_t>(end(i), first + count);
    const int64_t n = to - from;
    if (n <= 0) {
      return A(0);
    }
    const A* __restrict w = weights(i) + (from - begin(i));
    const A* __restrict v = output + (from - first);
    if (n == 4) {  // a whole window of scale 2
      return (w[0] * v[0] + w[1] * v[1]) + (w[2] * v[2] + w[3] * v[3]);
    }
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
