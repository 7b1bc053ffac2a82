// SPDX-License-Identifier: Apache-2.0
//
// The two ways to compute the tiles of a loss; select.h chooses.
#pragma once

#include "cuda/upsample_cross_entropy/block.cuh"

namespace dilseg::cuda {

// Few classes: a thread holds all of a pixel's classes in registers. plan.march must be set.
cudaError_t launch_march(const TileInput<float>& in,
                         const LabelInput<float>& labels,
                         const TileOutput<float>& out,
                         bool gradient,
                         Stream stream);

// Any number of classes, float and double: a thread sweeps the classes of its pixels three times.
template <class A>
cudaError_t launch_sweep(const TileInput<A>& in,
                         const LabelInput<A>& labels,
                         const TileOutput<A>& out,
                         bool gradient,
                         Stream stream);

}  // namespace dilseg::cuda
