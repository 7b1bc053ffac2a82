// SPDX-License-Identifier: Apache-2.0
//
// Launches the loss over upsampled logits and its gradient, and holds the two kernels that come
// behind the tiles (march.cu, sweep.cu):
//   grad[i,j] = sum of the partial gradients of the tiles whose patch holds (i, j), rows of tiles
//               first, one thread per input; inputs of one tile are done already, inputs that no
//               pixel reads get 0
//   loss      = sum over tiles, in double, thread i of 256 taking i, i + 256, ..., then a tree
// The gradient of the sum of the losses is multiplied by the upstream gradient (for "mean" over
// total_weight) just before it is rounded, so the backward pass has the bits of a scaled forward
// gradient. Bytes: the partial gradients of tile rims once, their inputs' gradients once; 16 per
// tile.
#include "cuda/upsample_cross_entropy/block.cuh"
#include "cuda/upsample_cross_entropy/tiles.cuh"

namespace dilseg::cuda {
namespace {

// Also of the one block that adds the sums of the tiles.
constexpr int kGatherThreads = 256;

// One thread per input that no tile has written: the sum of its tiles' partial gradients.
template <class A>
__global__ void __launch_bounds__(kGatherThreads, 4)
    upsample_cross_entropy_gather_kernel(TilePlan plan,
                                         int c,
                                         int h,
                                         int w,
                                         int64_t elements,
                                         const A* partials,
                                         GradientOutput<A> out) {
  // Read once a block.
  auto& scale = *dynamic_shared<GradientScale<A>>();
  if (threadIdx.x == 0) {
    scale = GradientScale<A>(out);
  }
  __syncthreads();
  const bool channels_inner = out.strides.c == 1;
  for (int64_t i = grid_thread(); i < elements; i += grid_threads()) {
    int64_t rest = i;
    int k = 0;
    if (channels_inner) {
      k = static_cast<int>(rest % c);
      rest /= c;
    }
    const int x = static_cast<int>(rest % w);
    rest /= w;
    const int y = static_cast<int>(rest % h);
    rest /= h;
    if (!channels_inner) {
      k = static_cast<int>(rest % c);
      rest /= c;
    }
    const TileRange rows = tiles_of(plan.h, y);
    const TileRange columns = tiles_of(plan.w, x);
    if (rows.alone() && columns.alone()) {
      continue;
    }
    A total = 0;
    for (int row = rows.begin; row < rows.end; ++row) {
      const int slot_h = y - plan.h.first - row / plan.h.pieces * plan.h.cells;
      A sum = 0;
      for (int column = columns.begin; column < columns.end; ++column) {
        const int slot_w = x - plan.w.first - column / plan.w.pieces * plan.w.cells;
        const int64_t tile = (rest * plan.h.tiles + row) * plan.w.tiles + column;
        const int slot = slot_h * (plan.w.cells + 1) + slot_w;
        sum += partials[(tile * plan.patch + slot) * c + k];
      }
      total += sum;
    }
    store_gradient(out,
                   rest * out.strides.n + k * out.strides.c + y * out.strides.h + x * out.strides.w,
                   scale(total));
  }
}

// One block: thread i adds tiles i, i + 256, ... in order, then the tree.
template <class A>
__global__ void __launch_bounds__(kGatherThreads, 3) upsample_cross_entropy_reduce_kernel(
    const double* sums, int64_t tiles, Reduction reduction, A* loss, A* total_weight) {
  const BlockSums block(dynamic_shared<double>());
  double thread_loss = 0;
  double thread_weight = 0;
  for (int64_t i = threadIdx.x; i < tiles; i += kGatherThreads) {
    thread_loss += sums[i];
    thread_weight += sums[tiles + i];
  }
  block.set(thread_loss, thread_weight);
  block.reduce();
  if (threadIdx.x == 0) {
    *total_weight = static_cast<A>(block.weight[0]);
    if (reduction == Reduction::kMean) {
      // nan if no pixel is labelled, as torch
      *loss = static_cast<A>(block.loss[0] / block.weight[0]);
    } else if (reduction == Reduction::kSum) {
      *loss = static_cast<A>(block.loss[0]);
    }
  }
}

template <class A>
TileInput<A> tile_input(const UpsampleCrossEntropyProblem& p, bool gradient) {
  return TileInput<A>(p.geometry,
                      p.dtype,
                      p.input,
                      p.input_strides,
                      gradient ? TileUse::kGradient : TileUse::kLoss);
}

// Doubles of the workspace that hold the sums over blocks; the partial gradients lie behind them.
int64_t workspace_sums(const TilePlan& plan) { return 2 * plan.tiles; }

template <class A>
cudaError_t launch_tiles(const UpsampleCrossEntropyProblem& p,
                         const TileInput<A>& in,
                         const TileOutput<A>& out,
                         bool gradient,
                         Stream stream) {
  if constexpr (sizeof(A) == 4) {
    if (in.plan.march) {
      return launch_march(in, LabelInput<A>(p), out, gradient, stream);
    }
  }
  return launch_sweep(in, LabelInput<A>(p), out, gradient, stream);
}

template <class A>
cudaError_t launch_gradient(const UpsampleCrossEntropyProblem& p,
                            const TileInput<A>& in,
                            const TileOutput<A>& out,
                            Stream stream) {
  const cudaError_t status = launch_tiles(p, in, out, true, stream);
  if (status != cudaSuccess) {
    return status;
  }
  const UpsampleGeometry& g = p.geometry;
  const int64_t elements = g.n * g.c * g.h_in * g.w_in;
  return launch(&upsample_cross_entropy_gather_kernel<A>,
                grid_for(elements, kGatherThreads),
                kGatherThreads,
                sizeof(GradientScale<A>),
                stream,
                in.plan,
                static_cast<int>(g.c),
                static_cast<int>(g.h_in),
                static_cast<int>(g.w_in),
                elements,
                static_cast<const A*>(out.partials),
                out.grad);
}

}  // namespace

size_t upsample_cross_entropy_workspace(const UpsampleCrossEntropyProblem& p, bool gradient) {
  return dispatch_accumulator(p.dtype, [&]<class A>() {
    const TilePlan plan = tile_input<A>(p, gradient).plan;
    const int64_t partials = gradient ? plan.tiles * plan.patch * p.geometry.c : 0;
    return static_cast<size_t>(workspace_sums(plan)) * sizeof(double) +
           static_cast<size_t>(partials) * sizeof(A);
  });
}

Status launch_upsample_cross_entropy(const UpsampleCrossEntropyParams& p, Stream stream) {
  const UpsampleCrossEntropyProblem& problem = p.problem;
  const UpsampleGeometry& g = problem.geometry;
  if (!fits_tiles(g)) {
    return cudaErrorInvalidValue;
  }
  return dispatch_accumulator(problem.dtype, [&]<class A>() -> cudaError_t {
    const TileInput<A> in = tile_input<A>(problem, p.sum_grad != nullptr);
    auto* sums = static_cast<double*>(p.workspace);
    if (g.n > 0) {
      TileOutput<A> out{};
      out.losses = problem.reduction == Reduction::kNone ? static_cast<A*>(p.loss) : nullptr;
      out.sums = sums;
      out.partials = reinterpret_cast<A*>(sums + workspace_sums(in.plan));
      out.grad.dtype = sizeof(A) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
      out.grad.data = p.sum_grad;
      out.grad.strides = {g.c * g.h_in * g.w_in, g.h_in * g.w_in, g.w_in, 1};
      const cudaError_t status = p.sum_grad == nullptr
                                     ? launch_tiles(problem, in, out, false, stream)
                                     : launch_gradient<A>(problem, in, out, stream);
      if (status != cudaSuccess) {
        return status;
      }
    }
    // Also without pixels: the loss of nothing is 0 or nan, and must be written.
    return launch(&upsample_cross_entropy_reduce_kernel<A>,
                  1u,
                  kGatherThreads,
                  2 * sizeof(double) * kGatherThreads,
                  stream,
                  static_cast<const double*>(sums),
                  in.plan.tiles,
                  problem.reduction,
                  static_cast<A*>(p.loss),
                  static_cast<A*>(p.total_weight));
  });
}

Status launch_upsample_cross_entropy_backward(const UpsampleCrossEntropyBackwardParams& p,
                                              Stream stream) {
  const UpsampleCrossEntropyProblem& problem = p.problem;
  if (problem.geometry.n == 0) {
    return cudaSuccess;
  }
  if (!fits_tiles(problem.geometry)) {
    return cudaErrorInvalidValue;
  }
  return dispatch_accumulator(problem.dtype, [&]<class A>() {
    const TileInput<A> in = tile_input<A>(problem, true);
    const auto* grad_output = static_cast<const A*>(p.grad_output);
    TileOutput<A> out{};
    out.upstream = problem.reduction == Reduction::kNone ? grad_output : nullptr;
    out.partials =
        reinterpret_cast<A*>(static_cast<double*>(p.workspace) + workspace_sums(in.plan));
    out.grad = {problem.dtype,
                p.grad_input,
                p.grad_input_strides,
                problem.reduction,
                grad_output,
                static_cast<const A*>(p.total_weight)};
    return launch_gradient<A>(problem, in, out, stream);
  });
}

}  // namespace dilseg::cuda
