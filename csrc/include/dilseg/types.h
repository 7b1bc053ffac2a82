// SPDX-License-Identifier: Apache-2.0
//
// Vocabulary shared by every op: element types, strides, the CUDA stream and status, CPU threading.
// Nothing here needs torch or the CUDA toolkit, so a C++ program can include the op headers alone.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

struct CUstream_st;

namespace dilseg {

enum class Dtype { kFloat64, kFloat32, kFloat16, kBFloat16 };
enum class IndexType { kInt64, kInt32, kUInt8 };

// Bytes of an element.
constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// What lies beyond the map for an interpolation: its nearest pixel, or zero.
enum class Border { kClamp, kZero };
enum class Reduction { kNone, kMean, kSum };

// Strides of a [n, c, h, w] tensor in elements; 0 for an expanded axis.
struct Strides4 {
  int64_t n, c, h, w;
};

// Calls fn(context, begin, end) on disjoint ranges that together cover [0, count), perhaps at the
// same time on several threads. Where the cuts fall may depend on the number of threads, so a
// reduction must cut its work into blocks of its own and let `count` be the number of those blocks.
using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// CPU threading without torch: csrc/ops passes at::parallel_for, a C++ program `serial()` or its
// pool. `grain` is the smallest range worth a thread of its own.
struct ParallelFor {
  void (*run)(int64_t count, int64_t grain, RangeFn fn, void* context);
};

inline void run_serially(int64_t count, int64_t /*grain*/, RangeFn fn, void* context) {
  if (count > 0) {
    fn(context, 0, count);
  }
}
inline ParallelFor serial() { return {run_serially}; }

// Runs fn(begin, end) on the pool; fn lives on the caller's stack until every range is done.
template <class F>
void parallel_for(const ParallelFor& pool, int64_t count, int64_t grain, F&& fn) {
  using Fn = std::remove_reference_t<F>;
  pool.run(
      count,
      grain,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Fn*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(std::addressof(fn))));
}

namespace cuda {

using Stream = CUstream_st*;  // cudaStream_t
using Status = int;           // cudaError_t; 0 is success

// A sentence for a failed launch, naming the GPU and the binary's architectures where they
// disagree. The text lives until the next call on the same thread. Defined only in CUDA builds.
const char* status_message(Status status);

}  // namespace cuda
}  // namespace dilseg
