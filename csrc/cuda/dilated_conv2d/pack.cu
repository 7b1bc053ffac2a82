// SPDX-License-Identifier: Apache-2.0
//
// Brings a [n, c, h, w] tensor of any strides into [n, h, w, c] with pixels at 16-byte boundaries:
// as it is, or floats as two or three such tensors of bfloat16 that add up to it.
// A block owns 64 pixels of one image times 64 channels: it reads them along the axis that is
// contiguous in memory, turns them in shared memory and writes chunks of 16 bytes, of which eight
// lanes fill 128 bytes. Bytes: each element is read once and written once (2 bytes per part).
// Limits: h * w below 2^31.
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/dilated_conv2d/pack.h"
#include "cuda/dilated_conv2d/split.cuh"

namespace dilseg::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kThreads = 256;

// Chunks of 16 bytes as they are. Element is an unsigned integer of the dtype's size: bits are
// moved, not numbers.
template <class Element_>
struct Whole {
  using Element = Element_;
  static constexpr int kChunk = 16 / sizeof(Element);
  Element* to;
  int64_t pitch;

  __device__ __forceinline__ void store(int64_t pixel, int64_t c, const Element (&value)[kChunk]) {
    Vec<Element, kChunk> chunk;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
      chunk.v[e] = value[e];
    }
    store_vec(to + pixel * pitch + c, chunk);
  }
};

// Floats as parts that lie `plane` bytes apart.
template <int kPlanes>
struct Parts {
  using Element = float;
  static constexpr int kChunk = kPartChunk;
  uint16_t* to;
  int64_t pitch;
  int64_t plane;

  __device__ __forceinline__ void store(int64_t pixel, int64_t c, const float (&value)[kChunk]) {
    store_chunk<kPlanes>(reinterpret_cast<unsigned char*>(to + pixel * pitch + c), plane, value);
  }
};

template <class Target>
__global__ void __launch_bounds__(kThreads) pack_kernel(const typename Target::Element* from,
                                                        Strides4 strides,
                                                        Sizes4 s,
                                                        bool along_channels,
                                                        Target target) {
  using Element = typename Target::Element;
  constexpr int kChunk = Target::kChunk;
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
    for (int k = threadIdx.x; k < kTile * kTile / kChunk; k += kThreads) {
      const int c = k % (kTile / kChunk) * kChunk;
      const int p = k / (kTile / kChunk);
      if (first_channel + c < s.c && first_pixel + p < pixels) {
        Element value[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
          value[e] = tile[c + e][p];
        }
        target.store(image * pixels + first_pixel + p, first_channel + c, value);
      }
    }
    __syncthreads();  // all have read before the next tile is written
  }
}

template <class Target>
cudaError_t launch_target(const void* from,
                          const Strides4& strides,
                          const Sizes4& s,
                          const Target& target,
                          Stream stream) {
  const int64_t tiles = s.n * ceil_div(s.h * s.w, kTile) * ceil_div(s.c, kTile);
  if (tiles == 0) {
    return cudaSuccess;
  }
  return launch(pack_kernel<Target>,
                grid_for(tiles, 1),
                kThreads,
                0,
                stream,
                static_cast<const typename Target::Element*>(from),
                strides,
                s,
                strides.c == 1 && s.c > 1,
                target);
}

}  // namespace

Status launch_pack(const void* from,
                   const Strides4& strides,
                   const Sizes4& sizes,
                   Dtype dtype,
                   void* to,
                   Stream stream) {
  const int64_t pitch = packed_pitch(sizes.c, dtype);
  switch (size_of(dtype)) {
    case 2:
      return launch_target(
          from, strides, sizes, Whole<uint16_t>{static_cast<uint16_t*>(to), pitch}, stream);
    case 4:
      return launch_target(
          from, strides, sizes, Whole<uint32_t>{static_cast<uint32_t*>(to), pitch}, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

Status launch_split(const void* from,
                    const Strides4& strides,
                    const Sizes4& sizes,
                    int planes,
                    void* to,
                    Stream stream) {
  auto* const parts = static_cast<uint16_t*>(to);
  const int64_t pitch = packed_pitch(sizes.c, Dtype::kBFloat16);
  const auto plane = static_cast<int64_t>(plane_bytes(sizes));
  return planes == 3 ? launch_target(from, strides, sizes, Parts<3>{parts, pitch, plane}, stream)
                     : launch_target(from, strides, sizes, Parts<2>{parts, pitch, plane}, stream);
}

}  // namespace dilseg::cuda
