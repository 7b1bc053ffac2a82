// SPDX-License-Identifier: Apache-2.0
//
// The loss of a tile of pixels, and its gradient, from a buffer of logits: what cross_entropy and
// upsample_cross_entropy share. No include guard, see cpu/instruction_sets.h.
//
// The buffer is [c][pitch], pixels along the rows, so that every step works on vectors of pixels,
// whatever the layout that the logits came from. Pixels beyond `count` up to a whole vector hold
// anything and are computed along; no result of theirs is used.

// Options of a loss, in its arithmetic.
template <class A>
struct LossOptions {
  int64_t c;
  int64_t ignore_index;
  IndexType target_type;
  const void* target;
  const A* weight;  // null weighs every class 1
  A keep;           // 1 - label_smoothing
  A smoothing;      // label_smoothing / c
  A weight_sum = 0;

  // P: CrossEntropyProblem or UpsampleCrossEntropyProblem.
  template <class P>
  LossOptions(const P& p, int64_t classes)
      : c(classes),
        ignore_index(p.ignore_index),
        target_type(p.target_type),
        target(p.target),
        weight(static_cast<const A*>(p.weight)),
        keep(static_cast<A>(1.0 - p.label_smoothing)),
        smoothing(static_cast<A>(p.label_smoothing / static_cast<double>(classes))) {
    for (int64_t k = 0; k < c; ++k) {
      weight_sum += class_weight(k);
    }
  }

  A class_weight(int64_t k) const { return weight == nullptr ? A(1) : weight[k]; }
};

// Losses and class weights of a partial, in double. A pixel belongs to the lane of its position in
// the tile, and lanes are added in order: the sum does not depend on threads.
struct LossSums {
  static constexpr int64_t kParts = 8;
  double loss[kParts] = {};
  double weight[kParts] = {};
};

// Adds the partials in order. "mean" over no labelled pixel is 0 / 0, nan as in torch.
template <class A>
void finish_loss(const std::vector<LossSums>& partials,
                 Reduction reduction,
                 A* loss,
                 A* total_weight) {
  double losses = 0;
  double weights = 0;
  for (const LossSums& sums : partials) {
    double partial_loss = 0;
    double partial_weight = 0;
    for (int64_t i = 0; i < LossSums::kParts; ++i) {
      partial_loss += sums.loss[i];
      partial_weight += sums.weight[i];
    }
    losses += partial_loss;
    weights += partial_weight;
  }
  *total_weight = static_cast<A>(weights);
  if (reduction != Reduction::kNone) {
    *loss = static_cast<A>(reduction == Reduction::kMean ? losses / weights : losses);
  }
}

template <class A>
class SoftmaxTile {
 public:
  SoftmaxTile(const LossOptions<A>& options, int64_t capacity)
      : o_(options),
        capacity_(round_up(capacity, std::max(kGroup, kLine))),
        // An odd number of cache lines from row to row: no two rows of a column share a set.
        pitch_(capacity_ + kLine),
        values_(options.c * pitch_),
        labels_(capacity_),
        pixels_(kRows * capacity_) {
    std::fill_n(values_.get(), options.c * pitch_, A(0));
    std::fill_n(pixels_.get(), kRows * capacity_, A(0));
  }

  int64_t capacity() const { return capacity_; }
  int64_t pitch() const { return pitch_; }
  A* row(int64_t k) { return values_.get() + k * pitch_; }
  bool any_labelled() const { return any_labelled_; }
  // Loss of every pixel after `losses`.
  const A* loss() const { return pixel_row(kLoss); }
  const A* max() const { return pixel_row(kMax); }
  const A* log_sum() const { return pixel_row(kLogSum); }
  bool ignored(int64_t b) const { return labels_.get()[b] < 0; }

  // Reads and checks the labels of the pixels [first, first + count).
  LabelError read_labels(int64_t first, int64_t count) {
    switch (o_.target_type) {
      case IndexType::kInt64:
        return read_labels_of(static_cast<const int64_t*>(o_.target), first, count);
      case IndexType::kInt32:
        return read_labels_of(static_cast<const int32_t*>(o_.target), first, count);
      case IndexType::kUInt8:
        break;
    }
    return read_labels_of(static_cast<const uint8_t*>(o_.target), first, count);
  }

  // Leaves exp(x_k - max_j x_j) in place of x_k, and the maximum and the sum per pixel.
  void softmax() {
    pick();
    const int64_t c = o_.c;
    for (int64_t b = 0; b < count_; b += kGroup) {
      const A* x = values_.get() + b;
      Vec<A> max[2] = {vec_load(x), vec_load(x + kLanes<A>)};
      for (int64_t k = 1; k < c; ++k) {
        x += pitch_;
        max[0] = vec_max<A>(max[0], vec_load(x));
        max[1] = vec_max<A>(max[1], vec_load(x + kLanes<A>));
      }
      vec_store(pixel_row(kMax) + b, max[0]);
      vec_store(pixel_row(kMax) + b + kLanes<A>, max[1]);
      exponentiate(b, max, o_.smoothing > A(0));
    }
  }

  // The same with the given logsumexp in place of the maximum: the sum is 1 but for its rounding.
  void softmax_from(const A* logsumexp) {
    for (int64_t b = 0; b < count_; b += kGroup) {
      const Vec<A> shift[2] = {
          vec_load_part(logsumexp + b, count_ - b),
          vec_load_part(logsumexp + b + kLanes<A>, std::max<int64_t>(count_ - b - kLanes<A>, 0))};
      exponentiate(b, shift, false);
    }
  }

  // Losses, after `softmax`. Written with x - max, never with the logsumexp: at logits of 1e4 that
  // one is rounded to a thousandth.
  void losses() {
    for (int64_t b = 0; b < count_; b += kLanes<A>) {
      const Vec<A> log_sum = vec_log(vec_load(pixel_row(kSum) + b));
      const Vec<A> picked = vec_load(pixel_row(kPicked) + b) - vec_load(pixel_row(kMax) + b);
      const Vec<A> weight = vec_load(pixel_row(kWeight) + b);
      Vec<A> loss = o_.keep * weight * (log_sum - picked);
      if (o_.smoothing > A(0)) {
        loss = loss + o_.smoothing * (o_.weight_sum * log_sum + vec_load(pixel_row(kDistance) + b));
      }
      vec_store(pixel_row(kLogSum) + b, log_sum);
      vec_store(pixel_row(kLoss) + b, vec_keep<A>(loss, labelled(b)));
    }
  }

  void add_to(LossSums& sums) const {
    const A* loss = pixel_row(kLoss);
    const A* weight = pixel_row(kWeight);
    const int64_t whole = count_ / LossSums::kParts * LossSums::kParts;
    for (int64_t b = 0; b < whole; b += LossSums::kParts) {
      for (int64_t i = 0; i < LossSums::kParts; ++i) {
        sums.loss[i] += static_cast<double>(loss[b + i]);
        sums.weight[i] += static_cast<double>(weight[b + i]);
      }
    }
    for (int64_t b = whole; b < count_; ++b) {
      sums.loss[b - whole] += static_cast<double>(loss[b]);
      sums.weight[b - whole] += static_cast<double>(weight[b]);
    }
  }

  // Fetches rows of the next tile into the caches while this one is computed: element b of row k is
  // at rows + k * row_bytes + b * value_bytes. A place that cannot be read is no error.
  void fetch_ahead(const void* rows, int64_t row_bytes, int64_t value_bytes) {
    ahead_ = static_cast<const char*>(rows);
    ahead_row_ = row_bytes;
    ahead_value_ = value_bytes;
  }

  // After either softmax: prepares `gradient` for upstream gradients, one per pixel (step 1) or one
  // for all (step 0).
  void begin_gradient(const A* upstream, int64_t step) {
    for (int64_t b = 0; b < count_; b += kLanes<A>) {
      const Vec<A> g = step == 0 ? vec_set<A>(*upstream) : vec_load_part(upstream + b, count_ - b);
      const Vec<A> hard = o_.keep * vec_load(pixel_row(kWeight) + b);
      const Vec<A> all = hard + o_.smoothing * o_.weight_sum;
      const Vec<A> sum = vec_load(pixel_row(kSum) + b);
      vec_store(pixel_row(kFactor) + b, g * all / sum);
      vec_store(pixel_row(kSpread) + b, g * o_.smoothing);
      vec_store(pixel_row(kAll) + b, all);
      vec_store(pixel_row(kShare) + b, all != A(0) ? sum * (hard / all) : Vec<A>{});
    }
    // all * (p - hard / all) instead of all * p - hard: the difference of numbers near 1 is exact.
    const A* share = pixel_row(kShare);
    for (int64_t b = 0; b < count_; ++b) {
      if (!ignored(b)) {
        row(labels_.get()[b])[b] -= share[b];
      }
    }
    if (o_.weight != nullptr) {
      restore_cancelled(upstream, step);
    }
  }

  // Calls fn(k, b, gradient) for every class k and vector of pixels that begins at b: the gradient
  // with respect to their logits, +0 where ignored, whatever the logits were.
  template <class F>
  DILSEG_INLINE void gradients(F&& fn) {
    if (o_.smoothing > A(0)) {
      gradients_of<true>(fn);
    } else {
      gradients_of<false>(fn);
    }
  }

 private:
  // Rows of pixels_.
  enum {
    kMax,
    kSum,
    kPicked,
    kWeight,
    kDistance,
    kLogSum,
    kLoss,
    kFactor,
    kSpread,
    kAll,
    kShare,
    kMask,
    kRows
  };
  static constexpr int64_t kLine = 64 / sizeof(A);
  static constexpr int64_t kGroup = 2 * kLanes<A>;  // pixels of one step

  template <bool kSmooth, class F>
  DILSEG_INLINE void gradients_of(F&& fn) {
    const int64_t count = count_;
    const A* factor = pixel_row(kFactor);
    const A* spread = pixel_row(kSpread);
    const A* mask = pixel_row(kMask);
    for (int64_t k = 0; k < o_.c; ++k) {
      const A* e = row(k);
      const Vec<A> weight = vec_set<A>(kSmooth ? o_.class_weight(k) : A(0));
      for (int64_t b = 0; b < count; b += kLanes<A>) {
        Vec<A> g = vec_load(factor + b) * vec_load(e + b);
        if constexpr (kSmooth) {
          g = g - vec_load(spread + b) * weight;
        }
        fn(k, b, vec_keep<A>(g, vec_bits<A>(vec_load(mask + b))));
      }
    }
  }

  A* pixel_row(int row) const { return pixels_.get() + row * capacity_; }
  DILSEG_INLINE VecInt<A> labelled(int64_t b) const {
    return vec_bits<A>(vec_load(pixel_row(kMask) + b));
  }

  template <class I>
  LabelError read_labels_of(const I* __restrict target, int64_t first, int64_t count) {
    using Bits = std::remove_cvref_t<decltype(VecInt<A>{}[0])>;
    count_ = count;
    const int64_t c = o_.c;
    const int64_t ignore_index = o_.ignore_index;
    int64_t* __restrict labels = labels_.get();
    A* __restrict mask = pixel_row(kMask);
    A* __restrict weight = pixel_row(kWeight);
    target += first;
    // No branch inside, so that it vectorises.
    int64_t labelled = 0;
    int64_t bad = 0;
    for (int64_t b = 0; b < count; ++b) {
      const int64_t label = static_cast<int64_t>(target[b]);
      const bool ignored = label == ignore_index;
      bad += !ignored & (static_cast<uint64_t>(label) >= static_cast<uint64_t>(c));
      labelled += !ignored;
      labels[b] = ignored ? -1 : label;
      mask[b] = std::bit_cast<A>(ignored ? Bits{0} : Bits{-1});
      weight[b] = ignored ? A(0) : A(1);
    }
    any_labelled_ = labelled > 0;
    if (bad > 0) {
      for (int64_t b = 0; b < count; ++b) {
        const int64_t label = static_cast<int64_t>(target[b]);
        if (label != ignore_index && (label < 0 || label >= c)) {
          return {first + b, label};
        }
      }
    }
    if (o_.weight != nullptr) {
      for (int64_t b = 0; b < count; ++b) {
        if (labels[b] >= 0) {
          weight[b] = o_.weight[labels[b]];
        }
      }
    }
    return {};
  }

  // Where negative class weights make the factor of p vanish, the label's own term is left.
  void restore_cancelled(const A* upstream, int64_t step) {
    for (int64_t b = 0; b < count_; ++b) {
      const A hard = o_.keep * pixel_row(kWeight)[b];
      if (ignored(b) || hard == A(0) || pixel_row(kAll)[b] != A(0)) {
        continue;
      }
      for (int64_t k = 0; k < o_.c; ++k) {
        row(k)[b] = A(0);
      }
      row(labels_.get()[b])[b] = A(1);
      pixel_row(kFactor)[b] = -upstream[b * step] * hard;
    }
  }

  // The logits of the labels, before they are overwritten.
  void pick() {
    A* picked = pixel_row(kPicked);
    for (int64_t b = 0; b < count_; ++b) {
      picked[b] = row(std::max<int64_t>(labels_.get()[b], 0))[b];
    }
  }

  // Two vectors at a time: one alone would wait for its own chain of operations.
  template <bool kSmooth>
  DILSEG_INLINE void exponentiate(int64_t b, const Vec<A> (&shift)[2]) {
    const int64_t c = o_.c;
    const int64_t pitch = pitch_;
    A* x = values_.get() + b;
    Vec<A> sum[2] = {};
    Vec<A> distance[2] = {};
    const char* ahead = ahead_ + b * ahead_value_;
    for (int64_t k = 0; k < c; ++k, x += pitch) {
      __builtin_prefetch(ahead);
      ahead += ahead_row_;
      for (int i = 0; i < 2; ++i) {
        const Vec<A> shifted = vec_load(x + i * kLanes<A>) - shift[i];
        const Vec<A> e = vec_exp(shifted);
        sum[i] = sum[i] + e;
        if constexpr (kSmooth) {
          distance[i] = distance[i] - o_.class_weight(k) * shifted;
        }
        vec_store(x + i * kLanes<A>, e);
      }
    }
    for (int i = 0; i < 2; ++i) {
      vec_store(pixel_row(kSum) + b + i * kLanes<A>, sum[i]);
      vec_store(pixel_row(kDistance) + b + i * kLanes<A>, distance[i]);
    }
  }
  DILSEG_INLINE void exponentiate(int64_t b, const Vec<A> (&shift)[2], bool smooth) {
    if (smooth) {
      exponentiate<true>(b, shift);
    } else {
      exponentiate<false>(b, shift);
    }
  }

  const LossOptions<A>& o_;
  int64_t capacity_, pitch_;
  int64_t count_ = 0;
  bool any_labelled_ = false;
  const char* ahead_ = nullptr;
  int64_t ahead_row_ = 0;
  int64_t ahead_value_ = 0;
  Aligned<A> values_;        // [c][pitch]
  Aligned<int64_t> labels_;  // -1 where ignored
  Aligned<A> pixels_;        // [kRows][capacity]
};
