// SPDX-License-Identifier: Apache-2.0
//
// Which outputs of a convolution read the map at a given tap, for host and device.
#pragma once

namespace dilseg::cuda {

// Half-open range of output coordinates.
struct Range {
  int begin, end;
};

// The output coordinates whose window meets the input map at a tap `shift` away: those with
// 0 <= at*stride - pad + shift < extent_in.
constexpr Range meeting(int shift, int stride, int pad, int extent_in, int extent_out) {
  const int first = pad - shift;
  const int last = extent_in - 1 + pad - shift;
  const int begin = first <= 0 ? 0 : (first + stride - 1) / stride;
  const int beyond = last < 0 ? 0 : last / stride + 1;
  const int end = beyond < extent_out ? beyond : extent_out;
  return {begin, end < begin ? begin : end};
}

}  // namespace dilseg::cuda
