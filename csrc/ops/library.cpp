// SPDX-License-Identifier: Apache-2.0
//
// Schemas of all dilseg ops. Every op is functional: it mutates no argument and returns new
// tensors. Implementations are registered beside their code, one file per op.
#include <ATen/core/enum_tag.h>
#include <torch/library.h>

TORCH_LIBRARY(dilseg, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // input [n, c_in, h_in, w_in], weight [c_out, c_in/groups, k_h, k_w], bias [c_out];
  // padding = [top, bottom, left, right]; activation None or "relu".
  m.def(
      "dilated_conv2d(Tensor input, Tensor weight, Tensor? bias, int[2] stride, int[4] padding, "
      "int[2] dilation, int groups, str? activation) -> Tensor",
      tags);
  m.def(
      "dilated_conv2d_grad_input(Tensor grad_output, Tensor weight, SymInt[2] input_size, "
      "int[2] stride, int[4] padding, int[2] dilation, int groups) -> Tensor",
      tags);
  m.def(
      "dilated_conv2d_grad_weight(Tensor grad_output, Tensor input, SymInt[2] kernel_size, "
      "int[2] stride, int[4] padding, int[2] dilation, int groups, bool bias) "
      "-> (Tensor grad_weight, Tensor grad_bias)",
      tags);

  // What runs the "forward", "grad_input" or "grad_weight" of such tensors on such a GPU.
  m.def(
      "dilated_conv2d_plan(Tensor input, Tensor weight, Tensor? bias, int[2] stride, "
      "int[4] padding, int[2] dilation, int groups, str operation, int arch, int multiprocessors) "
      "-> (str kernel, str description, int workspace_bytes, float microseconds)");
  // Settings of the process; "" unsets. The preferred kernel runs what it can run.
  m.def("_prefer_dilated_conv2d_kernel(str kernel) -> ()");
  m.def("_set_float32_conv_precision(str precision) -> ()");
  m.def("_get_float32_conv_precision() -> str");

  // output[y, x] = bilinear(input at (y, x) + origin) + skip[y, x + offset]; border "clamp" or
  // "zero".
  m.def(
      "upsample_add(Tensor input, Tensor? skip, SymInt[2] output_size, float[]? scale_factors, "
      "bool align_corners, str border, SymInt[2] offset, SymInt[2] origin) -> Tensor",
      tags);
  m.def(
      "upsample_add_backward(Tensor grad_output, SymInt[2] input_size, float[]? scale_factors, "
      "bool align_corners, str border, SymInt[2] origin) -> Tensor",
      tags);

  // input [n, c, h, w], target [n, h, w], weight [c]; reduction "none", "mean" or "sum".
  m.def(
      "cross_entropy(Tensor input, Tensor target, Tensor? weight, str reduction, int ignore_index, "
      "float label_smoothing) -> (Tensor loss, Tensor logsumexp, Tensor total_weight)",
      tags);
  m.def(
      "cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, "
      "Tensor logsumexp, Tensor total_weight, str reduction, int ignore_index, "
      "float label_smoothing) -> Tensor",
      tags);

  // The same of input [n, c, h_in, w_in] upsampled to the size of target [n, h_out, w_out]. With
  // `gradient` and a reduction, sum_grad [n, c, h_in, w_in] is the gradient of the sum of losses.
  m.def(
      "upsample_cross_entropy(Tensor input, Tensor target, Tensor? weight, float[]? scale_factors, "
      "bool align_corners, str border, SymInt[2] origin, str reduction, int ignore_index, "
      "float label_smoothing, bool gradient) "
      "-> (Tensor loss, Tensor total_weight, Tensor sum_grad)",
      tags);
  m.def(
      "upsample_cross_entropy_backward(Tensor grad_output, Tensor input, Tensor target, "
      "Tensor? weight, Tensor total_weight, float[]? scale_factors, bool align_corners, "
      "str border, SymInt[2] origin, str reduction, int ignore_index, float label_smoothing) "
      "-> Tensor",
      tags);

  // Class [n, h_out, w_out] of every pixel of input [n, c, h_in, w_in] upsampled, and its
  // probability.
  m.def(
      "upsample_argmax(Tensor input, SymInt[2] output_size, float[]? scale_factors, "
      "bool align_corners, str border, SymInt[2] origin, ScalarType dtype, bool confidence) "
      "-> (Tensor label, Tensor confidence)",
      tags);
}
