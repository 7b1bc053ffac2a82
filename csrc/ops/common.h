// SPDX-License-Identifier: Apache-2.0
//
// Bridges from torch to the torch-free side, shared by all ops: dtype, strides, threads, stream,
// status. Only device-generic torch headers are used, so a CUDA build also links and loads against
// a torch without CUDA.
#pragma once

#include "dilseg/types.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/Device.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

namespace dilseg::ops {

inline Dtype to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      TORCH_INTERNAL_ASSERT(false, "dilseg: dtype ", type, " passed the checks; please report.");
  }
}

inline Strides4 to_strides(const at::Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// torch's intra-op thread pool in the shape that csrc/cpu expects.
inline ParallelFor torch_threads() {
  return {[](int64_t count, int64_t grain, RangeFn fn, void* context) {
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { fn(context, begin, end); });
  }};
}

// The stream that torch would use now on `device`.
inline cuda::Stream current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl impl(device.type());
  return static_cast<cuda::Stream>(impl.getStream(device).native_handle());
}

#ifdef DILSEG_WITH_CUDA

inline void check_status(const char* op, cuda::Status status) {
  TORCH_CHECK(status == 0,
              "dilseg::",
              op,
              ": the kernel launch failed with ",
              cuda::status_message(status));
}

#else

// Why this build holds no kernels; the build passes it as a string literal.
#ifndef DILSEG_CPU_REASON
#define DILSEG_CPU_REASON "not recorded"
#endif

// CUDA implementation of every op in a CPU-only build: says so instead of "not implemented".
inline void cuda_unavailable(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK(
      false,
      op.operator_name().name,
      ": expected a build with CUDA kernels for CUDA tensors, but this dilseg is a CPU-only "
      "build (reason: " DILSEG_CPU_REASON "). Rebuild with: DILSEG_BUILD=cuda pip install .");
}

#endif

// For the scope of a backend kernel that calls ATen: neither autograd nor autocast may act a second
// time on the inner calls (they did their part, or were not asked, before the kernel was reached).
class BackendScope {
 public:
  BackendScope() = default;
  BackendScope(const BackendScope&) = delete;
  BackendScope& operator=(const BackendScope&) = delete;

 private:
  c10::impl::ExcludeDispatchKeyGuard exclude_{c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                              c10::autocast_dispatch_keyset};
};

}  // namespace dilseg::ops
