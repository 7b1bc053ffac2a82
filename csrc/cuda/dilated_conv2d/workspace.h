// SPDX-License-Identifier: Apache-2.0
//
// The workspace of a GEMM: packed copies or parts of its operands, then partial sums.
#pragma once

#include "cuda/dilated_conv2d/gemm.h"
#include "cuda/dilated_conv2d/pack.h"

#include <cstddef>

namespace dilseg::cuda {

// Packs what the plan says, one after the other in the workspace; the partial sums follow.
class Workspace {
 public:
  Workspace(void* workspace, Dtype dtype, Stream stream)
      : next_(static_cast<unsigned char*>(workspace)), dtype_(dtype), stream_(stream) {}

  Packed pack(bool wanted, const void* data, const Strides4& strides, const Sizes4& sizes) {
    if (!wanted) {
      return {data, strides};
    }
    unsigned char* const place = take(packed_bytes(sizes, dtype_));
    const Status status = launch_pack(data, strides, sizes, dtype_, place, stream_);
    status_ = status_ == 0 ? status : status_;
    return {place, packed_strides(sizes, dtype_)};
  }
  // The first of `planes` parts of a tensor of floats.
  Packed split(int planes, const void* data, const Strides4& strides, const Sizes4& sizes) {
    unsigned char* const place = take(static_cast<size_t>(planes) * plane_bytes(sizes));
    const Status status = launch_split(data, strides, sizes, planes, place, stream_);
    status_ = status_ == 0 ? status : status_;
    return {place, packed_strides(sizes, Dtype::kBFloat16)};
  }
  float* rest() { return reinterpret_cast<float*>(next_); }
  Status status() const { return status_; }

 private:
  unsigned char* take(size_t bytes) {
    unsigned char* const place = next_;
    next_ += workspace_step(bytes);
    return place;
  }

  unsigned char* next_;
  Dtype dtype_;
  Stream stream_;
  Status status_ = 0;
};

}  // namespace dilseg::cuda
