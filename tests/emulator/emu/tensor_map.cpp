// SPDX-License-Identifier: Apache-2.0
//
// Makes tensor maps under the limits that the driver documents, and reads them back. An encoding
// that the driver would refuse must be refused here too, or a kernel would pass its tests on the
// CPU and have no map on the GPU.
#include "emu/tensor_map.h"

#include <cstring>
#include <limits>
#include <sstream>

namespace emu {
namespace {

constexpr uint64_t kMagic = 0x70616d2d75736d65;
constexpr uint64_t kMaxDim = uint64_t{1} << 32;
constexpr uint64_t kStrideLimit = uint64_t{1} << 40;
constexpr uint32_t kMaxBox = 256;
constexpr uint32_t kMaxElementStride = 8;
constexpr uint32_t kMaxChannels = 256;
constexpr uint32_t kMaxPixels = 1024;
constexpr uint32_t kGlobalAlignment = 16;
constexpr uint32_t kMapAlignment = 64;
constexpr uint32_t kSharedAlignment = 128;
// The most that one block can have on compute capability 9.0.
constexpr uint32_t kMaxSharedBytes = 227 * 1024;

// What the opaque words hold. Dimensions are stored less one, so that 2^32 fits.
struct Packed {
  uint64_t magic;
  uint64_t check;
  uint64_t base;
  uint64_t strides[kMaxRank - 1];
  uint32_t dims_less_one[kMaxRank];
  int16_t lower[kMaxSpatial];
  int16_t upper[kMaxSpatial];
  uint16_t box[kMaxRank];
  uint16_t channels_per_pixel;
  uint16_t pixels_per_column;
  uint8_t element_strides[kMaxRank];
  uint8_t data_type;
  uint8_t rank;
  uint8_t swizzle;
  uint8_t fill_nan;
  uint8_t is_im2col;
};
static_assert(sizeof(CUtensorMap) == 128 && alignof(CUtensorMap) == 64);
static_assert(sizeof(Packed) <= sizeof(CUtensorMap));

// FNV-1a, word by word, over everything behind the two marks.
uint64_t checksum(const CUtensorMap& map) {
  uint64_t sum = 0xcbf29ce484222325;
  for (std::size_t i = offsetof(Packed, base) / sizeof(sum); i < CU_TENSOR_MAP_NUM_QWORDS; ++i) {
    sum = (sum ^ map.opaque[i]) * 0x100000001b3;
  }
  return sum;
}

thread_local std::string last_error;

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
CUresult refuse(CUresult code, const Parts&... parts) {
  last_error = sentence(parts...);
  return code;
}

template <class... Parts>
CUresult invalid(const Parts&... parts) {
  return refuse(CUDA_ERROR_INVALID_VALUE, parts...);
}

template <class... Parts>
CUresult unsupported(const Parts&... parts) {
  return refuse(CUDA_ERROR_NOT_SUPPORTED, parts...);
}

// 0 for the packed 4 and 6-bit types.
uint32_t size_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 0;
  }
}

bool is_float(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ:
      return true;
    default:
      return false;
  }
}

// The corners and the offsets of an im2col map share 16 bits per pixel coordinate in rank 3 but
// have 8 in rank 4 and 5 in rank 5.
int im2col_bits(int rank) { return rank == 3 ? 16 : rank == 4 ? 8 : 5; }

uint32_t inner_elements(const TensorMap& map) {
  return map.is_im2col ? map.channels_per_pixel : map.box[0];
}

uint32_t inner_bytes(const TensorMap& map) { return inner_elements(map) * map.element_bytes; }

uint32_t swizzle_bytes(uint32_t code) { return kSwizzleChunkBytes << code; }

// What both encoders are given.
struct Request {
  CUtensorMap* map;
  CUtensorMapDataType data_type;
  cuuint32_t rank;
  void* address;
  const cuuint64_t* dims;
  const cuuint64_t* strides;
  const cuuint32_t* element_strides;
  CUtensorMapInterleave interleave;
  CUtensorMapSwizzle swizzle;
  CUtensorMapL2promotion l2_promotion;
  CUtensorMapFloatOOBfill fill;
};

CUresult check_enums(const Request& request) {
  const int type = request.data_type;
  const int interleave = request.interleave;
  const int pattern = request.swizzle;
  const int promotion = request.l2_promotion;
  const int fill = request.fill;
  if (type < 0 || type > CU_TENSOR_MAP_DATA_TYPE_16U6_ALIGN16B) {
    return invalid("tensorDataType ", type, " is no CUtensorMapDataType");
  }
  if (interleave < 0 || interleave > CU_TENSOR_MAP_INTERLEAVE_32B) {
    return invalid("interleave ", interleave, " is no CUtensorMapInterleave");
  }
  if (pattern < 0 || pattern > CU_TENSOR_MAP_SWIZZLE_128B_ATOM_64B) {
    return invalid("swizzle ", pattern, " is no CUtensorMapSwizzle");
  }
  if (promotion < 0 || promotion > CU_TENSOR_MAP_L2_PROMOTION_L2_256B) {
    return invalid("l2Promotion ", promotion, " is no CUtensorMapL2promotion");
  }
  if (fill < 0 || fill > CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA) {
    return invalid("oobFill ", fill, " is no CUtensorMapFloatOOBfill");
  }
  if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && !is_float(request.data_type)) {
    return invalid("oobFill asks for NaN, which tensorDataType ", type, " does not have");
  }
  if (size_of(request.data_type) == 0) {
    return unsupported("tensorDataType ", type, " (packed) is not emulated");
  }
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) {
    return unsupported("interleave ", interleave, " is not emulated");
  }
  if (pattern > CU_TENSOR_MAP_SWIZZLE_128B) {
    return unsupported("swizzle ", pattern, " (128B with larger atoms) is not emulated");
  }
  return CUDA_SUCCESS;
}

// Reads the tensor itself, the part that does not depend on the mode of the map.
CUresult read_tensor(const Request& request, cuuint32_t min_rank, TensorMap& map) {
  if (request.map == nullptr) {
    return invalid("tensorMap is null");
  }
  if (reinterpret_cast<uintptr_t>(request.map) % kMapAlignment != 0) {
    return invalid("tensorMap at ", request.map, " is not aligned to ", kMapAlignment, " bytes");
  }
  if (const CUresult result = check_enums(request); result != CUDA_SUCCESS) {
    return result;
  }
  if (request.rank < min_rank || request.rank > kMaxRank) {
    return invalid("tensorRank ", request.rank, " is not in ", min_rank, "..", kMaxRank);
  }
  if (request.address == nullptr) {
    return invalid("globalAddress is null");
  }
  if (reinterpret_cast<uintptr_t>(request.address) % kGlobalAlignment != 0) {
    return invalid(
        "globalAddress ", request.address, " is not aligned to ", kGlobalAlignment, " bytes");
  }
  if (request.dims == nullptr) {
    return invalid("globalDim is null");
  }
  if (request.strides == nullptr && request.rank > 1) {
    return invalid("globalStrides is null in rank ", request.rank);
  }
  if (request.element_strides == nullptr) {
    return invalid("elementStrides is null");
  }
  map.base = static_cast<std::byte*>(request.address);
  map.data_type = request.data_type;
  map.element_bytes = size_of(request.data_type);
  map.rank = static_cast<int>(request.rank);
  map.swizzle = request.swizzle;
  map.fill_nan = request.fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  map.strides[0] = map.element_bytes;
  for (int d = 0; d < map.rank; ++d) {
    const cuuint64_t dim = request.dims[d];
    if (dim == 0 || dim > kMaxDim) {
      return invalid("globalDim[", d, "] = ", dim, " is not in 1..2^32");
    }
    map.dims[d] = static_cast<int64_t>(dim);
  }
  for (int d = 1; d < map.rank; ++d) {
    const cuuint64_t stride = request.strides[d - 1];
    if (stride % kGlobalAlignment != 0) {
      return invalid("globalStrides[", d - 1, "] = ", stride, " is not a multiple of 16 bytes");
    }
    if (stride >= kStrideLimit) {
      return invalid("globalStrides[", d - 1, "] = ", stride, " is not below 2^40 bytes");
    }
    map.strides[d] = static_cast<int64_t>(stride);
  }
  for (int d = 0; d < map.rank; ++d) {
    const cuuint32_t step = request.element_strides[d];
    if (step == 0 || step > kMaxElementStride) {
      return invalid("elementStrides[", d, "] = ", step, " is not in 1..", kMaxElementStride);
    }
    // Dimension 0 cannot be strided: what the caller gave there has no effect.
    map.element_strides[d] = d == 0 ? 1 : step;
  }
  return CUDA_SUCCESS;
}

CUresult check_inner(const TensorMap& map, const char* name) {
  const uint32_t bytes = inner_bytes(map);
  if (bytes % kSwizzleChunkBytes != 0) {
    return invalid(name,
                   " = ",
                   inner_elements(map),
                   " elements of ",
                   map.element_bytes,
                   " bytes are ",
                   bytes,
                   " bytes, not a multiple of 16");
  }
  if (map.swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && bytes > swizzle_bytes(map.swizzle)) {
    return invalid(name,
                   " = ",
                   inner_elements(map),
                   " elements of ",
                   map.element_bytes,
                   " bytes are ",
                   bytes,
                   " bytes, more than the swizzle's ",
                   swizzle_bytes(map.swizzle));
  }
  return CUDA_SUCCESS;
}

CUresult read_box(const cuuint32_t* box, TensorMap& map) {
  if (box == nullptr) {
    return invalid("boxDim is null");
  }
  for (int d = 0; d < map.rank; ++d) {
    if (box[d] == 0 || box[d] > kMaxBox) {
      return invalid("boxDim[", d, "] = ", box[d], " is not in 1..", kMaxBox);
    }
    map.box[d] = box[d];
  }
  return check_inner(map, "boxDim[0]");
}

CUresult read_pixels(
    const int* lower, const int* upper, cuuint32_t channels, cuuint32_t pixels, TensorMap& map) {
  if (lower == nullptr || upper == nullptr) {
    return invalid("pixelBox", lower == nullptr ? "Lower" : "Upper", "Corner is null");
  }
  const int limit = 1 << (im2col_bits(map.rank) - 1);
  for (int s = 0; s < map.rank - 2; ++s) {
    for (const int* corner : {lower, upper}) {
      if (corner[s] < -limit || corner[s] >= limit) {
        return invalid("pixelBox",
                       corner == lower ? "Lower" : "Upper",
                       "Corner[",
                       s,
                       "] = ",
                       corner[s],
                       " is not in ",
                       -limit,
                       "..",
                       limit - 1,
                       " for rank ",
                       map.rank);
      }
    }
    if (map.dims[s + 1] + upper[s] <= lower[s]) {
      return invalid("the bounding box is empty along dimension ",
                     s + 1,
                     ": lower corner ",
                     lower[s],
                     ", upper corner ",
                     upper[s],
                     ", globalDim ",
                     map.dims[s + 1]);
    }
    map.lower[s] = lower[s];
    map.upper[s] = upper[s];
  }
  if (channels == 0 || channels > kMaxChannels) {
    return invalid("channelsPerPixel = ", channels, " is not in 1..", kMaxChannels);
  }
  if (pixels == 0 || pixels > kMaxPixels) {
    return invalid("pixelsPerColumn = ", pixels, " is not in 1..", kMaxPixels);
  }
  const uint32_t image_step = map.element_strides[map.rank - 1];
  if (image_step != 1) {
    return unsupported("elementStrides[",
                       map.rank - 1,
                       "] = ",
                       image_step,
                       ": an im2col walk that skips images is not emulated");
  }
  map.is_im2col = true;
  map.channels_per_pixel = channels;
  map.pixels_per_column = pixels;
  return check_inner(map, "channelsPerPixel");
}

void pack(const TensorMap& map, CUtensorMap& to) {
  Packed packed{};
  packed.magic = kMagic;
  packed.base = reinterpret_cast<uintptr_t>(map.base);
  for (int d = 0; d < kMaxRank; ++d) {
    packed.dims_less_one[d] = static_cast<uint32_t>(map.dims[d] - 1);
    packed.box[d] = static_cast<uint16_t>(map.box[d]);
    packed.element_strides[d] = static_cast<uint8_t>(map.element_strides[d]);
  }
  for (int d = 1; d < kMaxRank; ++d) {
    packed.strides[d - 1] = static_cast<uint64_t>(map.strides[d]);
  }
  for (int s = 0; s < kMaxSpatial; ++s) {
    packed.lower[s] = static_cast<int16_t>(map.lower[s]);
    packed.upper[s] = static_cast<int16_t>(map.upper[s]);
  }
  packed.channels_per_pixel = static_cast<uint16_t>(map.channels_per_pixel);
  packed.pixels_per_column = static_cast<uint16_t>(map.pixels_per_column);
  packed.data_type = static_cast<uint8_t>(map.data_type);
  packed.rank = static_cast<uint8_t>(map.rank);
  packed.swizzle = static_cast<uint8_t>(map.swizzle);
  packed.fill_nan = map.fill_nan;
  packed.is_im2col = map.is_im2col;
  to = {};
  std::memcpy(&to, &packed, sizeof(packed));
  packed.check = checksum(to);
  std::memcpy(&to, &packed, sizeof(packed));
}

std::string check_im2col(const TensorMap& map, const int* at, const uint16_t* offsets) {
  const int bits = im2col_bits(map.rank);
  for (int s = 0; s < map.rank - 2; ++s) {
    const int64_t first = map.lower[s];
    const int64_t last = map.dims[s + 1] - 1 + map.upper[s];
    if (at[s + 1] < first || at[s + 1] > last) {
      return sentence("im2col coordinate ",
                      s + 1,
                      " = ",
                      at[s + 1],
                      " starts outside the bounding box ",
                      first,
                      "..",
                      last);
    }
    if (offsets != nullptr && offsets[s] >> bits != 0) {
      return sentence("im2col offset ",
                      s,
                      " = ",
                      offsets[s],
                      " does not fit the ",
                      bits,
                      " bits of rank ",
                      map.rank);
    }
  }
  return {};
}

}  // namespace

const char* tensor_map_error() { return last_error.c_str(); }

std::optional<TensorMap> decode(const CUtensorMap& map) {
  Packed packed;
  std::memcpy(&packed, &map, sizeof(packed));
  if (packed.magic != kMagic || packed.check != checksum(map)) {
    return std::nullopt;
  }
  TensorMap out;
  out.base = reinterpret_cast<std::byte*>(packed.base);
  out.data_type = static_cast<CUtensorMapDataType>(packed.data_type);
  out.element_bytes = size_of(out.data_type);
  out.rank = packed.rank;
  out.strides[0] = out.element_bytes;
  for (int d = 0; d < kMaxRank; ++d) {
    out.dims[d] = int64_t{packed.dims_less_one[d]} + 1;
    out.box[d] = packed.box[d];
    out.element_strides[d] = packed.element_strides[d];
  }
  for (int d = 1; d < kMaxRank; ++d) {
    out.strides[d] = static_cast<int64_t>(packed.strides[d - 1]);
  }
  std::copy_n(packed.lower, kMaxSpatial, out.lower);
  std::copy_n(packed.upper, kMaxSpatial, out.upper);
  out.channels_per_pixel = packed.channels_per_pixel;
  out.pixels_per_column = packed.pixels_per_column;
  out.swizzle = packed.swizzle;
  out.fill_nan = packed.fill_nan != 0;
  out.is_im2col = packed.is_im2col != 0;
  return out;
}

uint32_t box_bytes(const TensorMap& map) {
  uint64_t bytes = inner_bytes(map);
  if (map.is_im2col) {
    bytes *= map.pixels_per_column;
  } else {
    for (int d = 1; d < map.rank; ++d) {
      bytes *= detail::elements_loaded(map.box[d], map.element_strides[d]);
    }
  }
  return static_cast<uint32_t>(std::min<uint64_t>(bytes, std::numeric_limits<uint32_t>::max()));
}

std::string check_copy(const TensorMap& map,
                       const int* at,
                       const uint16_t* im2col_offsets,
                       uint32_t shared_address,
                       bool im2col) {
  if (map.is_im2col != im2col) {
    return im2col ? "an im2col copy was given a tiled tensor map"
                  : "a tiled copy was given an im2col tensor map";
  }
  if (shared_address % kSharedAlignment != 0) {
    return sentence(
        "shared address ", shared_address, " is not aligned to ", kSharedAlignment, " bytes");
  }
  if (box_bytes(map) > kMaxSharedBytes) {
    return sentence("a box of ",
                    box_bytes(map),
                    " bytes exceeds the ",
                    kMaxSharedBytes,
                    " bytes of shared memory");
  }
  if (map.swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && inner_bytes(map) < swizzle_bytes(map.swizzle)) {
    return sentence("rows of ",
                    inner_bytes(map),
                    " bytes under a swizzle of ",
                    swizzle_bytes(map.swizzle),
                    " bytes: how the hardware spaces them is not modelled");
  }
  return im2col ? check_im2col(map, at, im2col_offsets) : std::string();
}

void fill_outside(const TensorMap& map, std::byte* to, uint32_t bytes) {
  if (!map.fill_nan) {
    std::memset(to, 0, bytes);
    return;
  }
  // A quiet NaN with a full payload, in little-endian: ff ... ff 7f.
  std::memset(to, 0xff, bytes);
  for (uint32_t i = map.element_bytes - 1; i < bytes; i += map.element_bytes) {
    to[i] = std::byte{0x7f};
  }
}

}  // namespace emu

extern "C" {

CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* tensorMap,
                                        CUtensorMapDataType tensorDataType,
                                        cuuint32_t tensorRank,
                                        void* globalAddress,
                                        const cuuint64_t* globalDim,
                                        const cuuint64_t* globalStrides,
                                        const cuuint32_t* boxDim,
                                        const cuuint32_t* elementStrides,
                                        CUtensorMapInterleave interleave,
                                        CUtensorMapSwizzle swizzle,
                                        CUtensorMapL2promotion l2Promotion,
                                        CUtensorMapFloatOOBfill oobFill) {
  const emu::Request request{tensorMap,
                             tensorDataType,
                             tensorRank,
                             globalAddress,
                             globalDim,
                             globalStrides,
                             elementStrides,
                             interleave,
                             swizzle,
                             l2Promotion,
                             oobFill};
  emu::TensorMap map;
  CUresult result = emu::read_tensor(request, 1, map);
  if (result == CUDA_SUCCESS) {
    result = emu::read_box(boxDim, map);
  }
  if (result == CUDA_SUCCESS) {
    emu::pack(map, *tensorMap);
    emu::last_error.clear();
  }
  return result;
}

CUresult CUDAAPI cuTensorMapEncodeIm2col(CUtensorMap* tensorMap,
                                         CUtensorMapDataType tensorDataType,
                                         cuuint32_t tensorRank,
                                         void* globalAddress,
                                         const cuuint64_t* globalDim,
                                         const cuuint64_t* globalStrides,
                                         const int* pixelBoxLowerCorner,
                                         const int* pixelBoxUpperCorner,
                                         cuuint32_t channelsPerPixel,
                                         cuuint32_t pixelsPerColumn,
                                         const cuuint32_t* elementStrides,
                                         CUtensorMapInterleave interleave,
                                         CUtensorMapSwizzle swizzle,
                                         CUtensorMapL2promotion l2Promotion,
                                         CUtensorMapFloatOOBfill oobFill) {
  const emu::Request request{tensorMap,
                             tensorDataType,
                             tensorRank,
                             globalAddress,
                             globalDim,
                             globalStrides,
                             elementStrides,
                             interleave,
                             swizzle,
                             l2Promotion,
                             oobFill};
  emu::TensorMap map;
  CUresult result = emu::read_tensor(request, 3, map);
  if (result == CUDA_SUCCESS) {
    result = emu::read_pixels(
        pixelBoxLowerCorner, pixelBoxUpperCorner, channelsPerPixel, pixelsPerColumn, map);
  }
  if (result == CUDA_SUCCESS) {
    emu::pack(map, *tensorMap);
    emu::last_error.clear();
  }
  return result;
}

}  // extern "C"
