// SPDX-License-Identifier: Apache-2.0
//
// Softmax cross-entropy over [n, c, h, w] logits, any layout and dtype. With m = max_k x_k and
// s = sum_k exp(x_k - m), label t, class weights v, e = label_smoothing, logsumexp = m + log s:
//   loss = (1 - e) v_t (log s - (x_t - m)) + e/c sum_k v_k (log s - (x_k - m))
//
// Register kernel: up to 384 classes, float or 16 bits, planes of contiguous pixels (NCHW) or
// contiguous pixels of contiguous classes (channels last, up to about 320 classes). A thread owns
// 1, 2 or 4 neighbouring pixels and holds their logits; above 32 classes several warps share them
// (registers.cuh). Bytes: each logit once, label, 4 for logsumexp, 4 for a loss per pixel.
// Generic kernel: the rest, and double. A thread owns a pixel and sweeps its classes once, with a
// running maximum. Bytes: each logit once and x_t once more; coalesced if pixels are.
// Both: per logit 1 exp and about 5 other operations; ignored pixels take no part. A block adds the
// 256 losses and weights of a tile in double by a fixed tree; a second, one-block kernel adds the
// tiles in a fixed order. Computes in float, double for double.
// Sources: Szegedy et al. 2016, section 7 (smoothing); Milakov and Gimelshein 2018 (running
// maximum).
#include "cuda/cross_entropy/registers.cuh"

namespace dilseg::cuda {
namespace {

// `losses` is null unless reduction is "none". partials: [2, tiles], losses then weights.
template <class A>
struct ForwardArgs {
  int64_t tiles;
  A* losses;
  A* logsumexp;
  double* partials;
};

template <int kGroups, class A>
__device__ __forceinline__ void write_partial(const GroupSums<kGroups>& sums,
                                              const ForwardArgs<A>& args,
                                              int64_t tile) {
  __syncthreads();  // the sums of all groups, before they are added
  if (threadIdx.x == 0) {
    const LossSum sum = sums.add();
    args.partials[tile] = sum.loss;
    args.partials[args.tiles + tile] = sum.weight;
  }
  __syncthreads();  // thread 0's reads, before the sums of the next tile
}

// What is known of a softmax after some of its classes. The differences are taken from
// `max`, or from 0 while every logit is -inf, whose difference from itself would be nan.
template <class A>
struct SoftmaxPart {
  A max = -INFINITY;
  A sum = 0;       // sum_k exp(x_k - max)
  A distance = 0;  // sum_k v_k (max - x_k)
  A weight = 0;    // sum_k v_k

  __device__ __forceinline__ A origin() const { return max == A(-INFINITY) ? A(0) : max; }
};

// The loss of a pixel from the whole softmax. x_t - m, not x_t - logsumexp: at logits of 1e4 the
// logsumexp is rounded to a thousandth.
template <class T>
__device__ __forceinline__ acc_t<T> pixel_loss(const CrossEntropyInput<T>& in,
                                               const SoftmaxPart<acc_t<T>>& part,
                                               acc_t<T> log_sum,
                                               acc_t<T> picked,
                                               acc_t<T> label_weight) {
  acc_t<T> loss = in.keep * label_weight * (log_sum - (picked - part.max));
  if (in.smoothing > acc_t<T>(0)) {
    loss += in.smoothing * (part.weight * log_sum + part.distance);
  }
  return loss;
}

// ---- register kernel ----------------------------------------------------------------------------

// The part of one slice; `picked` is the logit of the label, 0 if another slice has it.
template <int kHeld, class T, int kVector>
__device__ __forceinline__ void reduce_classes(const CrossEntropyInput<T>& in,
                                               const RegisterWork<kVector>& work,
                                               const float (&x)[kHeld][kVector],
                                               const int (&label)[kVector],
                                               SoftmaxPart<float> (&part)[kVector],
                                               float (&picked)[kVector]) {
  each_class<kHeld>(work.classes, [&](int k) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      part[v].max = fmaxf(part[v].max, x[k][v]);
    }
  });
  float origin[kVector];
  int wanted[kVector];  // the label as one of these classes, -1 if it is not
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    origin[v] = part[v].origin();
    wanted[v] = label[v] - work.first_class;
    wanted[v] = wanted[v] < work.classes ? wanted[v] : -1;
  }
  each_class<kHeld>(work.classes, [&](int k) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float value = x[k][v];
      part[v].sum += exp_of_difference(value - origin[v]);
      picked[v] = wanted[v] == k ? value : picked[v];
    }
  });
  if (in.smoothing > 0.0f) {
    each_class<kHeld>(work.classes, [&](int k) {
      if (k < work.classes) {
        const float weight = in.class_weight(work.first_class + k);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          part[v].weight += weight;
          part[v].distance += weight * (origin[v] - x[k][v]);
        }
      }
    });
  }
}

// Adds up the parts of all slices, in their order, for slice 0.
template <int kVector>
__device__ __forceinline__ void exchange_parts(const RegisterSplit& split,
                                               const RegisterWork<kVector>& work,
                                               const RegisterShared<kVector>& shared,
                                               bool smoothing,
                                               SoftmaxPart<float> (&part)[kVector],
                                               float (&picked)[kVector]) {
  const auto told = [&](int field, int slice, int v) -> float& {
    return shared.exchanged(split, field, slice, v, work.lane);
  };
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    told(0, work.slice, v) = part[v].max;
    told(1, work.slice, v) = part[v].sum;
    told(2, work.slice, v) = picked[v];
    if (smoothing) {
      told(3, work.slice, v) = part[v].distance;
      told(4, work.slice, v) = part[v].weight;
    }
  }
  __syncthreads();  // every slice's part, before they are added
  if (work.slice == 0) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      SoftmaxPart<float> whole;
      picked[v] = 0;
      for (int s = 0; s < split.slices; ++s) {
        whole.max = fmaxf(whole.max, told(0, s, v));
        picked[v] += told(2, s, v);
      }
      const float origin = whole.origin();
      for (int s = 0; s < split.slices; ++s) {
        SoftmaxPart<float> slice;
        slice.max = told(0, s, v);
        whole.sum += told(1, s, v) * exp_of_difference(slice.max - origin);
        if (smoothing) {
          const float weight = told(4, s, v);
          whole.distance += told(3, s, v) + weight * (origin - slice.origin());
          whole.weight += weight;
        }
      }
      part[v] = whole;
    }
  }
  __syncthreads();  // slice 0's reads, before the parts of the next group
}

template <class T, int kVector, int kHeld, bool kStaged>
__global__ void __launch_bounds__(kRegisterThreads<kVector>, kRegisterBlocks<kVector, kHeld>)
    cross_entropy_register_kernel(CrossEntropyInput<T> in,
                                  RegisterSplit split,
                                  ForwardArgs<float> args) {
  using Work = RegisterWork<kVector>;
  const Work work(split, in.c);
  const RegisterShared<kVector> shared(split, work.first_group);
  for (int group = work.first_group; group < Work::kGroups; group += split.groups) {
    const int64_t first = int64_t{blockIdx.x} * kCrossEntropyTile + group * Work::kGroupPixels;
    const int64_t pixel = first + work.lane * kVector;
    int label[kVector];
    Packet<float, kVector> none{};
    const bool any = read_pixels(in, split, work, shared, pixel, nullptr, label, none);

    float x[kHeld][kVector];
    clear(x);
    if constexpr (kStaged) {
      if (first < in.pixels) {
        stage_group(in, split, first, shared.stage);
      }
      sync_group(split);  // the whole run, before its pixels are read
    }
    SoftmaxPart<float> part[kVector];
    float picked[kVector] = {};
    if (any) {
      if constexpr (kStaged) {
        load_staged(shared.stage + work.lane * split.pitch + work.first_class, work.classes, x);
      } else {
        const T* logits = in.input + in.offset(pixel, in.strides) + work.first_class * in.strides.c;
        load_planar(logits, in.strides.c, work.classes, x);
      }
      reduce_classes(in, work, x, label, part, picked);
    }
    if (kVector < 4 && split.slices > 1) {
      exchange_parts(split, work, shared, in.smoothing > 0.0f, part, picked);
    }
    if (work.slice != 0) {
      continue;
    }

    Packet<float, kVector> loss, logsumexp;
    LossSum sum[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      loss.value[v] = 0;
      logsumexp.value[v] = 0;
      if (label[v] >= 0) {
        const float label_weight = in.class_weight(label[v]);
        const float log_sum = logf(part[v].sum);
        loss.value[v] = pixel_loss(in, part[v], log_sum, picked[v], label_weight);
        logsumexp.value[v] = part[v].max + log_sum;
        sum[v] = {static_cast<double>(loss.value[v]), static_cast<double>(label_weight)};
      }
    }
    if (pixel < in.pixels) {
      store_packet<kVector>(args.logsumexp + pixel, logsumexp);
      if (args.losses != nullptr) {
        store_packet<kVector>(args.losses + pixel, loss);
      }
    }
#pragma unroll
    for (int stride = 1; stride < kVector; stride *= 2) {
#pragma unroll
      for (int v = 0; v < kVector; v += 2 * stride) {
        sum[v] = sum[v] + sum[v + stride];
      }
    }
    const LossSum group_sum = add_warp(sum[0]);
    if (work.lane == 0) {
      shared.sums->group[group] = group_sum;
    }
  }
  write_partial(*shared.sums, args, blockIdx.x);
}

// ---- generic kernel -----------------------------------------------------------------------------

constexpr int kThreadWarps = kCrossEntropyThreads / kWarp;

template <class T>
__device__ __forceinline__ SoftmaxPart<acc_t<T>> sweep_classes(const CrossEntropyInput<T>& in,
                                                               const T* logits) {
  using A = acc_t<T>;
  constexpr int kBlock = 4;  // loads in flight, and logits per change of the maximum
  SoftmaxPart<A> part;
  for (int64_t first = 0; first < in.c; first += kBlock) {
    A x[kBlock];
    A max = part.max;
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      x[j] = first + j < in.c ? load(logits + (first + j) * in.strides.c) : A(-INFINITY);
    }
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      max = x[j] > max ? x[j] : max;
    }
    if (max != part.max) {  // also from -inf, where sum and distance may not be touched by nan
      const A before = part.origin();
      const A change = part.max == A(-INFINITY) ? A(0) : exp(before - max);
      part.sum *= change;
      part.distance += part.weight * (max - before);
      part.max = max;
    }
    const A origin = part.origin();
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      if (first + j < in.c) {
        part.sum += exp(x[j] - origin);
        if (in.smoothing > A(0)) {
          const A weight = in.class_weight(first + j);
          part.weight += weight;
          part.distance += weight * (origin - x[j]);
        }
      }
    }
  }
  return part;
}

template <class T>
__global__ void __launch_bounds__(kCrossEntropyThreads, kCrossEntropyBlocks)
    cross_entropy_kernel(CrossEntropyInput<T> in, ForwardArgs<acc_t<T>> args) {
  using A = acc_t<T>;
  auto& sums = *dynamic_shared<GroupSums<kThreadWarps>>();
  for (int64_t tile = blockIdx.x; tile < args.tiles; tile += gridDim.x) {
    const int64_t pixel = tile * kCrossEntropyTile + threadIdx.x;
    LossSum sum;
    if (pixel < in.pixels) {
      A loss = 0, logsumexp = 0;
      const int64_t label = in.label(pixel);
      if (label >= 0) {
        const T* logits = in.input + in.offset(pixel, in.strides);
        const SoftmaxPart<A> part = sweep_classes(in, logits);
        const A label_weight = in.class_weight(label);
        const A log_sum = log(part.sum);
        const A picked = load(logits + label * in.strides.c);
        loss = pixel_loss(in, part, log_sum, picked, label_weight);
        logsumexp = part.max + log_sum;
        sum = {static_cast<double>(loss), static_cast<double>(label_weight)};
      }
      args.logsumexp[pixel] = logsumexp;
      if (args.losses != nullptr) {
        args.losses[pixel] = loss;
      }
    }
    sum = add_warp(sum);
    if (threadIdx.x % kWarp == 0) {
      sums.group[threadIdx.x / kWarp] = sum;
    }
    write_partial(sums, args, tile);
  }
}

// One block: thread i adds partials i, i + 256, ... in order, then the tree.
template <class A>
__global__ void __launch_bounds__(kCrossEntropyThreads, kCrossEntropyBlocks)
    cross_entropy_reduce_kernel(
        const double* partials, int64_t tiles, Reduction reduction, A* loss, A* total_weight) {
  auto& sums = *dynamic_shared<GroupSums<kThreadWarps>>();
  LossSum sum;
  for (int64_t i = threadIdx.x; i < tiles; i += kCrossEntropyThreads) {
    sum = sum + LossSum{partials[i], partials[tiles + i]};
  }
  sum = add_warp(sum);
  if (threadIdx.x % kWarp == 0) {
    sums.group[threadIdx.x / kWarp] = sum;
  }
  __syncthreads();  // the sums of all warps, before they are added
  if (threadIdx.x == 0) {
    sum = sums.add();
    *total_weight = static_cast<A>(sum.weight);
    if (reduction == Reduction::kMean) {
      *loss = static_cast<A>(sum.loss / sum.weight);  // nan if no pixel is labelled, as torch
    } else if (reduction == Reduction::kSum) {
      *loss = static_cast<A>(sum.loss);
    }
  }
}

template <class T>
cudaError_t launch_tiles(const CrossEntropyProblem& problem,
                         const CrossEntropyPlan& plan,
                         const ForwardArgs<acc_t<T>>& args,
                         cudaStream_t stream) {
  const CrossEntropyInput<T> in(problem, plan);
  const unsigned grid = grid_for(plan.tiles, 1);
  if constexpr (!std::is_same_v<T, double>) {
    if (plan.path != CrossEntropyPath::kGeneric) {
      return dispatch_registers(plan, [&]<int kVector, int kHeld, bool kStaged>() {
        return launch(&cross_entropy_register_kernel<T, kVector, kHeld, kStaged>,
                      grid,
                      static_cast<unsigned>(plan.threads()),
                      RegisterShared<kVector>::bytes(plan),
                      stream,
                      in,
                      RegisterSplit(problem, plan),
                      args);
      });
    }
  }
  return launch(&cross_entropy_kernel<T>,
                grid,
                kCrossEntropyThreads,
                sizeof(GroupSums<kThreadWarps>),
                stream,
                in,
                args);
}

}  // namespace

Status launch_cross_entropy(const CrossEntropyParams& p, Stream stream) {
  const bool per_pixel = p.problem.reduction == Reduction::kNone;
  const CrossEntropyPlan plan = plan_cross_entropy(p.problem,
                                                   {{p.problem.input, p.problem.input_strides}},
                                                   {p.logsumexp, per_pixel ? p.loss : nullptr});
  return dispatch_dtype(p.problem.dtype, [&]<class T>() {
    using A = acc_t<T>;
    auto* loss = static_cast<A*>(p.loss);
    if (plan.tiles > 0) {
      const ForwardArgs<A> args{
          plan.tiles, per_pixel ? loss : nullptr, static_cast<A*>(p.logsumexp), p.partials};
      const cudaError_t status = launch_tiles<T>(p.problem, plan, args, stream);
      if (status != cudaSuccess) {
        return status;
      }
    }
    // Also without pixels: the loss of nothing is 0 or nan, and must be written.
    return launch(&cross_entropy_reduce_kernel<A>,
                  1u,
                  kCrossEntropyThreads,
                  sizeof(GroupSums<kThreadWarps>),
                  stream,
                  static_cast<const double*>(p.partials),
                  plan.tiles,
                  p.problem.reduction,
                  loss,
                  static_cast<A*>(p.total_weight));
  });
}

}  // namespace dilseg::cuda
