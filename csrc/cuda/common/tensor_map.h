// SPDX-License-Identifier: Apache-2.0
//
// Tensor maps, by which TMA finds its way in a tensor. Of rank 4, {c, w, h, n} from the inside out,
// of 16-bit elements in rows of at most 128 bytes, swizzled by 128.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>

namespace dilseg::cuda {

struct TensorMapShape {
  std::array<int64_t, 4> sizes;    // c, w, h, n
  std::array<int64_t, 3> strides;  // of w, h, n, in elements, multiples of 8; c has 1

  bool operator==(const TensorMapShape&) const = default;
};

// A box of c, w, h, n elements; beyond the tensor it reads zeros and writes nothing.
cudaError_t make_tiled_map(CUtensorMap& map,
                           const void* data,
                           const TensorMapShape& shape,
                           const std::array<int, 4>& box);

// `pixels` pixels in a walk along w, then h, then n, whose first place on an axis is `lower` and
// whose last is size - 1 + `upper`, of `channels` channels each.
struct Im2colWindow {
  std::array<int, 2> lower, upper;  // w, h
  int channels, pixels;

  bool operator==(const Im2colWindow&) const = default;
};
cudaError_t make_im2col_map(CUtensorMap& map,
                            const void* data,
                            const TensorMapShape& shape,
                            const Im2colWindow& window);

}  // namespace dilseg::cuda
