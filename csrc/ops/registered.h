// SPDX-License-Identifier: Apache-2.0
//
// The ops as torch knows them, for C++ that calls one: through the dispatcher, so that the call is
// differentiated, traced, vectorised and cast like a user's.
#pragma once

#include <optional>
#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymIntArrayRef.h>

namespace dilseg::ops {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline const auto& dilated_conv2d_op() {
  static const auto op =
      find_op<at::Tensor(const at::Tensor& input,
                         const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias,
                         at::IntArrayRef stride,
                         at::IntArrayRef padding,
                         at::IntArrayRef dilation,
                         int64_t groups,
                         std::optional<std::string_view> activation)>("dilseg::dilated_conv2d");
  return op;
}

inline const auto& dilated_conv2d_grad_input_op() {
  static const auto op = find_op<at::Tensor(const at::Tensor& grad_output,
                                            const at::Tensor& weight,
                                            c10::SymIntArrayRef input_size,
                                            at::IntArrayRef stride,
                                            at::IntArrayRef padding,
                                            at::IntArrayRef dilation,
                                            int64_t groups)>("dilseg::dilated_conv2d_grad_input");
  return op;
}

inline const auto& dilated_conv2d_grad_weight_op() {
  static const auto op =
      find_op<std::tuple<at::Tensor, at::Tensor>(const at::Tensor& grad_output,
                                                 const at::Tensor& input,
                                                 c10::SymIntArrayRef kernel_size,
                                                 at::IntArrayRef stride,
                                                 at::IntArrayRef padding,
                                                 at::IntArrayRef dilation,
                                                 int64_t groups,
                                                 bool bias)>("dilseg::dilated_conv2d_grad_weight");
  return op;
}

inline const auto& upsample_add_op() {
  static const auto op = find_op<at::Tensor(const at::Tensor& input,
                                            const std::optional<at::Tensor>& skip,
                                            c10::SymIntArrayRef output_size,
                                            std::optional<at::ArrayRef<double>> scale_factors,
                                            bool align_corners,
                                            std::string_view border,
                                            c10::SymIntArrayRef offset,
                                            c10::SymIntArrayRef origin)>("dilseg::upsample_add");
  return op;
}

inline const auto& upsample_add_backward_op() {
  static const auto op =
      find_op<at::Tensor(const at::Tensor& grad_output,
                         c10::SymIntArrayRef input_size,
                         std::optional<at::ArrayRef<double>> scale_factors,
                         bool align_corners,
                         std::string_view border,
                         c10::SymIntArrayRef origin)>("dilseg::upsample_add_backward");
  return op;
}

inline const auto& cross_entropy_op() {
  static const auto op = find_op<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor& input,
      const at::Tensor& target,
      const std::optional<at::Tensor>& weight,
      std::string_view reduction,
      int64_t ignore_index,
      double label_smoothing)>("dilseg::cross_entropy");
  return op;
}

inline const auto& cross_entropy_backward_op() {
  static const auto op =
      find_op<at::Tensor(const at::Tensor& grad_output,
                         const at::Tensor& input,
                         const at::Tensor& target,
                         const std::optional<at::Tensor>& weight,
                         const at::Tensor& logsumexp,
                         const at::Tensor& total_weight,
                         std::string_view reduction,
                         int64_t ignore_index,
                         double label_smoothing)>("dilseg::cross_entropy_backward");
  return op;
}

inline const auto& upsample_cross_entropy_op() {
  static const auto op = find_op<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor& input,
      const at::Tensor& target,
      const std::optional<at::Tensor>& weight,
      std::optional<at::ArrayRef<double>> scale_factors,
      bool align_corners,
      std::string_view border,
      c10::SymIntArrayRef origin,
      std::string_view reduction,
      int64_t ignore_index,
      double label_smoothing,
      bool gradient)>("dilseg::upsample_cross_entropy");
  return op;
}

inline const auto& upsample_cross_entropy_backward_op() {
  static const auto op =
      find_op<at::Tensor(const at::Tensor& grad_output,
                         const at::Tensor& input,
                         const at::Tensor& target,
                         const std::optional<at::Tensor>& weight,
                         const at::Tensor& total_weight,
                         std::optional<at::ArrayRef<double>> scale_factors,
                         bool align_corners,
                         std::string_view border,
                         c10::SymIntArrayRef origin,
                         std::string_view reduction,
                         int64_t ignore_index,
                         double label_smoothing)>("dilseg::upsample_cross_entropy_backward");
  return op;
}

inline const auto& upsample_argmax_op() {
  static const auto op =
      find_op<std::tuple<at::Tensor, at::Tensor>(const at::Tensor& input,
                                                 c10::SymIntArrayRef output_size,
                                                 std::optional<at::ArrayRef<double>> scale_factors,
                                                 bool align_corners,
                                                 std::string_view border,
                                                 c10::SymIntArrayRef origin,
                                                 at::ScalarType dtype,
                                                 bool confidence)>("dilseg::upsample_argmax");
  return op;
}

}  // namespace dilseg::ops
