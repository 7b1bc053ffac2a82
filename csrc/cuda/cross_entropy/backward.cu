// SPDX-License-Identifier: Apache-2.0
//
// Gradient of the cross-entropy with respect to the logits; g is the upstream gradient of the
// pixel, divided by total_weight for "mean":
//   grad_input[k] = g (((1 - e) v_t + e/c sum_j v_j) p_k - (1 - e) v_t [k = t] - e/c v_k)
//   p_k = q_k / sum_j q_j,  q_k = exp(x_k - logsumexp)
// The sum is 1 but for the rounding of the stored logsumexp, which dividing by it removes; without
// that, p is off by 5e-4 at logits of 1e4.
//
// Register kernel: where forward has one, given that the gradient is laid out like the logits. A
// thread turns the logits it holds into q in place. Bytes: each logit read once, each gradient
// written once, label, 4 for logsumexp. Per logit 1 exp and about 8 other operations.
// Generic kernel: the rest, and double. A thread owns a pixel, sweeps its classes once for the sum
// and once to write: logits are read twice, 2 exp each.
// Both write every gradient exactly once, of ignored pixels +0: no atomics, no zero fill. Computes
// in float, double for double.
#include "cuda/cross_entropy/registers.cuh"

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

  // g of a pixel
  __device__ __forceinline__ A upstream(int64_t pixel) const {
    const A g = grad_output[reduction == Reduction::kNone ? pixel : 0];
    return reduction == Reduction::kMean ? g / *total_weight : g;
  }
};

// The gradient of one pixel as a function of q_k.
template <class A>
struct PixelGradient {
  A factor = 0;  // of q
  A picked = 0;  // subtracted at the label
  A spread = 0;  // times the class weight, subtracted everywhere

  template <class T>
  __device__ __forceinline__
  PixelGradient(const CrossEntropyInput<T>& in, A upstream, int64_t label, A sum, A weight_sum) {
    const A label_weight = in.keep * in.class_weight(label);
    factor = upstream * (label_weight + in.smoothing * weight_sum) / sum;
    picked = upstream * label_weight;
    spread = upstream * in.smoothing;
  }
  PixelGradient() = default;
};

// ---- register kernel ----------------------------------------------------------------------------

// Leaves q in x. Of the classes of this slice: their sum and the sum of their weights.
template <int kHeld, class T, int kVector>
__device__ __forceinline__ void exponentials(const CrossEntropyInput<T>& in,
                                             const RegisterWork<kVector>& work,
                                             const Packet<float, kVector>& logsumexp,
                                             float (&x)[kHeld][kVector],
                                             float (&sum)[kVector],
                                             float& weight_sum) {
  each_class<kHeld>(work.classes, [&](int k) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      x[k][v] = exp_of_difference(x[k][v] - logsumexp.value[v]);
      sum[v] += x[k][v];
    }
  });
  if (in.smoothing > 0.0f) {
    for (int k = 0; k < work.classes; ++k) {
      weight_sum += in.class_weight(work.first_class + k);
    }
  }
}

// Adds up the sums of all slices, in their order.
template <int kVector>
__device__ __forceinline__ void exchange_sums(const RegisterSplit& split,
                                              const RegisterWork<kVector>& work,
                                              const RegisterShared<kVector>& shared,
                                              float (&sum)[kVector],
                                              float& weight_sum) {
  const auto told = [&](int field, int slice, int v) -> float& {
    return shared.exchanged(split, field, slice, v, work.lane);
  };
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    told(0, work.slice, v) = sum[v];
    sum[v] = 0;
  }
  told(1, work.slice, 0) = weight_sum;
  weight_sum = 0;
  __syncthreads();  // every slice's sums, before they are added
  for (int s = 0; s < split.slices; ++s) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      sum[v] += told(0, s, v);
    }
    weight_sum += told(1, s, 0);
  }
  __syncthreads();  // every slice's reads, before the sums of the next group
}

// Calls write(k, gradients) for the classes of this slice.
template <int kHeld, class T, int kVector, class F>
__device__ __forceinline__ void each_gradient(const CrossEntropyInput<T>& in,
                                              const RegisterWork<kVector>& work,
                                              const float (&x)[kHeld][kVector],
                                              const int (&label)[kVector],
                                              const PixelGradient<float> (&pixel)[kVector],
                                              F&& write) {
  each_class<kHeld>(work.classes, [&](int k) {
    if (k < work.classes) {
      const float weight = in.smoothing > 0.0f ? in.class_weight(work.first_class + k) : 0.0f;
      Packet<float, kVector> gradient;
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        float value = pixel[v].factor * x[k][v] - pixel[v].spread * weight;
        value = label[v] - work.first_class == k ? value - pixel[v].picked : value;
        // An ignored pixel may hold nan, and 0 times nan is nan.
        gradient.value[v] = label[v] < 0 ? 0.0f : value;
      }
      write(k, gradient);
    }
  });
}

template <class T, int kVector, int kHeld, bool kStaged>
__global__ void __launch_bounds__(kRegisterThreads<kVector>, kRegisterBlocks<kVector, kHeld>)
    cross_entropy_backward_register_kernel(CrossEntropyInput<T> in,
                                           RegisterSplit split,
                                           BackwardArgs<T> args) {
  using Work = RegisterWork<kVector>;
  const Work work(split, in.c);
  const RegisterShared<kVector> shared(split, work.first_group);
  float common = 0;  // g, where every pixel has the same
  if (args.reduction != Reduction::kNone) {
    common = __shfl_sync(0xffffffffu, work.lane == 0 ? args.upstream(0) : 0.0f, 0);
  }
  for (int group = work.first_group; group < Work::kGroups; group += split.groups) {
    const int64_t first = int64_t{blockIdx.x} * kCrossEntropyTile + group * Work::kGroupPixels;
    const int64_t pixel = first + work.lane * kVector;
    int label[kVector];
    Packet<float, kVector> logsumexp{};
    const bool any = read_pixels(in, split, work, shared, pixel, args.logsumexp, label, logsumexp);

    float x[kHeld][kVector];
    clear(x);
    float* row = shared.stage + work.lane * split.pitch + work.first_class;  // if staged
    if constexpr (kStaged) {
      sync_group(split);  // the stage was copied out, before it is filled again
      if (first < in.pixels) {
        stage_group(in, split, first, shared.stage);
      }
      sync_group(split);  // the whole run, before its pixels are read
    }
    float sum[kVector] = {};
    float weight_sum = 0;
    if (any) {
      if constexpr (kStaged) {
        load_staged(row, work.classes, x);
      } else {
        const T* logits = in.input + in.offset(pixel, in.strides) + work.first_class * in.strides.c;
        load_planar(logits, in.strides.c, work.classes, x);
      }
      exponentials(in, work, logsumexp, x, sum, weight_sum);
    }
    if (kVector < 4 && split.slices > 1) {
      exchange_sums(split, work, shared, sum, weight_sum);
    }

    PixelGradient<float> gradient[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      if (label[v] >= 0) {
        const float upstream =
            args.reduction == Reduction::kNone ? args.upstream(pixel + v) : common;
        gradient[v] = PixelGradient<float>(in, upstream, label[v], sum[v], weight_sum);
      }
    }
    if constexpr (kStaged) {
      if (pixel < in.pixels) {
        each_gradient(in, work, x, label, gradient, [&](int k, const auto& value) {
          row[k] = value.value[0];
        });
      }
      sync_group(split);  // every pixel's gradients, before the run is copied
      if (first < in.pixels) {
        unstage_group(in, split, first, args.grad_input, shared.stage);
      }
    } else if (pixel < in.pixels) {
      T* grad =
          args.grad_input + in.offset(pixel, args.strides) + work.first_class * args.strides.c;
      const int64_t stride = ptx::opaque(args.strides.c);
      each_gradient(in, work, x, label, gradient, [&](int k, const auto& value) {
        Packet<T, kVector> packet;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          store(&packet.value[v], value.value[v]);
        }
        store_packet<kVector>(grad + k * stride, packet);
      });
    }
  }
}

// ---- generic kernel -----------------------------------------------------------------------------

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
    const A logsumexp = args.logsumexp[pixel];
    A sum = 0;
    A weight_sum = 0;
    for (int64_t k = 0; k < in.c; ++k) {
      sum += exp(load(logits + k * in.strides.c) - logsumexp);
      weight_sum += in.class_weight(k);
    }
    const PixelGradient<A> gradient(in, args.upstream(pixel), label, sum, weight_sum);
    for (int64_t k = 0; k < in.c; ++k) {
      const A q = exp(load(logits + k * in.strides.c) - logsumexp);
      A value = gradient.factor * q - gradient.spread * in.class_weight(k);
      if (k == label) {
        value -= gradient.picked;
      }
      store(grad + k * args.strides.c, value);
    }
  }
}

}  // namespace

Status launch_cross_entropy_backward(const CrossEntropyBackwardParams& p, Stream stream) {
  const CrossEntropyPlan plan = plan_cross_entropy(
      p.problem,
      {{p.problem.input, p.problem.input_strides}, {p.grad_input, p.grad_input_strides}},
      {p.logsumexp});
  if (plan.pixels == 0) {
    return cudaSuccess;
  }
  return dispatch_dtype(p.problem.dtype, [&]<class T>() {
    using A = acc_t<T>;
    const CrossEntropyInput<T> in(p.problem, plan);
    const BackwardArgs<T> args{p.problem.reduction,
                               static_cast<const A*>(p.grad_output),
                               static_cast<const A*>(p.logsumexp),
                               static_cast<const A*>(p.total_weight),
                               static_cast<T*>(p.grad_input),
                               plan.grad_input};
    if constexpr (!std::is_same_v<T, double>) {
      if (plan.path != CrossEntropyPath::kGeneric) {
        return dispatch_registers(plan, [&]<int kVector, int kHeld, bool kStaged>() {
          return launch(&cross_entropy_backward_register_kernel<T, kVector, kHeld, kStaged>,
                        grid_for(plan.tiles, 1),
                        static_cast<unsigned>(plan.threads()),
                        RegisterShared<kVector>::bytes(plan),
                        stream,
                        in,
                        RegisterSplit(p.problem, plan),
                        args);
        });
      }
    }
    return launch(&cross_entropy_backward_kernel<T>,
                  grid_for(plan.pixels, kCrossEntropyThreads),
                  kCrossEntropyThreads,
                  size_t{0},
                  stream,
                  in,
                  args);
  });
}

}  // namespace dilseg::cuda
