// SPDX-License-Identifier: Apache-2.0
//
// Brings a [n, c, h, w] tensor of any strides into [n, h, w, c] with pixels at 16-byte boundaries.
// A block owns 64 pixels of one image times 64 channels: it reads them along the axis that is
// contiguous in memory, turns them in shared memory and writes chunks of 16 bytes, of which eight
// lanes fill 128 bytes. Bytes: each element is read once and written once. Limits: h * w below
// 2^31.
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/dilated_conv2d/pack.h"

namespace dilseg::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kThreads = 256;

// Element is an unsigned integer of the dtype's size: bits are moved, not numbers.
template <class Element>
__global__ void __launch_bounds__(kThreads) pack_kernel(const Element* from,
                                                        Strides4 strides,
                                                        Sizes4 s,
                                                        bool along_channels,
                                                        int64_t pitch,
                                                        Element* to) {
  constexpr int kChunk = 16 / sizeof(Element);
  // An odd number of 4-byte words from channel to channel.
  constexpr int kPitch = kTile + 4 / static_cast<int>(sizeof(Element));
  __shared__ Element tile[kTile][kPitch];
  const int pixels = static_cast<int>(s.h * s.w);
  const int width = static_cast<int>(s.w);
  const int64_t pixel_tiles = ceil_div(pixels, kTile);
  const int64_t channel_tiles = ceil_div(s.c, kTile);
  const int64_t tiles = s.n * pixel_tiles * channel_tiles;
  for (int64_t i = blockIdx.x; i < tiles; i += gridDim.x) {
    const int64_t first_channel = i % channel_tiles * kTile;
    const int first_pixel = static_cast<int>(i / channel_tiles % pixel_tiles) * kTile;
    const int64_t image = i / channel_tiles / pixel_tiles;
    const Element* const source = from + image * strides.n + first_channel * strides.c;
    for (int k = threadIdx.x; k < kTile * kTile; k += kThreads) {
      const int c = along_channels ? k % kTile : k / kTile;
      const int p = along_channels ? k / kTile : k % kTile;
      const int pixel = first_pixel + p;
      Element value = 0;
      if (first_channel + c < s.c && pixel < pixels) {
        const int y = pixel / width;
        value = source[c * strides.c + y * strides.h + (pixel - y * width) * strides.w];
      }
      tile[c][p] = value;
    }
    __syncthreads();  // the tile is whole before it is read across
    Element* const place = to + (image * pixels + first_pixel) * pitch + first_channel;
    for (int k = threadIdx.x; k < kTile * kTile / kChunk; k += kThreads) {
      const int c = k % (kTile / kChunk) * kChunk;
      const int p = k / (kTile / kChunk);
      if (first_channel + c < s.c && first_pixel + p < pixels) {
        Vec<Element, kChunk> chunk;
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          chunk.v[e] = tile[c + e][p];
        }
        store_vec(place + p * pitch + c, chunk);
      }
    }
    __syncthreads();  // all have read before the next tile is written
  }
}

template <class Element>
cudaError_t launch_elements(const void* from,
                            const Strides4& strides,
                            const Sizes4& s,
                            Dtype dtype,
                            void* to,
                            Stream stream) {
  const int64_t tiles = s.n * ceil_div(s.h * s.w, kTile) * ceil_div(s.c, kTile);
  if (tiles == 0) {
    return cudaSuccess;
  }
  return launch(pack_kernel<Element>,
                grid_for(tiles, 1),
                kThreads,
                0,
                stream,
                static_cast<const Element*>(from),
                strides,
                s,
                strides.c == 1 && s.c > 1,
                packed_pitch(s.c, dtype),
                static_cast<Element*>(to));
}

}  // namespace

Status launch_pack(const void* from,
                   const Strides4& strides,
                   const Sizes4& sizes,
                   Dtype dtype,
                   void* to,
                   Stream stream) {
  switch (size_of(dtype)) {
    case 2:
      return launch_elements<uint16_t>(from, strides, sizes, dtype, to, stream);
    case 4:
      return launch_elements<uint32_t>(from, strides, sizes, dtype, to, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace dilseg::cuda
