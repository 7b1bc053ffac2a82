// SPDX-License-Identifier: Apache-2.0
//
// Softmax cross-entropy over [n, c, h, w] logits and its gradient. With m = max_k x_k,
// s = sum_k exp(x_k - m), t the label, v the class weights (1 without), e = label_smoothing:
//   loss = (1 - e) v_t (log s - (x_t - m)) + e/c sum_k v_k (log s - (x_k - m))
//   dloss/dx_k = ((1 - e) v_t + e/c sum_j v_j) p_k - (1 - e) v_t [k = t] - e/c v_k
// Pixels are taken in tiles: a tile's logits are widened into a [c][tile] buffer, whatever their
// layout and dtype, and all arithmetic runs along the pixels of the buffer (softmax_tile.h).
// Logits are read once in each direction, the gradient is written once, around the caches where it
// is large. A tile belongs to one thread and tiles are added in order, so results do not depend
// on the number of threads. No include guard, see cpu/instruction_sets.h.
#include "cpu/softmax_tile.h"

// Values that a tile's buffer may hold: half of a second-level cache of 256 KiB.
constexpr int64_t kTileValues = 32768;
// Long rows of each class plane, for the sake of the hardware's prefetching.
constexpr int64_t kMaxTile = 1024;
constexpr int64_t kMinTile = 16;
// Logits a thread should own at least.
constexpr int64_t kGrain = 32768;

// Pixels of a tile, and of a partial sum: a function of the number of classes alone.
constexpr int64_t tile_pixels(int64_t c) {
  return std::clamp(round_up(kTileValues / c, kMinTile), kMinTile, kMaxTile);
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

// Fills the tile's buffer with the logits of the pixels [first, first + count).
template <class T>
void read_logits(const CrossEntropyProblem& p,
                 SoftmaxTile<acc_t<T>>& tile,
                 int64_t first,
                 int64_t count) {
  using A = acc_t<T>;
  const Strides4& s = p.input_strides;
  for_runs(p, s, first, count, [&](const Run& run, int64_t at) {
    const T* __restrict from = static_cast<const T*>(p.input) + run.offset(p, s);
    if (s.c == 1 && p.c > 1) {
      for (int64_t b = 0; b < run.count; ++b) {
        A* __restrict to = tile.row(0) + at + b;
        for (int64_t k = 0; k < p.c; ++k) {
          to[k * tile.pitch()] = load(from + b * s.w + k);
        }
      }
      return;
    }
    if (s.w == 1) {
      tile.fetch_ahead(from + run.count, s.c * static_cast<int64_t>(sizeof(T)), sizeof(T));
    }
    for (int64_t k = 0; k < p.c; ++k) {
      const T* __restrict plane = from + k * s.c;
      A* __restrict to = tile.row(k) + at;
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

// Runs fn(tile, first pixel, count, partial index) over all pixels, and returns the first error in
// a label. Each partial has its own slot for an error, so that threads share nothing.
template <class A, class F>
LabelError for_tiles(const CrossEntropyProblem& p, const ParallelFor& pool, F&& fn) {
  const LossOptions<A> options(p, p.c);
  const int64_t pixels = p.n * p.h * p.w;
  const int64_t capacity = tile_pixels(p.c);
  const int64_t tiles = (pixels + capacity - 1) / capacity;
  std::vector<LabelError> errors(static_cast<size_t>(tiles));
  const int64_t grain = std::max<int64_t>(1, kGrain / (capacity * p.c));
  parallel_for(pool, tiles, grain, [&](int64_t begin, int64_t end) {
    SoftmaxTile<A> tile(options, capacity);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t first = index * capacity;
      const int64_t count = std::min(capacity, pixels - first);
      const LabelError error = tile.read_labels(first, count);
      errors[static_cast<size_t>(index)] = error;
      if (error.pixel < 0) {
        fn(tile, first, count, index);
      }
    }
    finish_streaming();
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
  const int64_t capacity = tile_pixels(p.c);
  std::vector<LossSums> partials(static_cast<size_t>((p.n * p.h * p.w + capacity - 1) / capacity));

  const LabelError error =
      for_tiles<A>(p, pool, [&](SoftmaxTile<A>& tile, int64_t first, int64_t count, int64_t index) {
        if (!tile.any_labelled()) {
          std::fill_n(logsumexp + first, count, A(0));
          if (!reduce) {
            std::fill_n(losses + first, count, A(0));
          }
          return;
        }
        read_logits<T>(p, tile, first, count);
        tile.softmax();
        tile.losses();
        tile.add_to(partials[static_cast<size_t>(index)]);
        for (int64_t b = 0; b < count; ++b) {
          logsumexp[first + b] = tile.ignored(b) ? A(0) : tile.max()[b] + tile.log_sum()[b];
        }
        if (!reduce) {
          std::copy_n(tile.loss(), count, losses + first);
        }
      });
  finish_loss(partials, p.reduction, losses, static_cast<A*>(params.total_weight));
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
  const int64_t step = p.reduction == Reduction::kNone ? 1 : 0;
  A scale = 0;
  if (p.reduction == Reduction::kSum) {
    scale = *grad_output;
  } else if (p.reduction == Reduction::kMean) {
    scale = *grad_output / *static_cast<const A*>(params.total_weight);
  }
  const bool streamed = p.n * p.c * p.h * p.w * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes;

  return for_tiles<A>(p, pool, [&](SoftmaxTile<A>& tile, int64_t first, int64_t count, int64_t) {
    if (tile.any_labelled()) {
      read_logits<T>(p, tile, first, count);
      tile.softmax_from(logsumexp + first);
    }
    tile.begin_gradient(step == 0 ? &scale : grad_output + first, step);
    tile.gradients([&](int64_t k, int64_t b, Vec<A> g) { vec_store(tile.row(k) + b, g); });
    for_runs(p, s, first, count, [&](const Run& run, int64_t at) {
      T* __restrict to = grad_input + run.offset(p, s);
      if (s.c == 1 && p.c > 1) {
        for (int64_t b = 0; b < run.count; ++b) {
          const A* __restrict from = tile.row(0) + at + b;
          for (int64_t k = 0; k < p.c; ++k) {
            store(to + b * s.w + k, from[k * tile.pitch()]);
          }
        }
        return;
      }
      for (int64_t k = 0; k < p.c; ++k) {
        T* __restrict plane = to + k * s.c;
        const A* __restrict x = tile.row(k) + at;
        if (s.w == 1) {
          write_row(plane, x, run.count, streamed);
        } else {
          for (int64_t b = 0; b < run.count; ++b) {
            store(plane + b * s.w, x[b]);
          }
        }
      }
    });
  });
}

inline LabelError cross_entropy(const CrossEntropyParams& params, const ParallelFor& pool) {
  return dispatch_dtype(params.problem.dtype, [&]<class T>() { return forward<T>(params, pool); });
}

inline LabelError cross_entropy_backward(const CrossEntropyBackwardParams& params,
                                         const ParallelFor& pool) {
  return dispatch_dtype(params.problem.dtype, [&]<class T>() { return backward<T>(params, pool); });
}
