// SPDX-License-Identifier: Apache-2.0
//
// What the register kernels share: a thread holds the logits of kVector neighbouring pixels, at
// most kHeld classes each, so that memory is read once. With more classes than that, `slices` warps
// hold some of the classes of the same pixels each and exchange maxima and sums.
//
// Planar logits are loaded as vectors straight into registers, 32 lanes side by side. Channels-last
// logits pass through shared memory: the run of a group's pixels is copied word by word, coalesced,
// to rows of an odd pitch, of which every lane then reads one without bank conflicts.
#pragma once

#include "cuda/common/ptx.cuh"
#include "cuda/cross_entropy/pixel.cuh"

#include <cmath>
#include <cstring>
#include <type_traits>

namespace dilseg::cuda {

constexpr float kLog2E = 1.44269504f;

// exp(x) for x <= 0, within about 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp_of_difference(float x) { return ptx::exp2_approx(x * kLog2E); }

// Launch bounds: threads of a block and blocks per SM. Slices never share the work of kVector 4.
// The registers that they leave: 80 for 1 pixel, 168 for 2, 128 and 168 for 4.
template <int kVector>
constexpr int kRegisterThreads = kVector == 4 ? kCrossEntropyTile / 4 : kCrossEntropySlices * kWarp;
template <int kVector, int kHeld>
constexpr int kRegisterBlocks = kVector == 1   ? 2
                                : kVector == 2 ? 1
                                : kHeld == 12  ? 8
                                               : 6;

// kN values that are loaded or stored by one instruction.
template <class T, int kN>
struct Packet {
  T value[kN];
};

// The built-in type of a packet's size.
template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16,
    uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;

template <int kN, class T>
__device__ __forceinline__ Packet<T, kN> load_packet(const T* p) {
  const auto word = *reinterpret_cast<const Word<kN * sizeof(T)>*>(p);
  static_assert(sizeof word == kN * sizeof(T));
  Packet<T, kN> packet;
  memcpy(&packet, &word, sizeof word);
  return packet;
}

template <int kN, class T>
__device__ __forceinline__ void store_packet(T* p, const Packet<T, kN>& packet) {
  Word<kN * sizeof(T)> word;
  static_assert(sizeof word == kN * sizeof(T));
  memcpy(&word, &packet, sizeof word);
  auto* to = reinterpret_cast<Word<kN * sizeof(T)>*>(p);
  if constexpr (sizeof word <= 4) {
    *to = word;
  } else {
    __stwb(to, word);  // the compiler splits an assignment
  }
}

// Calls fn(k) for k < count and up to three more, in groups of four: k is a constant in each call,
// and groups that hold no class are branched over.
template <int kHeld, class F>
__device__ __forceinline__ void each_class(int count, F&& fn) {
#pragma unroll
  for (int first = 0; first < kHeld; first += 4) {
    if (first < count) {
#pragma unroll
      for (int k = first; k < first + 4; ++k) {
        fn(k);
      }
    }
  }
}

// How the register kernels share work; the parts of a plan that they need.
struct RegisterSplit {
  int slices, slice_classes, groups, pitch;
  uint32_t reciprocal;  // floor(2^32 / c) + 1: __umulhi(i, reciprocal) is i / c for i * c < 2^32
  bool word_copies;

  RegisterSplit(const CrossEntropyProblem& p, const CrossEntropyPlan& plan)
      : slices(plan.slices),
        slice_classes(plan.slice_classes),
        groups(plan.groups),
        pitch(plan.pitch),
        reciprocal(static_cast<uint32_t>((int64_t{1} << 32) / std::max<int64_t>(2, p.c) + 1)),
        word_copies(plan.word_copies) {}
};

// This thread's part of a block's work: the pixels of a group and a slice of their classes.
template <int kVector>
struct RegisterWork {
  static constexpr int kGroupPixels = kWarp * kVector;
  static constexpr int kGroups = kCrossEntropyTile / kGroupPixels;

  int lane, slice, first_group;
  int first_class, classes;

  __device__ __forceinline__ RegisterWork(const RegisterSplit& split, int64_t c) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    lane = static_cast<int>(threadIdx.x) % kWarp;
    slice = split.slices == 1 ? 0 : warp;
    first_group = split.slices == 1 ? warp : 0;
    first_class = slice * split.slice_classes;
    classes = min(split.slice_classes, static_cast<int>(c) - first_class);
  }
};

// Orders shared memory among the warps that work on one group: one warp, or the whole block.
__device__ __forceinline__ void sync_group(const RegisterSplit& split) {
  if (split.slices == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Dynamic shared memory: the sums of the groups, what slices exchange, staged logits.
template <int kVector>
struct RegisterShared {
  GroupSums<RegisterWork<kVector>::kGroups>* sums;
  float* exchange;
  float* stage;  // of this thread's group

  __device__ __forceinline__ RegisterShared(const RegisterSplit& split, int first_group) {
    sums = dynamic_shared<GroupSums<RegisterWork<kVector>::kGroups>>();
    exchange = reinterpret_cast<float*>(sums + 1);
    stage = exchange + (split.slices > 1 ? kExchanged * split.slices * kWarp * kVector : 0) +
            first_group * kWarp * split.pitch;
  }

  static size_t bytes(const CrossEntropyPlan& plan) {
    return sizeof(GroupSums<RegisterWork<kVector>::kGroups>) +
           4 * static_cast<size_t>(plan.exchange_floats() + plan.stage_floats());
  }

  // Number `field` that a slice tells the others about a pixel.
  __device__ __forceinline__ float& exchanged(
      const RegisterSplit& split, int field, int slice, int v, int lane) const {
    return exchange[((field * split.slices + slice) * kVector + v) * kWarp + lane];
  }
};

// Labels of kVector pixels from `pixel` on: -1 where ignored or beyond the last pixel. Returns
// whether there is any other.
template <class T, int kVector>
__device__ __forceinline__ bool read_labels(const CrossEntropyInput<T>& in,
                                            int64_t pixel,
                                            int (&label)[kVector]) {
  bool any = false;
  int64_t bad = -1;
#pragma unroll
  for (int v = kVector - 1; v >= 0; --v) {
    label[v] = -1;
    if (pixel + v < in.pixels) {
      label[v] = static_cast<int>(in.checked_label(pixel + v));
      bad = label[v] == -2 ? pixel + v : bad;
      any = any || label[v] >= 0;
    }
  }
  if (bad >= 0) {
    in.stop_at(bad);  // once for all pixels: the code of a printf is long
  }
  return any;
}

// The same once for all slices of a pixel, which learn it from the first; and, where `logsumexp` is
// given, the pixels' numbers there, if any label counts.
template <class T, int kVector>
__device__ __forceinline__ bool read_pixels(const CrossEntropyInput<T>& in,
                                            const RegisterSplit& split,
                                            const RegisterWork<kVector>& work,
                                            const RegisterShared<kVector>& shared,
                                            int64_t pixel,
                                            const float* logsumexp,
                                            int (&label)[kVector],
                                            Packet<float, kVector>& saved) {
  bool any = false;
  if (work.slice == 0) {
    any = read_labels(in, pixel, label);
    if (any && logsumexp != nullptr) {
      saved = load_packet<kVector>(logsumexp + pixel);
    }
  }
  if (kVector == 4 || split.slices == 1) {
    return any;
  }
  constexpr int kField = kExchanged - 1;
  const auto told = [&](int row, int v) -> float& {
    return shared.exchanged(split, kField, row, v, work.lane);
  };
  if (work.slice == 0) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      told(0, v) = __int_as_float(label[v]);
      told(1, v) = saved.value[v];
    }
  }
  __syncthreads();  // slice 0's words, before the others read them; they are at their next barrier
                    // before it writes the next
  any = false;
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    label[v] = __float_as_int(told(0, v));
    saved.value[v] = told(1, v);
    any = any || label[v] >= 0;
  }
  return any;
}

// ---- logits in ----------------------------------------------------------------------------------

// Sets every logit to -inf, which adds nothing to a softmax. Whole, so that no value of the last
// group of pixels seems to be needed and keeps its register.
template <int kHeld, int kVector>
__device__ __forceinline__ void clear(float (&x)[kHeld][kVector]) {
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      x[k][v] = -INFINITY;
    }
  }
}

// Logits of `classes` classes from p on.
template <int kHeld, class T, int kVector>
__device__ __forceinline__ void load_planar(const T* p,
                                            int64_t class_stride,
                                            int classes,
                                            float (&x)[kHeld][kVector]) {
  class_stride = ptx::opaque(class_stride);
  each_class<kHeld>(classes, [&](int k) {
    if (k < classes) {
      const Packet<T, kVector> packet = load_packet<kVector>(p + k * class_stride);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        x[k][v] = load(&packet.value[v]);
      }
    }
  });
}

template <int kHeld>
__device__ __forceinline__ void load_staged(const float* row, int classes, float (&x)[kHeld][1]) {
  each_class<kHeld>(classes, [&](int k) {
    if (k < classes) {
      x[k][0] = row[k];
    }
  });
}

// Where element i of a run of pixels lies in the stage.
__device__ __forceinline__ int stage_index(const RegisterSplit& split, int c, int i) {
  const auto pixel = static_cast<int>(__umulhi(static_cast<unsigned>(i), split.reciprocal));
  return pixel * (split.pitch - c) + i;
}

// Copies elements [first, last) of a run, kN at a time, by all threads of the group.
template <int kN, class T>
__device__ __forceinline__ void stage_run(
    const RegisterSplit& split, int c, const T* run, int first, int last, float* stage) {
  // Loads in flight; single elements of 16 bits are what words left over.
  constexpr int kBatch = kN * sizeof(T) == 4 ? 8 : 1;
  const int threads = kWarp * split.slices;
  first += static_cast<int>(threadIdx.x) % threads * kN;
  for (; first < last; first += kBatch * threads * kN) {
    // Multiples of the step and what follows from them are not kept ahead of the loop, nor indices
    // beside what was loaded: there are no registers for them.
    int step = ptx::opaque(threads * kN);
    Packet<T, kN> packet[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j * step < last) {
        packet[j] = load_packet<kN>(run + (first + j * step));
      }
    }
    step = ptx::opaque(step);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (first + j * step < last) {
#pragma unroll
        for (int e = 0; e < kN; ++e) {
          stage[stage_index(split, c, first + j * step + e)] = load(&packet[j].value[e]);
        }
      }
    }
  }
}

template <int kN, class T>
__device__ __forceinline__ void unstage_run(
    const RegisterSplit& split, int c, T* run, int first, int last, const float* stage) {
  const int threads = kWarp * split.slices;
  first += static_cast<int>(threadIdx.x) % threads * kN;
#pragma unroll 1
  for (int i = first; i < last; i += threads * kN) {
    Packet<T, kN> packet;
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      store(&packet.value[e], stage[stage_index(split, c, i + e)]);
    }
    store_packet<kN>(run + i, packet);
  }
}

// Elements of a run, from the first on, that are copied as whole words.
template <class T>
constexpr int kWordElements = static_cast<int>(4 / sizeof(T));

template <class T>
__device__ __forceinline__ int word_elements(const RegisterSplit& split, int elements) {
  return split.word_copies ? elements / kWordElements<T> * kWordElements<T> : 0;
}

// Copies the logits of up to 32 pixels from `pixel` on to the stage, or gradients back.
template <class T>
__device__ __forceinline__ void stage_group(const CrossEntropyInput<T>& in,
                                            const RegisterSplit& split,
                                            int64_t pixel,
                                            float* stage) {
  const auto c = static_cast<int>(in.c);
  const int elements = c * static_cast<int>(min(in.pixels - pixel, int64_t{kWarp}));
  const int words = word_elements<T>(split, elements);
  const T* run = in.input + pixel * c;
  stage_run<kWordElements<T>>(split, c, run, 0, words, stage);
  if (kWordElements<T> > 1 && words < elements) {
    stage_run<1>(split, c, run, words, elements, stage);
  }
}

template <class T>
__device__ __forceinline__ void unstage_group(const CrossEntropyInput<T>& in,
                                              const RegisterSplit& split,
                                              int64_t pixel,
                                              T* grad,
                                              const float* stage) {
  const auto c = static_cast<int>(in.c);
  const int elements = c * static_cast<int>(min(in.pixels - pixel, int64_t{kWarp}));
  const int words = word_elements<T>(split, elements);
  T* run = grad + pixel * c;
  unstage_run<kWordElements<T>>(split, c, run, 0, words, stage);
  if (kWordElements<T> > 1 && words < elements) {
    unstage_run<1>(split, c, run, words, elements, stage);
  }
}

template <class F>
cudaError_t dispatch_registers(const CrossEntropyPlan& plan, F&& fn) {
  if (plan.path == CrossEntropyPath::kStaged) {
    return fn.template operator()<1, 32, true>();
  }
  switch (plan.vector) {
    case 4:
      return plan.held == 12 ? fn.template operator()<4, 12, false>()
                             : fn.template operator()<4, 24, false>();
    case 2:
      return fn.template operator()<2, 32, false>();
    default:
      return fn.template operator()<1, 32, false>();
  }
}

}  // namespace dilseg::cuda
