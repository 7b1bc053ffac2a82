// SPDX-License-Identifier: Apache-2.0
//
// Softmax cross-entropy of upsampled logits z = U x, and its gradient U^T (dloss/dz), without z:
//   z_k(y,x) = sum_ij wy(y,i) wx(x,j) input[n,k,i,j]          loss and dloss/dz_k: cross_entropy
//   grad_input[n,k,i,j] = sum_yx wy(y,i) wx(x,j) dloss/dz_k(y,x)
// A thread owns a band of 32 output rows of one image and takes them in tiles of neighbouring
// pixels. The two input rows that an output row blends are stretched along x once per tile; the
// output row's logits are their blend, its gradients are added, with the same two weights, to one
// row of sums for each; when an input row has served its last output row, its sums are gathered
// along x into the band's own gradient of the few input rows it touches. A second pass adds the
// bands in order, so results do not depend on the number of threads. Per upsampled logit: one exp,
// about ten multiply-adds, no memory beyond the caches. No include guard, see
// cpu/instruction_sets.h.
#include "cpu/softmax_tile.h"
#include "cpu/upsampled_tile.h"

// Output rows of a band; also the longest chain of additions along y.
constexpr int64_t kBandRows = 32;

// A band of output rows, and the input rows that it reads.
struct Band {
  int64_t first_y, last_y;  // last is exclusive
  int64_t first_row, rows;  // of the input
  int64_t offset;           // of its gradient among an image's, in rows
};

// How every image is cut.
template <class A>
struct BandPlan {
  std::vector<Band> bands;
  int64_t rows = 0;  // of all bands

  BandPlan(const std::vector<UpsampleTaps<A>>& taps, int64_t h_in) {
    const auto h_out = static_cast<int64_t>(taps.size());
    for (int64_t y = 0; y < h_out; y += kBandRows) {
      Band band{y, std::min(y + kBandRows, h_out), h_in, 0, rows};
      int64_t last_row = -1;
      for (int64_t dst = y; dst < band.last_y; ++dst) {
        for (const int32_t i :
             {taps[static_cast<size_t>(dst)].i0, taps[static_cast<size_t>(dst)].i1}) {
          if (i >= 0) {
            band.first_row = std::min<int64_t>(band.first_row, i);
            last_row = std::max<int64_t>(last_row, i);
          }
        }
      }
      band.rows = std::max<int64_t>(last_row + 1 - band.first_row, 0);
      rows += band.rows;
      bands.push_back(band);
    }
  }
};

// One thread's buffers, and the walk over a band.
template <class T>
class BandSweep {
 public:
  using A = acc_t<T>;

  BandSweep(const UpsampleCrossEntropyProblem& problem,
            const LossOptions<A>& options,
            const std::vector<UpsampleTaps<A>>& taps_h,
            const Stretch<A>& stretch,
            const Gather<A>& gather)
      : p_(problem),
        g_(problem.geometry),
        taps_h_(taps_h),
        stretch_(stretch),
        gather_(gather),
        tile_(options, upsampled_tile_pixels(g_.c)),
        source_(stretch.input_size()),
        rows_{Row(g_.c * tile_.pitch()), Row(g_.c * tile_.pitch())} {}

  // Losses of the band: summed into `sums`, and written to `losses` [n, h_out, w_out] unless null.
  // Gradients for upstream gradients [n, h_out, w_out], or 1 if null, are added to `grad`
  // [c, band.rows, w_in] unless that is null.
  LabelError run(
      int64_t n, const Band& band, const A* upstream, LossSums* sums, A* losses, A* grad) {
    band_ = &band;
    grad_ = grad;
    image_ = static_cast<const T*>(p_.input) + n * p_.input_strides.n;
    for (int64_t x = 0; x < g_.w_out; x += tile_.capacity()) {
      columns_ = tile_columns(stretch_, x, std::min(tile_.capacity(), g_.w_out - x));
      rows_[0].index = rows_[1].index = Row::kNone;
      for (int64_t y = band.first_y; y < band.last_y; ++y) {
        const int64_t pixel = (n * g_.h_out + y) * g_.w_out + x;
        const LabelError error = tile_.read_labels(pixel, columns_.count);
        if (error.pixel >= 0) {
          return error;
        }
        if (tile_.any_labelled()) {
          sweep(y, upstream == nullptr ? nullptr : upstream + pixel, sums, losses != nullptr);
        }
        if (losses != nullptr) {
          if (tile_.any_labelled()) {
            std::copy_n(tile_.loss(), columns_.count, losses + pixel);
          } else {
            std::fill_n(losses + pixel, columns_.count, A(0));
          }
        }
      }
      retire(rows_[0]);
      retire(rows_[1]);
    }
    return {};
  }

 private:
  // A stretched input row, and the weighted sum of the gradients of the output rows it served.
  struct Row : StretchedRow<A> {
    explicit Row(int64_t size) : StretchedRow<A>(size), sums(size) {}
    Aligned<A> sums;
  };

  Row& row(int32_t index, int32_t keep) {
    for (Row& kept : rows_) {
      if (kept.index == index) {
        return kept;
      }
    }
    Row& fresh = rows_[rows_[0].index == keep ? 1 : 0];
    retire(fresh);
    fresh.index = index;
    stretch_channels(stretch_,
                     columns_,
                     image_,
                     p_.input_strides,
                     g_.c,
                     index,
                     source_.get(),
                     fresh.values.get(),
                     tile_.pitch());
    if (grad_ != nullptr) {
      std::fill_n(fresh.sums.get(), g_.c * tile_.pitch(), A(0));
    }
    return fresh;
  }

  // Gathers the row's sums along x into the band's gradient.
  void retire(Row& row) {
    if (grad_ != nullptr && row.index >= 0) {
      for (int64_t k = 0; k < g_.c; ++k) {
        A* __restrict to = grad_ + (k * band_->rows + row.index - band_->first_row) * g_.w_in;
        const A* sums = row.sums.get() + k * tile_.pitch();
        for (int64_t j = columns_.first_input; j <= columns_.last_input; ++j) {
          to[j] += gather_.dot(j, sums, columns_.begin, columns_.count);
        }
      }
    }
    row.index = Row::kNone;
  }

  // One output row of the tile.
  void sweep(int64_t y, const A* upstream, LossSums* sums, bool writes_losses) {
    const UpsampleTaps<A>& tap = taps_h_[static_cast<size_t>(y)];
    Row& row0 = row(tap.i0, tap.i1);
    Row& row1 = row(tap.i1, tap.i0);
    const int64_t width = round_up(columns_.count, kLanes<A>);
    const int64_t pitch = tile_.pitch();
    for (int64_t k = 0; k < g_.c; ++k) {
      const A* a = row0.values.get() + k * pitch;
      const A* b = row1.values.get() + k * pitch;
      A* z = tile_.row(k);
      for (int64_t i = 0; i < width; i += kLanes<A>) {
        vec_store(z + i, tap.w0 * vec_load(a + i) + tap.w1 * vec_load(b + i));
      }
    }
    tile_.softmax();
    if (sums != nullptr || writes_losses) {
      tile_.losses();
      if (sums != nullptr) {
        tile_.add_to(*sums);
      }
    }
    if (grad_ == nullptr) {
      return;
    }
    const A one = 1;
    tile_.begin_gradient(upstream == nullptr ? &one : upstream, upstream == nullptr ? 0 : 1);
    A* a = row0.sums.get();
    A* b = row1.sums.get();
    tile_.gradients([&, w0 = tap.w0, w1 = tap.w1](int64_t k, int64_t i, Vec<A> gradient) {
      const int64_t at = k * pitch + i;
      // One after the other: at a clamped edge both are the same row.
      vec_store(a + at, vec_load(a + at) + w0 * gradient);
      vec_store(b + at, vec_load(b + at) + w1 * gradient);
    });
  }

  const UpsampleCrossEntropyProblem& p_;
  const UpsampleGeometry& g_;
  const std::vector<UpsampleTaps<A>>& taps_h_;
  const Stretch<A>& stretch_;
  const Gather<A>& gather_;
  SoftmaxTile<A> tile_;
  Aligned<A> source_;
  Row rows_[2];
  const Band* band_ = nullptr;
  TileColumns columns_{};
  const T* image_ = nullptr;
  A* grad_ = nullptr;
};

// What both directions do: sweeps all bands and, if `store_grad` is wanted, hands it the sums over
// bands: store_grad(n, k, i, j, value).
template <class T, class F>
LabelError sweep_bands(const UpsampleCrossEntropyProblem& p,
                       const acc_t<T>* upstream,
                       std::vector<LossSums>* sums,
                       acc_t<T>* losses,
                       bool gradient,
                       const ParallelFor& pool,
                       F&& store_grad) {
  using A = acc_t<T>;
  const UpsampleGeometry& g = p.geometry;
  const UpsampleAxes<A> axes(g);
  const auto taps_h = all_taps(axes.h);
  const Stretch<A> stretch(axes.w);
  const Gather<A> gather(axes.w);
  const LossOptions<A> options(p, g.c);
  const BandPlan<A> plan(taps_h, g.h_in);
  const auto bands = static_cast<int64_t>(plan.bands.size());
  const int64_t row_values = g.c * g.w_in;  // of one input row of one image, all channels
  std::vector<LabelError> errors(static_cast<size_t>(g.n * bands));
  if (sums != nullptr) {
    sums->resize(errors.size());
  }
  Aligned<A> grads(gradient ? g.n * plan.rows * row_values : 0);

  parallel_for(pool, g.n * bands, 1, [&](int64_t begin, int64_t end) {
    BandSweep<T> sweep(p, options, taps_h, stretch, gather);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bands;
      const Band& band = plan.bands[static_cast<size_t>(task % bands)];
      A* grad = nullptr;
      if (gradient) {
        grad = grads.get() + (n * plan.rows + band.offset) * row_values;
        std::fill_n(grad, band.rows * row_values, A(0));
      }
      errors[static_cast<size_t>(task)] =
          sweep.run(n,
                    band,
                    upstream,
                    sums == nullptr ? nullptr : &(*sums)[static_cast<size_t>(task)],
                    losses,
                    grad);
    }
  });
  for (const LabelError& error : errors) {
    if (error.pixel >= 0) {
      return error;
    }
  }
  if (!gradient) {
    return {};
  }
  const int64_t grain = std::max<int64_t>(1, 32768 / row_values);
  parallel_for(pool, g.n * g.h_in, grain, [&](int64_t begin, int64_t end) {
    std::vector<const A*> parts;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / g.h_in;
      const int64_t i = task % g.h_in;
      for (int64_t k = 0; k < g.c; ++k) {
        parts.clear();
        for (const Band& band : plan.bands) {
          if (band.first_row <= i && i < band.first_row + band.rows) {
            parts.push_back(grads.get() + (n * plan.rows + band.offset) * row_values +
                            (k * band.rows + i - band.first_row) * g.w_in);
          }
        }
        for (int64_t j = 0; j < g.w_in; ++j) {
          A total = 0;
          for (const A* part : parts) {
            total += part[j];
          }
          store_grad(n, k, i, j, total);
        }
      }
    }
  });
  return {};
}

template <class T>
LabelError forward(const UpsampleCrossEntropyParams& params, const ParallelFor& pool) {
  using A = acc_t<T>;
  const UpsampleCrossEntropyProblem& p = params.problem;
  const UpsampleGeometry& g = p.geometry;
  auto* loss = static_cast<A*>(params.loss);
  auto* sum_grad = static_cast<A*>(params.sum_grad);
  std::vector<LossSums> sums;
  const LabelError error = sweep_bands<T>(p,
                                          nullptr,
                                          &sums,
                                          p.reduction == Reduction::kNone ? loss : nullptr,
                                          sum_grad != nullptr,
                                          pool,
                                          [&](int64_t n, int64_t k, int64_t i, int64_t j, A value) {
                                            sum_grad[((n * g.c + k) * g.h_in + i) * g.w_in + j] =
                                                value;
                                          });
  finish_loss(sums, p.reduction, loss, static_cast<A*>(params.total_weight));
  return error;
}

template <class T>
LabelError backward(const UpsampleCrossEntropyBackwardParams& params, const ParallelFor& pool) {
  using A = acc_t<T>;
  const UpsampleCrossEntropyProblem& p = params.problem;
  const Strides4& s = params.grad_input_strides;
  const auto* grad_output = static_cast<const A*>(params.grad_output);
  auto* grad_input = static_cast<T*>(params.grad_input);
  A scale = 1;
  if (p.reduction == Reduction::kSum) {
    scale = *grad_output;
  } else if (p.reduction == Reduction::kMean) {
    const A total_weight = *static_cast<const A*>(params.total_weight);
    scale = total_weight == A(0) ? A(0) : *grad_output / total_weight;
  }
  // The factor comes last, so that the result is that of scaling forward's sum_grad, bit for bit.
  return sweep_bands<T>(p,
                        p.reduction == Reduction::kNone ? grad_output : nullptr,
                        nullptr,
                        nullptr,
                        true,
                        pool,
                        [&](int64_t n, int64_t k, int64_t i, int64_t j, A value) {
                          store(grad_input + n * s.n + k * s.c + i * s.h + j * s.w, value * scale);
                        });
}

inline LabelError upsample_cross_entropy(const UpsampleCrossEntropyParams& params,
                                         const ParallelFor& pool) {
  return dispatch_dtype(params.problem.dtype, [&]<class T>() { return forward<T>(params, pool); });
}

inline LabelError upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardParams& params,
                                                  const ParallelFor& pool) {
  return dispatch_dtype(params.problem.dtype, [&]<class T>() { return backward<T>(params, pool); });
}
