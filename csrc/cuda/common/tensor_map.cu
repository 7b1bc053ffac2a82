// SPDX-License-Identifier: Apache-2.0
#include "cuda/common/tensor_map.h"

#include <algorithm>
#include <cstddef>

namespace dilseg::cuda {
namespace {

// The driver's function of that name, or null: found at run time, so that the package loads where
// there is no driver.
template <class Function>
Function find_in_driver(const char* name) {
  constexpr unsigned kSince = 12000;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  const cudaError_t status =
      cudaGetDriverEntryPointByVersion(name, &function, kSince, cudaEnableDefault, &found);
  return status == cudaSuccess && found == cudaDriverEntryPointSuccess
             ? reinterpret_cast<Function>(function)
             : nullptr;
}

// What a map is made of; equal keys make equal maps, so a map that was kept is never stale.
struct Key {
  const void* data;
  TensorMapShape shape;
  bool im2col;
  std::array<int, 4> box;
  Im2colWindow window;

  bool operator==(const Key&) const = default;
};

size_t hash(const Key& key) {
  uint64_t mixed = reinterpret_cast<uintptr_t>(key.data);
  const auto mix = [&](int64_t value) {
    mixed = (mixed ^ static_cast<uint64_t>(value)) * 0x9e3779b97f4a7c15u;
    mixed ^= mixed >> 32;
  };
  std::ranges::for_each(key.shape.sizes, mix);
  std::ranges::for_each(key.box, mix);
  std::ranges::for_each(key.window.lower, mix);
  std::ranges::for_each(key.window.upper, mix);
  return mixed;
}

CUresult encode(CUtensorMap& map, const Key& key) {
  std::array<cuuint64_t, 4> sizes;
  std::array<cuuint64_t, 3> bytes;
  std::ranges::copy(key.shape.sizes, sizes.begin());
  std::ranges::transform(key.shape.strides, bytes.begin(), [](int64_t stride) {
    return static_cast<cuuint64_t>(2 * stride);
  });
  const std::array<cuuint32_t, 4> steps = {1, 1, 1, 1};
  void* const data = const_cast<void*>(key.data);
  // The type decides how elements would be added, or replaced beyond the tensor; here they are
  // moved.
  constexpr auto kType = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  if (!key.im2col) {
    const auto tiled = find_in_driver<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    std::array<cuuint32_t, 4> box;
    std::ranges::copy(key.box, box.begin());
    return tiled == nullptr ? CUDA_ERROR_NOT_SUPPORTED
                            : tiled(&map,
                                    kType,
                                    4,
                                    data,
                                    sizes.data(),
                                    bytes.data(),
                                    box.data(),
                                    steps.data(),
                                    CU_TENSOR_MAP_INTERLEAVE_NONE,
                                    CU_TENSOR_MAP_SWIZZLE_128B,
                                    CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  }
  const auto im2col = find_in_driver<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
  if (im2col == nullptr) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  const CUresult status = im2col(&map,
                                 kType,
                                 4,
                                 data,
                                 sizes.data(),
                                 bytes.data(),
                                 key.window.lower.data(),
                                 key.window.upper.data(),
                                 static_cast<cuuint32_t>(key.window.channels),
                                 static_cast<cuuint32_t>(key.window.pixels),
                                 steps.data(),
                                 CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  // Drivers up to 13.1 set a bit of maps of tensors below 128 KiB that should not be set (found in
  // CUTLASS, copy_traits_sm90_im2col.hpp).
  constexpr int kLastWrongDriver = 13010;
  constexpr int64_t kSmallBytes = 128 << 10;
  int driver = 0;
  cudaDriverGetVersion(&driver);
  int64_t extent = key.shape.sizes[0];
  for (size_t axis = 0; axis < key.shape.strides.size(); ++axis) {
    extent += (key.shape.sizes[axis + 1] - 1) * key.shape.strides[axis];
  }
  if (status == CUDA_SUCCESS && driver <= kLastWrongDriver && 2 * extent < kSmallBytes) {
    reinterpret_cast<uint64_t*>(&map)[1] &= ~(uint64_t{1} << 21);
  }
  return status;
}

// Encoding costs the host about a microsecond; layers come back with the same tensors. The gradient
// of a 3x3 weight takes 18 maps.
cudaError_t find_or_encode(CUtensorMap& map, const Key& key) {
  struct Entry {
    bool filled = false;
    Key key;
    CUtensorMap map;
  };
  constexpr size_t kEntries = 1024;
  static thread_local std::array<Entry, kEntries> entries;
  Entry& entry = entries[hash(key) % kEntries];
  if (!entry.filled || entry.key != key) {
    entry.filled = false;
    const CUresult status = encode(entry.map, key);
    if (status != CUDA_SUCCESS) {
      return status == CUDA_ERROR_NOT_SUPPORTED ? cudaErrorNotSupported : cudaErrorInvalidValue;
    }
    entry.key = key;
    entry.filled = true;
  }
  map = entry.map;
  return cudaSuccess;
}

}  // namespace

cudaError_t make_tiled_map(CUtensorMap& map,
                           const void* data,
                           const TensorMapShape& shape,
                           const std::array<int, 4>& box) {
  return find_or_encode(map, {data, shape, false, box, {}});
}

cudaError_t make_im2col_map(CUtensorMap& map,
                            const void* data,
                            const TensorMapShape& shape,
                            const Im2colWindow& window) {
  return find_or_encode(map, {data, shape, true, {}, window});
}

}  // namespace dilseg::cuda
