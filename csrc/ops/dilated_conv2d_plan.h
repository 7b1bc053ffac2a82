// SPDX-License-Identifier: Apache-2.0
//
// What a convolution's plan depends on beyond its tensors, and plans that are found again.
#pragma once

#include "cuda/dilated_conv2d/select.h"
#include "dilseg/dilated_conv2d.h"
#include "ops/checks.h"
#include "ops/common.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include <ATen/Context.h>
#include <ATen/Functions.h>

namespace dilseg::ops {

// ---- settings -----------------------------------------------------------------------------------

constexpr std::array<const char*, 5> kKernels = {
    "direct", "gemm", "patch", "depthwise", "wgmma"};  // as ConvKernel
constexpr std::array<const char*, 3> kPrecisions = {"ieee", "bf16x3", "tf32"};

// Position in the names, or -1 for "".
template <size_t kCount>
int position(const char* op,
             const char* argument,
             const std::array<const char*, kCount>& names,
             std::string_view name) {
  const auto found = std::ranges::find(names, name);
  DILSEG_CHECK_VALUE(op,
                     name.empty() || found != names.end(),
                     format("expected {} among {}, or \"\" for none, but got \"{}\".",
                            argument,
                            at::ArrayRef<const char*>(names.data(), names.size()),
                            name));
  return name.empty() ? -1 : static_cast<int>(found - names.begin());
}

// Of the process; -1 where nothing was set.
inline std::atomic<int> kernel_setting{-1};
inline std::atomic<int> precision_setting{-1};

inline void prefer_kernel(std::string_view kernel) {
  kernel_setting = position("_prefer_dilated_conv2d_kernel", "kernel", kKernels, kernel);
}
inline void set_precision(std::string_view precision) {
  precision_setting = position("_set_float32_conv_precision", "precision", kPrecisions, precision);
}
inline std::string get_precision() {
  const int setting = precision_setting.load(std::memory_order_relaxed);
  return setting < 0 ? "" : kPrecisions[setting];
}

inline std::optional<cuda::ConvKernel> preferred_kernel() {
  const int setting = kernel_setting.load(std::memory_order_relaxed);
  return setting < 0 ? std::nullopt : std::optional(static_cast<cuda::ConvKernel>(setting));
}

// What was set, else torch's own switch, torch.backends.cudnn.conv.fp32_precision.
inline Float32Precision float32_precision() {
  const int setting = precision_setting.load(std::memory_order_relaxed);
  if (setting >= 0) {
    return static_cast<Float32Precision>(setting);
  }
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV) ==
                 at::Float32Precision::TF32
             ? Float32Precision::kTf32
             : Float32Precision::kIeee;
}

template <class P>
cuda::DilatedConv2dPlan plan_now(const P& params, const cuda::Gpu& gpu) {
  return cuda::plan_dilated_conv2d(params, gpu, preferred_kernel());
}

#ifdef DILSEG_WITH_CUDA

// A plan as a function of what it depends on: an entry is found again in a fraction of the time
// that the plan takes.
class PlanCache {
 public:
  template <class P>
  cuda::DilatedConv2dPlan plan(const P& params) {
    const cuda::Gpu gpu = cuda::current_gpu();
    const std::optional<cuda::ConvKernel> preferred = preferred_kernel();
    const Key key = key_of(params, gpu, preferred);
    Entry& entry = entries_[hash(key) % kEntries];
    if (!entry.filled || entry.key != key) {
      entry = {true, key, cuda::plan_dilated_conv2d(params, gpu, preferred)};
    }
    return entry.plan;
  }

 private:
  static constexpr size_t kEntries = 256;
  using Key = std::array<int64_t, 40>;
  struct Entry {
    bool filled = false;
    Key key;
    cuda::DilatedConv2dPlan plan;
  };

  // Addresses count modulo the widest access.
  static int64_t place(const void* p) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % 16);
  }

  static std::array<int64_t, 4> operands(const DilatedConv2dParams& p) {
    return {0, place(p.input), place(p.weight), place(p.output) + 16 * (p.bias != nullptr)};
  }
  static std::array<int64_t, 4> operands(const DilatedConv2dGradInputParams& p) {
    return {1, place(p.grad_output), place(p.weight), place(p.grad_input)};
  }
  static std::array<int64_t, 4> operands(const DilatedConv2dGradWeightParams& p) {
    return {2,
            place(p.grad_output),
            place(p.input),
            place(p.grad_weight) + 16 * (p.grad_bias != nullptr)};
  }
  static std::array<Strides4, 3> strides(const DilatedConv2dParams& p) {
    return {p.input_strides, p.weight_strides, p.output_strides};
  }
  static std::array<Strides4, 3> strides(const DilatedConv2dGradInputParams& p) {
    return {p.grad_output_strides, p.weight_strides, p.grad_input_strides};
  }
  static std::array<Strides4, 3> strides(const DilatedConv2dGradWeightParams& p) {
    return {p.grad_output_strides, p.input_strides, p.grad_weight_strides};
  }

  template <class P>
  static Key key_of(const P& p, const cuda::Gpu& gpu, std::optional<cuda::ConvKernel> preferred) {
    const DilatedConv2dShape& s = p.shape;
    Key key = {s.n,
               s.c_in,
               s.h_in,
               s.w_in,
               s.c_out,
               s.h_out,
               s.w_out,
               s.k_h,
               s.k_w,
               s.stride_h,
               s.stride_w,
               s.pad_top,
               s.pad_left,
               s.dil_h,
               s.dil_w,
               s.groups,
               static_cast<int64_t>(p.dtype),
               static_cast<int64_t>(p.precision),
               gpu.arch,
               gpu.multiprocessors,
               gpu.shared_bytes,
               gpu.wgmma,
               preferred.has_value() ? static_cast<int64_t>(*preferred) : -1};
    auto next = key.begin() + 23;
    next = std::ranges::copy(operands(p), next).out;
    for (const Strides4& t : strides(p)) {
      next = std::ranges::copy(std::array{t.n, t.c, t.h, t.w}, next).out;
    }
    return key;
  }
  static size_t hash(const Key& key) {
    uint64_t mixed = 0;
    for (const int64_t value : key) {
      mixed = (mixed ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
      mixed ^= mixed >> 32;
    }
    return mixed;
  }

  std::array<Entry, kEntries> entries_;
};

// The plan of a call, and its workspace, which `params` then points to.
struct Planned {
  template <class P>
  Planned(P& params, const at::Tensor& like) {
    static thread_local PlanCache cache;
    plan = cache.plan(params);
    if (plan.workspace_bytes > 0) {
      workspace =
          at::empty({static_cast<int64_t>(plan.workspace_bytes)}, like.options().dtype(at::kByte));
      params.workspace = workspace.mutable_data_ptr();
    }
  }

  cuda::DilatedConv2dPlan plan;
  at::Tensor workspace;
};

#endif

}  // namespace dilseg::ops
