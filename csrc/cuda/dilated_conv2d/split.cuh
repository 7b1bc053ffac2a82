// SPDX-License-Identifier: Apache-2.0
//
// Floats as sums of bfloat16, for tensor cores that know no float.
#pragma once

#include "cuda/common/dtype.cuh"
#include "cuda/common/vec.cuh"

#include <cstdint>

namespace dilseg::cuda {

constexpr int kPartChunk = 8;  // values of 16 bits in 16 bytes

// Parts of f as bfloat16, the largest first; three add up to f, two to 16 bits of it. Each is the
// nearest to what is left, but a finite f stays finite.
template <int kPlanes>
__device__ __forceinline__ void split_float(float f, uint16_t (&part)[kPlanes]) {
  __nv_bfloat16 high = __float2bfloat16_rn(f);
  constexpr int kMagnitude = 0x7fff;
  constexpr int kInfinity = 0x7f80;
  if ((__bfloat16_as_ushort(high) & kMagnitude) == kInfinity) {
    high = __float2bfloat16_rz(f);
  }
  const float whole = __bfloat162float(high);
  const float rest = whole == f ? 0.0f : f - whole;  // inf leaves no nan behind
  const __nv_bfloat16 mid = __float2bfloat16_rn(rest);
  part[0] = __bfloat16_as_ushort(high);
  part[1] = __bfloat16_as_ushort(mid);
  if constexpr (kPlanes == 3) {
    part[2] = __bfloat16_as_ushort(__float2bfloat16_rn(rest - __bfloat162float(mid)));
  }
}

// Writes a chunk of 16-bit values, or of floats to each of kPlanes planes `plane` bytes apart.
template <int kPlanes, class Raw>
__device__ __forceinline__ void store_chunk(unsigned char* to,
                                            int64_t plane,
                                            const Raw (&value)[kPartChunk]) {
  Vec<uint16_t, kPartChunk> part[kPlanes];
#pragma unroll
  for (int e = 0; e < kPartChunk; ++e) {
    if constexpr (kPlanes == 1) {
      part[0].v[e] = value[e];
    } else {
      uint16_t parts[kPlanes];
      split_float<kPlanes>(value[e], parts);
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        part[p].v[e] = parts[p];
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
    store_vec<kPartChunk>(reinterpret_cast<uint16_t*>(to + p * plane), part[p]);
  }
}

}  // namespace dilseg::cuda
