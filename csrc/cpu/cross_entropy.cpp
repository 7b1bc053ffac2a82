// SPDX-License-Identifier: Apache-2.0
//
// Softmax cross-entropy over [n, c, h, w] logits and its gradient, on the CPU. With m = max_k x_k,
// s = sum_k exp(x_k - m), t the label, v the class weights (1 without), e = label_smoothing:
//   loss = (1 - e) v_t (log s - (x_t - m)) + e/c sum_k v_k (log s - (x_k - m))
//   dloss/dx_k = ((1 - e) v_t + e/c sum_j v_j) p_k - (1 - e) v_t [k = t] - e/c v_k
// Pixels are taken in tiles: a tile's logits are widened into a [c][tile] buffer, whatever their
// layout and dtype, and every loop over the buffer runs along pixels and vectorises. A partial of
// 256 pixels belongs to one thread and is summed in double in pixel order; partials are added in
// order, so results do not depend on the number of threads.
#include "dilseg/cross_entropy.h"

#include "cpu/dtype.h"
#include "cpu/exp.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

namespace dilseg::cpu {
namespace {

// Values that a tile's buffer may hold and still stay in the first-level cache (32 KiB of floats).
constexpr int64_t kTileValues = 8192;
constexpr int64_t kMinTile = 16;
// Logits a thread should own at least.
constexpr int64_t kGrain = 32768;

int64_t load_label(const CrossEntropyProblem& p, int64_t pixel) {
  switch (p.target_type) {
    case IndexType::kInt64:
      return static_cast<const int64_t*>(p.target)[pixel];
    case IndexType::kInt32:
      return static_cast<const int32_t*>(p.target)[pixel];
    case IndexType::kUInt8:
      break;
  }
  return static_cast<const uint8_t*>(p.target)[pixel];
}

// A run of pixels whose addresses differ by one stride.
struct Run {
  int64_t first;  // pixel, counted over [n, h, w]
  int64_t count;
  int64_t offset(const CrossEntropyProblem& p, const Strides4& s) const {
    const int64_t x = first % p.w;
    const int64_t y = first / p.w % p.h;
    const int64_t n = first / (p.w * p.h);
    return n * s.n + y * s.h + x * s.w;
  }
};

// fn(run, position of the run in the tile) over the pixels [first, first + count). Rows merge into
// one run where the strides allow it, as they do in contiguous and channels_last tensors.
template <class F>
void for_runs(
    const CrossEntropyProblem& p, const Strides4& s, int64_t first, int64_t count, F&& fn) {
  const int64_t period = s.h == p.w * s.w ? p.h * p.w : p.w;
  for (int64_t done = 0; done < count;) {
    const int64_t pixel = first + done;
    const Run run{pixel, std::min(count - done, period - pixel % period)};
    fn(run, done);
    done += run.count;
  }
}

template <class T>
class Tile {
 public:
  using A = acc_t<T>;

  explicit Tile(const CrossEntropyProblem& problem)
      : problem_(problem),
        weight_(static_cast<const A*>(problem.weight)),
        capacity_(std::clamp(kTileValues / problem.c, kMinTile, kCrossEntropyPixelsPerPartial)),
        values_(static_cast<size_t>(capacity_ * problem.c)),
        labels_(static_cast<size_t>(capacity_)),
        max_(static_cast<size_t>(capacity_)),
        sum_(static_cast<size_t>(capacity_)) {
    smoothing_ = static_cast<A>(problem.label_smoothing / static_cast<double>(problem.c));
    keep_ = static_cast<A>(1.0 - problem.label_smoothing);
    for (int64_t k = 0; k < problem.c; ++k) {
      weight_sum_ += weight(k);
    }
  }

  int64_t capacity() const { return capacity_; }
  bool ignored(int64_t b) const { return label(b) < 0; }
  // The label of pixel b of the tile; -1 where ignored.
  int64_t label(int64_t b) const { return labels_[static_cast<size_t>(b)]; }
  A weight(int64_t k) const { return weight_ == nullptr ? A(1) : weight_[k]; }
  A max(int64_t b) const { return max_[static_cast<size_t>(b)]; }
  A sum(int64_t b) const { return sum_[static_cast<size_t>(b)]; }
  A keep() const { return keep_; }
  A smoothing() const { return smoothing_; }
  A weight_sum() const { return weight_sum_; }
  A* row(int64_t k) { return values_.data() + k * capacity_; }
  bool any_labelled() const { return any_labelled_; }

  // Reads and checks the labels of `count` pixels.
  LabelError read_labels(int64_t first, int64_t count) {
    count_ = count;
    any_labelled_ = false;
    for (int64_t b = 0; b < count; ++b) {
      int64_t label = load_label(problem_, first + b);
      if (label == problem_.ignore_index) {
        label = -1;
      } else if (label < 0 || label >= problem_.c) {
        return {first + b, label};
      } else {
        any_labelled_ = true;
      }
      labels_[static_cast<size_t>(b)] = label;
    }
    return {};
  }

  void read_logits(int64_t first) {
    const Strides4& s = problem_.input_strides;
    const auto* input = static_cast<const T*>(problem_.input);
    for_runs(problem_, s, first, count_, [&](const Run& run, int64_t at) {
      const T* __restrict from = input + run.offset(problem_, s);
      if (s.c == 1 && problem_.c > 1) {
        for (int64_t b = 0; b < run.count; ++b) {
          for (int64_t k = 0; k < problem_.c; ++k) {
            row(k)[at + b] = load(from + b * s.w + k);
          }
        }
        return;
      }
      for (int64_t k = 0; k < problem_.c; ++k) {
        const T* __restrict plane = from + k * s.c;
        A* __restrict to = row(k) + at;
        if (s.w == 1) {
          for (int64_t b = 0; b < run.count; ++b) {
            to[b] = load(plane + b);
          }
        } else {
          for (int64_t b = 0; b < run.count; ++b) {
            to[b] = load(plane + b * s.w);
          }
        }
      }
    });
  }

  void find_max() {
    A* __restrict max = max_.data();
    std::copy_n(row(0), count_, max);
    for (int64_t k = 1; k < problem_.c; ++k) {
      const A* __restrict x = row(k);
      for (int64_t b = 0; b < count_; ++b) {
        max[b] = max[b] < x[b] ? x[b] : max[b];
      }
    }
  }

  // sum = sum_k exp(x_k - shift).
  void sum_exp(const A* __restrict shift) {
    A* __restrict sum = sum_.data();
    std::fill_n(sum, count_, A(0));
    for (int64_t k = 0; k < problem_.c; ++k) {
      const A* __restrict x = row(k);
      for (int64_t b = 0; b < count_; ++b) {
        sum[b] += softmax_exp(x[b] - shift[b]);
      }
    }
  }
  void sum_exp() { sum_exp(max_.data()); }

  // The same, and leaves exp(x_k - shift) in place of x_k.
  void exponentiate(const A* __restrict shift) {
    A* __restrict sum = sum_.data();
    std::fill_n(sum, count_, A(0));
    for (int64_t k = 0; k < problem_.c; ++k) {
      A* __restrict x = row(k);
      for (int64_t b = 0; b < count_; ++b) {
        x[b] = softmax_exp(x[b] - shift[b]);
        sum[b] += x[b];
      }
    }
  }

  // Loss of a labelled pixel after find_max and sum_exp. Written with x - max, never with the
  // logsumexp: at logits of 1e4 that one is rounded to a thousandth.
  A loss(int64_t b, A log_sum) {
    const A shift = max(b);
    const int64_t t = label(b);
    A value = keep_ * weight(t) * (log_sum - (row(t)[b] - shift));
    if (smoothing_ > A(0)) {
      A distance = 0;
      for (int64_t k = 0; k < problem_.c; ++k) {
        distance += weight(k) * (shift - row(k)[b]);
      }
      value += smoothing_ * (weight_sum_ * log_sum + distance);
    }
    return value;
  }

 private:
  const CrossEntropyProblem& problem_;
  const A* weight_;
  int64_t capacity_;
  int64_t count_ = 0;
  bool any_labelled_ = false;
  A smoothing_, keep_;
  A weight_sum_ = 0;
  std::vector<A> values_;  // [c][capacity]
  std::vector<int64_t> labels_;
  std::vector<A> max_, sum_;
};

// Runs fn(tile, first pixel, count, partial index) -> LabelError over all pixels, and returns the
// first error. Each partial has its own slot for an error, so that threads share nothing.
template <class T, class F>
LabelError for_tiles(const CrossEntropyProblem& p, const ParallelFor& pool, F&& fn) {
  const int64_t pixels = p.n * p.h * p.w;
  const int64_t partials = cross_entropy_partials(pixels);
  std::vector<LabelError> errors(static_cast<size_t>(partials));
  const int64_t grain = std::max<int64_t>(1, kGrain / (kCrossEntropyPixelsPerPartial * p.c));
  parallel_for(pool, partials, grain, [&](int64_t begin, int64_t end) {
    Tile<T> tile(p);
    for (int64_t partial = begin; partial < end; ++partial) {
      const int64_t last = std::min(pixels, (partial + 1) * kCrossEntropyPixelsPerPartial);
      LabelError& error = errors[static_cast<size_t>(partial)];
      for (int64_t first = partial * kCrossEntropyPixelsPerPartial; first < last && error.pixel < 0;
           first += tile.capacity()) {
        const int64_t count = std::min(tile.capacity(), last - first);
        error = tile.read_labels(first, count);
        if (error.pixel < 0) {
          fn(tile, first, count, partial);
        }
      }
    }
  });
  for (const LabelError& error : errors) {
    if (error.pixel >= 0) {
      return error;
    }
  }
  return {};
}

template <class T>
LabelError forward(const CrossEntropyParams& params, const ParallelFor& pool) {
  using A = acc_t<T>;
  const CrossEntropyProblem& p = params.problem;
  const bool reduce = p.reduction != Reduction::kNone;
  auto* losses = static_cast<A*>(params.loss);
  auto* logsumexp = static_cast<A*>(params.logsumexp);
  struct Sums {
    double loss = 0;
    double weight = 0;
  };
  std::vector<Sums> partials(static_cast<size_t>(cross_entropy_partials(p.n * p.h * p.w)));

  const LabelError error =
      for_tiles<T>(p, pool, [&](Tile<T>& tile, int64_t first, int64_t count, int64_t partial) {
        if (tile.any_labelled()) {
          tile.read_logits(first);
          tile.find_max();
          tile.sum_exp();
        }
        Sums& sums = partials[static_cast<size_t>(partial)];
        for (int64_t b = 0; b < count; ++b) {
          A loss = 0;
          A lse = 0;
          if (!tile.ignored(b)) {
            const A log_sum = std::log(tile.sum(b));
            lse = tile.max(b) + log_sum;
            loss = tile.loss(b, log_sum);
            sums.loss += static_cast<double>(loss);
            sums.weight += static_cast<double>(tile.weight(tile.label(b)));
          }
          logsumexp[first + b] = lse;
          if (!reduce) {
            losses[first + b] = loss;
          }
        }
      });

  Sums total;
  for (const Sums& sums : partials) {
    total.loss += sums.loss;
    total.weight += sums.weight;
  }
  *static_cast<A*>(params.total_weight) = static_cast<A>(total.weight);
  if (reduce) {
    // No labelled pixel: 0 / 0, nan as in torch.
    const double loss = p.reduction == Reduction::kMean ? total.loss / total.weight : total.loss;
    *losses = static_cast<A>(loss);
  }
  return error;
}

template <class T>
LabelError backward(const CrossEntropyBackwardParams& params, const ParallelFor& pool) {
  using A = acc_t<T>;
  const CrossEntropyProblem& p = params.problem;
  const Strides4& s = params.grad_input_strides;
  const auto* grad_output = static_cast<const A*>(params.grad_output);
  const auto* logsumexp = static_cast<const A*>(params.logsumexp);
  auto* grad_input = static_cast<T*>(params.grad_input);
  A scale = 0;
  if (p.reduction == Reduction::kSum) {
    scale = *grad_output;
  } else if (p.reduction == Reduction::kMean) {
    scale = *grad_output / *static_cast<const A*>(params.total_weight);
  }

  return for_tiles<T>(p, pool, [&](Tile<T>& tile, int64_t first, int64_t count, int64_t) {
    if (tile.any_labelled()) {
      tile.read_logits(first);
      // Dividing by the sum of exp(x - logsumexp), 1 but for the rounding of the stored logsumexp,
      // takes that rounding out again; it matters for large logits.
      tile.exponentiate(logsumexp + first);
    }
    A factor[kCrossEntropyPixelsPerPartial];  // of exp(x_k - logsumexp)
    A picked[kCrossEntropyPixelsPerPartial];  // subtracted at the label
    A spread[kCrossEntropyPixelsPerPartial];  // times v_k, subtracted everywhere
    for (int64_t b = 0; b < count; ++b) {
      if (tile.ignored(b)) {
        factor[b] = picked[b] = spread[b] = A(0);
        continue;
      }
      const A upstream = p.reduction == Reduction::kNone ? grad_output[first + b] : scale;
      const A label_weight = tile.keep() * tile.weight(tile.label(b));
      factor[b] = upstream * (label_weight + tile.smoothing() * tile.weight_sum()) / tile.sum(b);
      picked[b] = upstream * label_weight;
      spread[b] = upstream * tile.smoothing();
    }
    for (int64_t k = 0; k < p.c; ++k) {
      A* __restrict x = tile.row(k);
      const A v = tile.weight(k);
      for (int64_t b = 0; b < count; ++b) {
        x[b] = factor[b] * x[b] - spread[b] * v;
      }
    }
    for (int64_t b = 0; b < count; ++b) {
      if (!tile.ignored(b)) {
        tile.row(tile.label(b))[b] -= picked[b];
        continue;
      }
      for (int64_t k = 0; k < p.c; ++k) {
        tile.row(k)[b] = A(0);  // exactly, whatever the logits were
      }
    }
    for_runs(p, s, first, count, [&](const Run& run, int64_t at) {
      T* __restrict to = grad_input + run.offset(p, s);
      if (s.c == 1 && p.c > 1) {
        for (int64_t b = 0; b < run.count; ++b) {
          for (int64_t k = 0; k < p.c; ++k) {
            store(to + b * s.w + k, tile.row(k)[at + b]);
          }
        }
        return;
      }
      for (int64_t k = 0; k < p.c; ++k) {
        T* __restrict plane = to + k * s.c;
        const A* __restrict x = tile.row(k) + at;
        if (s.w == 1) {
          for (int64_t b = 0; b < run.count; ++b) {
            store(plane + b, x[b]);
          }
        } else {
          for (int64_t b = 0; b < run.count; ++b) {
            store(plane + b * s.w, x[b]);
          }
        }
      }
    });
  });
}

}  // namespace

LabelError cross_entropy(const CrossEntropyParams& params, const ParallelFor& pool) {
  return dispatch_dtype(params.problem.dtype, [&]<class T>() { return forward<T>(params, pool); });
}

LabelError cross_entropy_backward(const CrossEntropyBackwardParams& params,
                                  const ParallelFor& pool) {
  return dispatch_dtype(params.problem.dtype, [&]<class T>() { return backward<T>(params, pool); });
}

}  // namespace dilseg::cpu
