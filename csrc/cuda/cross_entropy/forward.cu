// SPDX-License-Identifier: Apache-2.0
//
// Softmax cross-entropy over [n, c, h, w] logits, any layout and dtype. With m = max_k x_k and
// s = sum_k exp(x_k - m), label t, class weights v, e = label_smoothing, logsumexp = m + log s:
//   loss = (1 - e) v_t (log s - (x_t - m)) + e/c sum_k v_k (log s - (x_k - m))
// One thread owns one pixel and sweeps its classes twice (max, then sum); ignored pixels read no
// logits. A block adds its 256 losses and weights in double by a fixed tree into one partial; a
// second, one-block kernel adds the partials in a fixed order. Bytes: logits once from memory (the
// second sweep is cached for moderate c), label, logsumexp. Per logit 1 exp. Computes in float,
// double for double. Source: Szegedy et al. 2016, section 7 (smoothing).
#include "cuda/cross_entropy/pixel.cuh"

namespace dilseg::cuda {
namespace {

struct BlockSums {
  double loss[kCrossEntropyThreads];
  double weight[kCrossEntropyThreads];
};

// Leaves the sums over the block in element 0. The tree is fixed: stride 128, 64, ..., 1.
__device__ __forceinline__ void add_block(BlockSums& sums, double loss, double weight) {
  const int thread = static_cast<int>(threadIdx.x);
  sums.loss[thread] = loss;
  sums.weight[thread] = weight;
  for (int stride = kCrossEntropyThreads / 2; stride > 0; stride /= 2) {
    __syncthreads();  // the writes of the level above, before they are read
    if (thread < stride) {
      sums.loss[thread] += sums.loss[thread + stride];
      sums.weight[thread] += sums.weight[thread + stride];
    }
  }
}

template <class T>
struct PixelLoss {
  acc_t<T> loss, logsumexp;
};

template <class T>
__device__ __forceinline__ PixelLoss<T> pixel_loss(const CrossEntropyInput<T>& in,
                                                   int64_t pixel,
                                                   int64_t label) {
  using A = acc_t<T>;
  const T* logits = in.input + in.offset(pixel, in.strides);
  A max = load(logits);
  for (int64_t k = 1; k < in.c; ++k) {
    const A x = load(logits + k * in.strides.c);
    max = x > max ? x : max;
  }
  A sum = 0;
  A weight_sum = 0;
  A distance = 0;  // sum_k v_k (m - x_k)
  for (int64_t k = 0; k < in.c; ++k) {
    const A shifted = load(logits + k * in.strides.c) - max;
    sum += exp(shifted);
    if (in.smoothing > A(0)) {
      weight_sum += in.class_weight(k);
      distance -= in.class_weight(k) * shifted;
    }
  }
  const A log_sum = log(sum);
  // x_t - m, not x_t - logsumexp: at logits of 1e4 the logsumexp is rounded to a thousandth.
  const A picked = load(logits + label * in.strides.c) - max;
  A loss = in.keep * in.class_weight(label) * (log_sum - picked);
  if (in.smoothing > A(0)) {
    loss += in.smoothing * (weight_sum * log_sum + distance);
  }
  return {loss, max + log_sum};
}

// `losses` is null unless reduction is "none". partials: [2, tiles], losses then weights.
template <class T>
__global__ void __launch_bounds__(kCrossEntropyThreads, kCrossEntropyBlocks)
    cross_entropy_kernel(CrossEntropyInput<T> in,
                         int64_t tiles,
                         acc_t<T>* losses,
                         acc_t<T>* logsumexp,
                         double* partials) {
  using A = acc_t<T>;
  auto& sums = *dynamic_shared<BlockSums>();
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t pixel = tile * kCrossEntropyThreads + threadIdx.x;
    PixelLoss<T> result{A(0), A(0)};
    double weight = 0;
    if (pixel < in.pixels) {
      const int64_t label = in.label(pixel);
      if (label >= 0) {
        result = pixel_loss(in, pixel, label);
        weight = static_cast<double>(in.class_weight(label));
      }
      logsumexp[pixel] = result.logsumexp;
      if (losses != nullptr) {
        losses[pixel] = result.loss;
      }
    }
    __syncthreads();  // thread 0's read of the previous tile's sums, before they are overwritten
    add_block(sums, static_cast<double>(result.loss), weight);
    if (threadIdx.x == 0) {
      partials[tile] = sums.loss[0];
      partials[tiles + tile] = sums.weight[0];
    }
  }
}

// One block: thread i adds partials i, i + 256, ... in order, then the tree.
template <class A>
__global__ void __launch_bounds__(kCrossEntropyThreads, kCrossEntropyBlocks)
    cross_entropy_reduce_kernel(
        const double* partials, int64_t tiles, Reduction reduction, A* loss, A* total_weight) {
  auto& sums = *dynamic_shared<BlockSums>();
  double thread_loss = 0;
  double thread_weight = 0;
  for (int64_t i = threadIdx.x; i < tiles; i += kCrossEntropyThreads) {
    thread_loss += partials[i];
    thread_weight += partials[tiles + i];
  }
  add_block(sums, thread_loss, thread_weight);
  if (threadIdx.x == 0) {
    *total_weight = static_cast<A>(sums.weight[0]);
    if (reduction == Reduction::kMean) {
      *loss =
          static_cast<A>(sums.loss[0] / sums.weight[0]);  // nan if no pixel is labelled, as torch
    } else if (reduction == Reduction::kSum) {
      *loss = static_cast<A>(sums.loss[0]);
    }
  }
}

}  // namespace

Status launch_cross_entropy(const CrossEntropyParams& p, Stream stream) {
  const CrossEntropyPlan plan = plan_cross_entropy(p.problem);
  return dispatch_dtype(p.problem.dtype, [&]<class T>() {
    using A = acc_t<T>;
    auto* loss = static_cast<A*>(p.loss);
    if (plan.tiles > 0) {
      const cudaError_t status = launch(&cross_entropy_kernel<T>,
                                        grid_for(plan.tiles, 1),
                                        kCrossEntropyThreads,
                                        sizeof(BlockSums),
                                        stream,
                                        CrossEntropyInput<T>(p.problem),
                                        plan.tiles,
                                        p.problem.reduction == Reduction::kNone ? loss : nullptr,
                                        static_cast<A*>(p.logsumexp),
                                        p.partials);
      if (status != cudaSuccess) {
        return status;
      }
    }
    // Also without pixels: the loss of nothing is 0 or nan, and must be written.
    return launch(&cross_entropy_reduce_kernel<A>,
                  1u,
                  kCrossEntropyThreads,
                  sizeof(BlockSums),
                  stream,
                  static_cast<const double*>(p.partials),
                  plan.tiles,
                  p.problem.reduction,
                  loss,
                  static_cast<A*>(p.total_weight));
  });
}

}  // namespace dilseg::cuda
