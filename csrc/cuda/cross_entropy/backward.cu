// SPDX-License-Identifier: Apache-2.0
//
// Gradient of the cross-entropy with respect to the logits; g is the upstream gradient of the
// pixel, divided by total_weight for "mean":
//   grad_input[k] = g (((1 - e) v_t + e/c sum_j v_j) p_k - (1 - e) v_t [k = t] - e/c v_k)
//   p_k = q_k / sum_j q_j,  q_k = exp(x_k - logsumexp)
// One thread owns one pixel: it sweeps its classes once for the sum and once to write, every
// gradient exactly once, ignored pixels as zeros without reading logits. No atomics, no zero fill.
// The sum is 1 but for the rounding of the stored logsumexp, which dividing by it removes; without
// that, p is off by 5e-4 at logits of 1e4. Bytes: logits once from memory (the second sweep is
// cached for moderate c), gradient once. Per logit 2 exp. Computes in float, double for double.
#include "cuda/cross_entropy/pixel.cuh"

namespace dilseg::cuda {
namespace {

template <class T>
struct BackwardArgs {
  using A = acc_t<T>;
  Reduction reduction;
  const A* grad_output;
  const A* logsumexp;
  const A* total_weight;
  T* grad_input;
  Strides4 strides;
};

template <class T>
__global__ void __launch_bounds__(kCrossEntropyThreads, kCrossEntropyBlocks)
    cross_entropy_backward_kernel(CrossEntropyInput<T> in, BackwardArgs<T> args) {
  using A = acc_t<T>;
  for (int64_t pixel = grid_thread(); pixel < in.pixels; pixel += grid_threads()) {
    T* grad = args.grad_input + in.offset(pixel, args.strides);
    const int64_t label = in.label(pixel);
    if (label < 0) {
      for (int64_t k = 0; k < in.c; ++k) {
        store(grad + k * args.strides.c, A(0));
      }
      continue;
    }

    const T* logits = in.input + in.offset(pixel, in.strides);
    const A lse = args.logsumexp[pixel];
    A sum = 0;
    A weight_sum = 0;
    for (int64_t k = 0; k < in.c; ++k) {
      sum += exp(load(logits + k * in.strides.c) - lse);
      weight_sum += in.class_weight(k);
    }
    A upstream = args.grad_output[args.reduction == Reduction::kNone ? pixel : 0];
    if (args.reduction == Reduction::kMean) {
      upstream /= *args.total_weight;
    }
    const A label_weight = in.keep * in.class_weight(label);
    const A factor = upstream * (label_weight + in.smoothing * weight_sum) / sum;
    const A picked = upstream * label_weight;
    const A spread = upstream * in.smoothing;
    for (int64_t k = 0; k < in.c; ++k) {
      const A q = exp(load(logits + k * in.strides.c) - lse);
      A value = factor * q - spread * in.class_weight(k);
      if (k == label) {
        value -= picked;
      }
      store(grad + k * args.strides.c, value);
    }
  }
}

}  // namespace

Status launch_cross_entropy_backward(const CrossEntropyBackwardParams& p, Stream stream) {
  const CrossEntropyPlan plan = plan_cross_entropy(p.problem);
  if (plan.pixels == 0) {
    return cudaSuccess;
  }
  return dispatch_dtype(p.problem.dtype, [&]<class T>() {
    using A = acc_t<T>;
    const BackwardArgs<T> args{p.problem.reduction,
                               static_cast<const A*>(p.grad_output),
                               static_cast<const A*>(p.logsumexp),
                               static_cast<const A*>(p.total_weight),
                               static_cast<T*>(p.grad_input),
                               p.grad_input_strides};
    return launch(&cross_entropy_backward_kernel<T>,
                  grid_for(plan.pixels, kCrossEntropyThreads),
                  kCrossEntropyThreads,
                  size_t{0},
                  stream,
                  CrossEntropyInput<T>(p.problem),
                  args);
  });
}

}  // namespace dilseg::cuda
