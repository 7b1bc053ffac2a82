// SPDX-License-Identifier: Apache-2.0
//
// The GEMM kernels with tile, splits, box and precision as a test wants them, where the plan would
// choose others: torch.ops.dilseg_emulated.dilated_conv2d{,_grad_input,_grad_weight}_gemm, and
// likewise with _wgmma.
#include "cuda/dilated_conv2d/gemm_grad_weight.h"
#include "cuda/dilated_conv2d/wgmma.h"
#include "cuda/dilated_conv2d/wgmma_grad_weight.h"

#include <optional>
#include <tuple>

#include <ATen/ATen.h>
#include <torch/library.h>

namespace {

using namespace dilseg;

Strides4 to_strides(const at::Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

Dtype to_dtype(at::ScalarType type) {
  return type == at::kFloat    ? Dtype::kFloat32
         : type == at::kHalf   ? Dtype::kFloat16
         : type == at::kDouble ? Dtype::kFloat64
                               : Dtype::kBFloat16;
}

struct Geometry {
  at::IntArrayRef stride, padding, dilation;  // padding: top, left
  int64_t groups;
};

DilatedConv2dShape to_shape(const at::Tensor& input,
                            const at::Tensor& weight,
                            const at::Tensor& output,
                            const Geometry& g) {
  return {input.size(0),
          input.size(1),
          input.size(2),
          input.size(3),
          output.size(1),
          output.size(2),
          output.size(3),
          weight.size(2),
          weight.size(3),
          g.stride[0],
          g.stride[1],
          g.padding[0],
          g.padding[1],
          g.dilation[0],
          g.dilation[1],
          g.groups};
}

template <class P>
cuda::GemmPlan forced(const P& params, int64_t tile, int64_t splits) {
  auto plan = cuda::plan_gemm(params, cuda::current_gpu());
  TORCH_CHECK(plan.has_value(), "the plan refuses the problem");
  plan->tile = tile == 128 ? cuda::GemmTile::kLarge : cuda::GemmTile::kSmall;
  plan->splits = static_cast<int>(splits);
  return *plan;
}

template <class P>
void run(P& params, const cuda::GemmPlan& plan, size_t bytes, const at::Tensor& like) {
  const at::Tensor workspace =
      at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  const int status = cuda::launch_gemm(params, plan, nullptr);
  TORCH_CHECK(status == 0, "the launch failed with ", status);
}

// With room for partial sums beyond what the plan, of other tiles and splits, asked for.
template <class P>
void run_map(P& params,
             cuda::GemmPlan plan,
             at::IntArrayRef box,
             const at::Tensor& result,
             int64_t phases_h,
             int64_t phases_w) {
  plan.box_h = static_cast<int>(box[0]);
  plan.box_w = static_cast<int>(box[1]);
  const auto grid = cuda::gemm_grid(plan,
                                    result.size(0),
                                    result.size(2),
                                    result.size(3),
                                    phases_h,
                                    phases_w,
                                    result.size(1) / params.shape.groups);
  const int64_t size = cuda::gemm_tile_size(plan.tile);
  const int64_t partials = grid.row_tiles * grid.column_tiles * params.shape.groups * phases_h *
                           phases_w * plan.splits * size * size;
  run(params, plan, plan.workspace_bytes + sizeof(float) * static_cast<size_t>(partials), result);
}

// The result has the sizes and strides of `like`.
at::Tensor forward_gemm(const at::Tensor& input,
                        const at::Tensor& weight,
                        const std::optional<at::Tensor>& bias,
                        const at::Tensor& like,
                        at::IntArrayRef stride,
                        at::IntArrayRef padding,
                        at::IntArrayRef dilation,
                        int64_t groups,
                        bool relu,
                        int64_t tile,
                        int64_t splits,
                        at::IntArrayRef box,
                        int64_t precision) {
  const at::Tensor output = at::empty_strided(like.sizes(), like.strides(), like.options());
  DilatedConv2dParams params = {
      .shape = to_shape(input, weight, output, {stride, padding, dilation, groups}),
      .dtype = to_dtype(input.scalar_type()),
      .input = input.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .bias = bias.has_value() ? bias->const_data_ptr() : nullptr,
      .output = output.mutable_data_ptr(),
      .input_strides = to_strides(input),
      .weight_strides = to_strides(weight),
      .output_strides = to_strides(output),
      .relu = relu,
      .precision = static_cast<Float32Precision>(precision),
      .workspace = nullptr};
  run_map(params, forced(params, tile, splits), box, output, 1, 1);
  return output;
}

at::Tensor grad_input_gemm(const at::Tensor& grad_output,
                           const at::Tensor& weight,
                           const at::Tensor& like,
                           at::IntArrayRef stride,
                           at::IntArrayRef padding,
                           at::IntArrayRef dilation,
                           int64_t groups,
                           int64_t tile,
                           int64_t splits,
                           at::IntArrayRef box,
                           int64_t precision) {
  const at::Tensor grad_input = at::empty_strided(like.sizes(), like.strides(), like.options());
  DilatedConv2dGradInputParams params = {
      .shape = to_shape(grad_input, weight, grad_output, {stride, padding, dilation, groups}),
      .dtype = to_dtype(grad_output.scalar_type()),
      .grad_output = grad_output.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .grad_input = grad_input.mutable_data_ptr(),
      .grad_output_strides = to_strides(grad_output),
      .weight_strides = to_strides(weight),
      .grad_input_strides = to_strides(grad_input),
      .precision = static_cast<Float32Precision>(precision),
      .workspace = nullptr};
  run_map(params, forced(params, tile, splits), box, grad_input, stride[0], stride[1]);
  return grad_input;
}

std::tuple<at::Tensor, at::Tensor> grad_weight_gemm(const at::Tensor& grad_output,
                                                    const at::Tensor& input,
                                                    at::IntArrayRef kernel,
                                                    at::IntArrayRef stride,
                                                    at::IntArrayRef padding,
                                                    at::IntArrayRef dilation,
                                                    int64_t groups,
                                                    int64_t tile,
                                                    int64_t splits,
                                                    int64_t precision,
                                                    bool channels_last) {
  const Geometry g = {stride, padding, dilation, groups};
  const at::Tensor weight =
      at::empty({grad_output.size(1), input.size(1) / groups, kernel[0], kernel[1]},
                input.options(),
                channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  const at::Tensor bias = at::empty({grad_output.size(1)}, input.options());
  DilatedConv2dGradWeightParams params = {.shape = to_shape(input, weight, grad_output, g),
                                          .dtype = to_dtype(input.scalar_type()),
                                          .grad_output = grad_output.const_data_ptr(),
                                          .input = input.const_data_ptr(),
                                          .grad_weight = weight.mutable_data_ptr(),
                                          .grad_bias = bias.mutable_data_ptr(),
                                          .grad_output_strides = to_strides(grad_output),
                                          .input_strides = to_strides(input),
                                          .grad_weight_strides = to_strides(weight),
                                          .precision = static_cast<Float32Precision>(precision),
                                          .workspace = nullptr};
  auto plan = forced(params, tile, splits);
  run(params, plan, cuda::grad_weight_space(params, plan).bytes, input);
  return {weight, bias};
}

template <class P>
void run_wgmma(P& params,
               int64_t tile_n,
               int64_t cluster,
               int64_t splits,
               at::IntArrayRef box,
               const at::Tensor& result) {
  const cuda::Gpu gpu = cuda::current_gpu();
  TORCH_CHECK(cuda::wgmma_fits(params, gpu), "the plan refuses the problem");
  const cuda::WgmmaProblem problem = cuda::wgmma_problem(params);
  TORCH_CHECK(box[0] != 0 || (cuda::im2col_fits(problem.y) && cuda::im2col_fits(problem.x)),
              "im2col mode does not reach the problem's taps");
  auto plan = *cuda::plan_wgmma(params, gpu);
  plan.tile_n = static_cast<int>(tile_n);
  plan.cluster = static_cast<int>(cluster);
  plan.splits = static_cast<int>(splits);
  plan.box_h = static_cast<int>(box[0]);
  plan.box_w = static_cast<int>(box[1]);
  // With room for partial sums beyond what the plan, of other splits, asked for.
  const int64_t partials = splits * result.size(0) * result.size(2) * result.size(3) *
                           cuda::wgmma_partial_pitch(result.size(1));
  const at::Tensor workspace =
      at::empty({static_cast<int64_t>(plan.workspace_bytes + sizeof(float) * partials)},
                result.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  const int status = cuda::launch_wgmma(params, plan, nullptr);
  TORCH_CHECK(status == 0, "the launch failed with ", status);
}

at::Tensor forward_wgmma(const at::Tensor& input,
                         const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias,
                         const at::Tensor& like,
                         at::IntArrayRef padding,
                         at::IntArrayRef dilation,
                         bool relu,
                         int64_t tile_n,
                         int64_t cluster,
                         int64_t splits,
                         at::IntArrayRef box,
                         int64_t precision) {
  const at::Tensor output = at::empty_strided(like.sizes(), like.strides(), like.options());
  DilatedConv2dParams params = {
      .shape = to_shape(input, weight, output, {{1, 1}, padding, dilation, 1}),
      .dtype = to_dtype(input.scalar_type()),
      .input = input.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .bias = bias.has_value() ? bias->const_data_ptr() : nullptr,
      .output = output.mutable_data_ptr(),
      .input_strides = to_strides(input),
      .weight_strides = to_strides(weight),
      .output_strides = to_strides(output),
      .relu = relu,
      .precision = static_cast<Float32Precision>(precision),
      .workspace = nullptr};
  run_wgmma(params, tile_n, cluster, splits, box, output);
  return output;
}

at::Tensor grad_input_wgmma(const at::Tensor& grad_output,
                            const at::Tensor& weight,
                            const at::Tensor& like,
                            at::IntArrayRef padding,
                            at::IntArrayRef dilation,
                            int64_t tile_n,
                            int64_t cluster,
                            int64_t splits,
                            at::IntArrayRef box,
                            int64_t precision) {
  const at::Tensor grad_input = at::empty_strided(like.sizes(), like.strides(), like.options());
  DilatedConv2dGradInputParams params = {
      .shape = to_shape(grad_input, weight, grad_output, {{1, 1}, padding, dilation, 1}),
      .dtype = to_dtype(grad_output.scalar_type()),
      .grad_output = grad_output.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .grad_input = grad_input.mutable_data_ptr(),
      .grad_output_strides = to_strides(grad_output),
      .weight_strides = to_strides(weight),
      .grad_input_strides = to_strides(grad_input),
      .precision = static_cast<Float32Precision>(precision),
      .workspace = nullptr};
  run_wgmma(params, tile_n, cluster, splits, box, grad_input);
  return grad_input;
}

std::tuple<at::Tensor, at::Tensor> grad_weight_wgmma(const at::Tensor& grad_output,
                                                     const at::Tensor& input,
                                                     at::IntArrayRef kernel,
                                                     at::IntArrayRef padding,
                                                     at::IntArrayRef dilation,
                                                     int64_t tile_n,
                                                     int64_t cluster,
                                                     int64_t splits,
                                                     bool channels_last) {
  const at::Tensor weight =
      at::empty({grad_output.size(1), input.size(1), kernel[0], kernel[1]},
                input.options(),
                channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  const at::Tensor bias = at::empty({grad_output.size(1)}, input.options());
  DilatedConv2dGradWeightParams params = {
      .shape = to_shape(input, weight, grad_output, {{1, 1}, padding, dilation, 1}),
      .dtype = to_dtype(input.scalar_type()),
      .grad_output = grad_output.const_data_ptr(),
      .input = input.const_data_ptr(),
      .grad_weight = weight.mutable_data_ptr(),
      .grad_bias = bias.mutable_data_ptr(),
      .grad_output_strides = to_strides(grad_output),
      .input_strides = to_strides(input),
      .grad_weight_strides = to_strides(weight),
      .precision = Float32Precision::kIeee,
      .workspace = nullptr};
  auto plan = cuda::plan_wgmma(params, cuda::current_gpu());
  TORCH_CHECK(plan.has_value(), "the plan refuses the problem");
  // With room for partial sums beyond what the plan, of other splits, asked for.
  plan->splits = static_cast<int>(splits);
  plan->workspace_bytes += cuda::wgmma_partial_bytes(params, plan->splits);
  plan->tile_n = static_cast<int>(tile_n);
  plan->cluster = static_cast<int>(cluster);
  const at::Tensor workspace =
      at::empty({static_cast<int64_t>(plan->workspace_bytes)}, input.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  const int status = cuda::launch_wgmma(params, *plan, nullptr);
  TORCH_CHECK(status == 0, "the launch failed with ", status);
  return {weight, bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dilseg_emulated, m) {
  m.def(
      "dilated_conv2d_gemm(Tensor input, Tensor weight, Tensor? bias, Tensor like, "
      "int[] stride, int[] padding, int[] dilation, int groups, bool relu, int tile, int splits, "
      "int[] box, int precision) -> Tensor");
  m.def(
      "dilated_conv2d_grad_input_gemm(Tensor grad_output, Tensor weight, Tensor like, "
      "int[] stride, int[] padding, int[] dilation, int groups, int tile, int splits, int[] box, "
      "int precision) -> Tensor");
  m.def(
      "dilated_conv2d_grad_weight_gemm(Tensor grad_output, Tensor input, int[] kernel, "
      "int[] stride, int[] padding, int[] dilation, int groups, int tile, int splits, "
      "int precision, bool channels_last) -> (Tensor, Tensor)");
  m.def(
      "dilated_conv2d_wgmma(Tensor input, Tensor weight, Tensor? bias, Tensor like, int[] padding, "
      "int[] dilation, bool relu, int tile_n, int cluster, int splits, int[] box, int precision) "
      "-> Tensor");
  m.def(
      "dilated_conv2d_grad_input_wgmma(Tensor grad_output, Tensor weight, Tensor like, "
      "int[] padding, int[] dilation, int tile_n, int cluster, int splits, int[] box, "
      "int precision) -> Tensor");
  m.def(
      "dilated_conv2d_grad_weight_wgmma(Tensor grad_output, Tensor input, int[] kernel, "
      "int[] padding, int[] dilation, int tile_n, int cluster, int splits, bool channels_last) "
      "-> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(dilseg_emulated, CPU, m) {
  m.impl("dilated_conv2d_gemm", forward_gemm);
  m.impl("dilated_conv2d_grad_input_gemm", grad_input_gemm);
  m.impl("dilated_conv2d_grad_weight_gemm", grad_weight_gemm);
  m.impl("dilated_conv2d_wgmma", forward_wgmma);
  m.impl("dilated_conv2d_grad_input_wgmma", grad_input_wgmma);
  m.impl("dilated_conv2d_grad_weight_wgmma", grad_weight_wgmma);
}
