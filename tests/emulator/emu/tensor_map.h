// SPDX-License-Identifier: Apache-2.0
//
// Tensor maps: what cuTensorMapEncode* recorded, and the walk over global and shared memory that a
// tensor copy makes. Everything here is a pure function of the map and the coordinates; when bytes
// move, and which barrier hears of it, is the caller's business.
#pragma once

#include "cuda.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

namespace emu {

constexpr int kMaxRank = 5;
constexpr int kMaxSpatial = kMaxRank - 2;
constexpr uint32_t kSwizzleChunkBytes = 16;

// A decoded map. Dimensions at and past the rank are 1 with stride 0, so that walks need not ask
// for the rank. Dimension 0 is contiguous. An im2col map has no box and a tiled map no corners.
struct TensorMap {
  std::byte* base = nullptr;
  CUtensorMapDataType data_type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  uint32_t element_bytes = 1;
  int rank = 1;
  int64_t dims[kMaxRank] = {1, 1, 1, 1, 1};
  int64_t strides[kMaxRank] = {};  // bytes; strides[0] is element_bytes
  uint32_t box[kMaxRank] = {1, 1, 1, 1, 1};
  uint32_t element_strides[kMaxRank] = {1, 1, 1, 1, 1};
  int lower[kMaxSpatial] = {};  // in the order W, H, D
  int upper[kMaxSpatial] = {};
  uint32_t channels_per_pixel = 0;
  uint32_t pixels_per_column = 0;
  uint32_t swizzle = 0;  // a CUtensorMapSwizzle in NONE..128B
  bool fill_nan = false;
  bool is_im2col = false;
};

// Why the calling thread's last encoding failed, "" after a success.
const char* tensor_map_error();

// Nothing where the bytes were never encoded, or were changed since.
std::optional<TensorMap> decode(const CUtensorMap& map);

// The bytes that one copy moves, and so the bytes its mbarrier must expect: parts outside the
// tensor count like the others. Saturates, far above any shared memory.
uint32_t box_bytes(const TensorMap& map);

// Why the hardware would reject this copy, or would do something not modelled here; "" where it is
// fine. im2col says which of the two instructions is running. im2col_offsets has rank - 2 values
// in the order W, H, D, or is null for the tile and no-offset forms.
std::string check_copy(const TensorMap& map,
                       const int* at,
                       const uint16_t* im2col_offsets,
                       uint32_t shared_address,
                       bool im2col);

// Writes what a load leaves in shared memory for a run outside the tensor.
void fill_outside(const TensorMap& map, std::byte* to, uint32_t bytes);

// Where a byte of shared memory really lies: 16-byte chunks move within their 32, 64 or 128-byte
// row, by the row's number, taken from the address itself. `code` is a CUtensorMapSwizzle in
// NONE..128B; the matrix descriptors of tensor_core.h number the same patterns differently.
constexpr uint32_t tma_swizzle(uint32_t address, uint32_t code) {
  return address ^ (((address >> 7) & ((1u << code) - 1)) << 4);
}

namespace detail {

// Elements from `at` on, each `step` after the last, until the box is used up.
constexpr uint32_t elements_loaded(uint32_t box, uint32_t step) { return (box + step - 1) / step; }

template <class Visit>
void visit_span(const TensorMap& map,
                uint32_t shared_address,
                const std::byte* global,
                uint32_t bytes,
                Visit& visit) {
  if (map.swizzle == CU_TENSOR_MAP_SWIZZLE_NONE) {
    if (bytes != 0) {
      visit(shared_address, global, bytes);
    }
    return;
  }
  while (bytes != 0) {
    const uint32_t to = tma_swizzle(shared_address, map.swizzle);
    const uint32_t room = kSwizzleChunkBytes - shared_address % kSwizzleChunkBytes;
    uint32_t run = std::min(bytes, room);
    // Whole chunks are nearly all of them: a literal length lets the visitor's copy be inlined.
    if (run == kSwizzleChunkBytes) {
      visit(to, global, kSwizzleChunkBytes);
    } else {
      visit(to, global, run);
    }
    shared_address += run;
    bytes -= run;
    if (global != nullptr) {
      global += run;
    }
  }
}

// The part of a row along dimension 0 that lies in the tensor, in bytes from the row's start. It is
// the same for every row of a copy.
struct Row {
  uint32_t bytes;
  uint32_t begin;  // == end where the whole row is outside
  uint32_t end;
  int64_t first;  // from the tensor's row start to the box's, may be negative
};

inline Row row_of(const TensorMap& map, int at, uint32_t elements) {
  const int64_t start = at;
  const int64_t begin = std::clamp<int64_t>(-start, 0, elements);
  const int64_t end = std::clamp<int64_t>(map.dims[0] - start, begin, elements);
  const uint32_t size = map.element_bytes;
  return {elements * size,
          static_cast<uint32_t>(begin) * size,
          static_cast<uint32_t>(end) * size,
          start * size};
}

// `offset` is that of the row's pixel or line in the tensor, read only where `inside`.
template <class Visit>
void visit_row(const TensorMap& map,
               const Row& row,
               uint32_t shared_address,
               int64_t offset,
               bool inside,
               Visit& visit) {
  if (!inside || row.begin == row.end) {
    visit_span(map, shared_address, nullptr, row.bytes, visit);
    return;
  }
  visit_span(map, shared_address, nullptr, row.begin, visit);
  visit_span(map,
             shared_address + row.begin,
             map.base + (offset + row.first + row.begin),
             row.end - row.begin,
             visit);
  visit_span(map, shared_address + row.end, nullptr, row.bytes - row.end, visit);
}

constexpr bool within(int64_t position, int64_t size) { return position >= 0 && position < size; }

template <class Visit>
void walk_tile(const TensorMap& map, const int* at, uint32_t shared_address, Visit& visit) {
  int64_t start[kMaxRank] = {};
  uint32_t counts[kMaxRank];
  for (int d = 0; d < kMaxRank; ++d) {
    start[d] = d < map.rank ? at[d] : 0;
    counts[d] = elements_loaded(map.box[d], map.element_strides[d]);
  }
  const Row row = row_of(map, at[0], map.box[0]);
  uint32_t index[kMaxRank] = {};
  while (true) {
    int64_t offset = 0;
    bool inside = true;
    for (int d = 1; d < map.rank; ++d) {
      const int64_t position = start[d] + static_cast<int64_t>(index[d]) * map.element_strides[d];
      inside = inside && within(position, map.dims[d]);
      offset += inside ? position * map.strides[d] : 0;
    }
    visit_row(map, row, shared_address, offset, inside, visit);
    shared_address += row.bytes;
    int d = 1;
    while (d < map.rank && ++index[d] == counts[d]) {
      index[d++] = 0;
    }
    if (d == map.rank) {
      return;
    }
  }
}

template <class Visit>
void walk_im2col(const TensorMap& map,
                 const int* at,
                 const uint16_t* offsets,
                 uint32_t shared_address,
                 Visit& visit) {
  const int spatial = map.rank - 2;
  const int image_dim = map.rank - 1;
  int64_t pixel[kMaxSpatial] = {};
  int64_t shift[kMaxSpatial] = {};
  for (int s = 0; s < spatial; ++s) {
    pixel[s] = at[s + 1];
    shift[s] = offsets != nullptr ? offsets[s] : 0;
  }
  int64_t image = at[image_dim];
  const Row row = row_of(map, at[0], map.channels_per_pixel);
  for (uint32_t p = 0; p < map.pixels_per_column; ++p) {
    bool inside = within(image, map.dims[image_dim]);
    int64_t offset = inside ? image * map.strides[image_dim] : 0;
    for (int s = 0; s < spatial; ++s) {
      const int64_t position = pixel[s] + shift[s];
      inside = inside && within(position, map.dims[s + 1]);
      offset += inside ? position * map.strides[s + 1] : 0;
    }
    visit_row(map, row, shared_address, offset, inside, visit);
    shared_address += row.bytes;
    // The walk wraps at the bounding box; the offsets shift its pixels without moving the box.
    int s = 0;
    for (; s < spatial; ++s) {
      pixel[s] += map.element_strides[s + 1];
      if (pixel[s] < map.dims[s + 1] + map.upper[s]) {
        break;
      }
      pixel[s] = map.lower[s];
    }
    if (s == spatial) {
      ++image;
    }
  }
}

}  // namespace detail

// Calls visit(uint32_t shared, const std::byte* global, uint32_t bytes) for each run of one copy:
// `shared` is the address after the swizzle, counted like shared_address, and `global` is null
// where the run lies outside the tensor (fill it on a load, skip it on a store). Runs come in the
// order of the unswizzled shared memory, cover it once, and never exceed 16 bytes where the map
// swizzles. The copy must have passed check_copy.
template <class Visit>
void for_each_run(const TensorMap& map,
                  const int* at,
                  const uint16_t* im2col_offsets,
                  uint32_t shared_address,
                  Visit visit) {
  if (map.is_im2col) {
    detail::walk_im2col(map, at, im2col_offsets, shared_address, visit);
  } else {
    detail::walk_tile(map, at, shared_address, visit);
  }
}

}  // namespace emu
