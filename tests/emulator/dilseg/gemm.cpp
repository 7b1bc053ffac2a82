// SPDX-License-Identifier: Apache-2.0
//
// The weight gradient on tensor cores with tile, splits and precision as a test wants them, where
// the plan would choose others: torch.ops.dilseg_emulated.dilated_conv2d_grad_weight_gemm.
#include "cuda/dilated_conv2d/gemm_grad_weight.h"

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
  const at::Tensor weight =
      at::empty({grad_output.size(1), input.size(1) / groups, kernel[0], kernel[1]},
                input.options(),
                channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  const at::Tensor bias = at::empty({grad_output.size(1)}, input.options());
  DilatedConv2dGradWeightParams params = {.shape = {input.size(0),
                                                    input.size(1),
                                                    input.size(2),
                                                    input.size(3),
                                                    grad_output.size(1),
                                                    grad_output.size(2),
                                                    grad_output.size(3),
                                                    kernel[0],
                                                    kernel[1],
                                                    stride[0],
                                                    stride[1],
                                                    padding[0],
                                                    padding[1],
                                                    dilation[0],
                                                    dilation[1],
                                                    groups},
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
  auto plan = cuda::plan_gemm(params, cuda::current_gpu());
  TORCH_CHECK(plan.has_value(), "the plan refuses the problem");
  plan->tile = tile == 128 ? cuda::GemmTile::kLarge : cuda::GemmTile::kSmall;
  plan->splits = static_cast<int>(splits);
  const auto bytes = static_cast<int64_t>(cuda::grad_weight_space(params, *plan).bytes);
  const at::Tensor workspace = at::empty({bytes}, input.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  const int status = cuda::launch_gemm(params, *plan, nullptr);
  TORCH_CHECK(status == 0, "the launch failed with ", status);
  return {weight, bias};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(dilseg_emulated, m) {
  m.def(
      "dilated_conv2d_grad_weight_gemm(Tensor grad_output, Tensor input, int[] kernel, "
      "int[] stride, int[] padding, int[] dilation, int groups, int tile, int splits, "
      "int precision, bool channels_last) -> (Tensor, Tensor)");
}
TORCH_LIBRARY_IMPL(dilseg_emulated, CPU, m) {
  m.impl("dilated_conv2d_grad_weight_gemm", grad_weight_gemm);
}
