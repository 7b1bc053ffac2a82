// SPDX-License-Identifier: Apache-2.0
//
// The memory format that the GEMM kernels read, [n, h, w, c] with every pixel's channels at a
// 16-byte boundary, and the one pass that brings a tensor there. Without CUDA but for the launcher.
#pragma once

#include "dilseg/types.h"

#include <cstddef>
#include <cstdint>

namespace dilseg::cuda {

struct Sizes4 {
  int64_t n, c, h, w;
};

// A tensor as it is or will be packed.
struct Packed {
  const void* data;
  Strides4 strides;
};

// Elements from pixel to pixel: c in whole chunks of 16 bytes.
inline int64_t packed_pitch(int64_t c, Dtype dtype) {
  const int64_t chunk = 16 / size_of(dtype);
  return (c + chunk - 1) / chunk * chunk;
}
inline size_t packed_bytes(const Sizes4& s, Dtype dtype) {
  return static_cast<size_t>(s.n * s.h * s.w * packed_pitch(s.c, dtype) * size_of(dtype));
}
inline Strides4 packed_strides(const Sizes4& s, Dtype dtype) {
  const int64_t pitch = packed_pitch(s.c, dtype);
  return {s.h * s.w * pitch, 1, s.w * pitch, pitch};
}

// Whether chunks of 16 bytes can be read from the tensor as it is: channels side by side and every
// pixel at a boundary. Strides of axes of size 1 do not count.
inline bool is_packed(const void* data, const Strides4& strides, const Sizes4& s, Dtype dtype) {
  const int64_t chunk = 16 / size_of(dtype);
  const auto fits = [&](int64_t size, int64_t stride) { return size <= 1 || stride % chunk == 0; };
  return (s.c <= 1 || strides.c == 1) && fits(s.n, strides.n) && fits(s.h, strides.h) &&
         fits(s.w, strides.w) && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Copies a tensor of any strides to `to`, packed_bytes() at a 16-byte boundary. What lies between
// the channels of one pixel and the next is not written. Float64 is refused.
Status launch_pack(const void* from,
                   const Strides4& strides,
                   const Sizes4& sizes,
                   Dtype dtype,
                   void* to,
                   Stream stream);

// Bytes from one part of a split tensor to the next.
inline size_t plane_bytes(const Sizes4& s) {
  return (packed_bytes(s, Dtype::kBFloat16) + 255) / 256 * 256;
}

// Copies floats of any strides to `planes` (2 or 3) tensors of bfloat16, packed, which add up to
// them: two to 16 bits.
Status launch_split(const void* from,
                    const Strides4& strides,
                    const Sizes4& sizes,
                    int planes,
                    void* to,
                    Stream stream);

}  // namespace dilseg::cuda
