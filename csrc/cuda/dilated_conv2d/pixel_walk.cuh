// SPDX-License-Identifier: Apache-2.0
//
// A thread's way through the pixels of a batch that one tap reads.
#pragma once

#include "cuda/dilated_conv2d/meeting.h"

#include <cstdint>

namespace dilseg::cuda {

// Visits every `step`-th pixel of [0, n) x rows x columns, in memory order, from the `first` on.
// The step is split into its parts once, so that walking needs no division. Image: the integer that
// counts images.
template <class Image>
class PixelWalk {
 public:
  __device__ __forceinline__ PixelWalk(Image n, Range rows, Range columns, int64_t first, int step)
      : n(0), y(rows.begin), x(columns.begin), end_n_(n), rows_(rows), columns_(columns) {
    const int height = rows.end - rows.begin;
    const int width = columns.end - columns.begin;
    if (height == 0 || width == 0) {
      end_n_ = 0;
      return;
    }
    const int64_t row = first / width;
    const int64_t image = row / height;
    carry(static_cast<int>(first - row * width),
          static_cast<int>(row - image * height),
          static_cast<Image>(image));
    step_x_ = step % width;
    step_y_ = step / width % height;
    step_n_ = step / width / height;
  }
  __device__ __forceinline__ bool done() const { return n >= end_n_; }
  __device__ __forceinline__ void next() { carry(step_x_, step_y_, step_n_); }

  Image n;
  int y, x;

 private:
  __device__ __forceinline__ void carry(int by_x, int by_y, Image by_n) {
    x += by_x;
    y += by_y;
    n += by_n;
    if (x >= columns_.end) {
      x -= columns_.end - columns_.begin;
      ++y;
    }
    if (y >= rows_.end) {
      y -= rows_.end - rows_.begin;
      ++n;
    }
  }

  Image end_n_;
  Range rows_, columns_;
  int step_x_ = 0, step_y_ = 0, step_n_ = 0;
};

}  // namespace dilseg::cuda
