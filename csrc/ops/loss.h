// SPDX-License-Identifier: Apache-2.0
//
// Checks and conversions shared by the per-pixel losses. "acc" is the dtype of the loss: double for
// double logits, float for all others.
#pragma once

#include "dilseg/cross_entropy.h"
#include "ops/checks.h"

#include <array>
#include <optional>
#include <string_view>

#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>
#include <c10/core/SymIntArrayRef.h>

namespace dilseg::ops {

// Dtype of loss, logsumexp and total_weight, and of the arithmetic.
inline at::ScalarType loss_type(const at::Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_shape(const char* op,
                        const char* name,
                        const at::Tensor& tensor,
                        const char* layout,
                        c10::SymIntArrayRef wanted,
                        const at::Tensor& input) {
  bool equal = tensor.dim() == static_cast<int64_t>(wanted.size());
  for (size_t axis = 0; equal && axis < wanted.size(); ++axis) {
    equal = holds(tensor.sym_size(static_cast<int64_t>(axis)).sym_eq(wanted[axis]));
  }
  DILSEG_CHECK_VALUE(op,
                     equal,
                     format("expected {} of shape {} = {}, but got shape {} for input of shape {}.",
                            name,
                            layout,
                            wanted,
                            tensor.sym_sizes(),
                            input.sym_sizes()));
}

inline void check_scalar(const char* op, const char* name, const at::Tensor& tensor) {
  DILSEG_CHECK_VALUE(
      op,
      tensor.dim() == 0,
      format("expected {} of shape [], a scalar, but got shape {}.", name, tensor.sym_sizes()));
}

inline void check_loss_type(const char* op,
                            const char* name,
                            const at::Tensor& tensor,
                            const at::Tensor& input) {
  DILSEG_CHECK_TYPE(op,
                    tensor.scalar_type() == loss_type(input),
                    format("expected {} of dtype {} for input of dtype {}, but got {}. Pass what "
                           "the forward call returned, or its gradient.",
                           name,
                           dtype_name(loss_type(input)),
                           dtype_name(input.scalar_type()),
                           dtype_name(tensor.scalar_type())));
  check_same_device(op, "input", input, name, tensor);
}

inline Reduction check_reduction(const char* op, std::string_view reduction) {
  DILSEG_CHECK_VALUE(
      op,
      reduction == "none" || reduction == "mean" || reduction == "sum",
      format("expected reduction \"none\", \"mean\" or \"sum\", but got \"{}\".", reduction));
  return reduction == "none"   ? Reduction::kNone
         : reduction == "mean" ? Reduction::kMean
                               : Reduction::kSum;
}

// `pixels` is the shape that target must have, `layout` names its axes.
inline void check_loss_arguments(const char* op,
                                 const at::Tensor& input,
                                 const at::Tensor& target,
                                 const char* layout,
                                 c10::SymIntArrayRef pixels,
                                 const std::optional<at::Tensor>& weight,
                                 double label_smoothing) {
  check_float(op, "input", input);
  DILSEG_CHECK_VALUE(op,
                     input.sym_size(1).sym_ge(1),
                     format("expected input [n, c, h, w] with at least 1 class, but got shape {}.",
                            input.sym_sizes()));
  const at::ScalarType type = target.scalar_type();
  DILSEG_CHECK_TYPE(
      op,
      type == at::kLong || type == at::kInt || type == at::kByte,
      format("expected target of dtype int64, int32 or uint8, but got {}. Convert class indices "
             "with .to(torch.int64); class probabilities are not supported.",
             dtype_name(type)));
  check_shape(op, "target", target, layout, pixels, input);
  check_same_device(op, "input", input, "target", target);
  if (weight.has_value()) {
    DILSEG_CHECK_TYPE(
        op,
        weight->scalar_type() == input.scalar_type() || weight->scalar_type() == loss_type(input),
        format("expected weight of the dtype of input, {}, or of the loss, {}, but got weight of "
               "dtype {}. Convert it with weight.to(input.dtype).",
               dtype_name(input.scalar_type()),
               dtype_name(loss_type(input)),
               dtype_name(weight->scalar_type())));
    const std::array<c10::SymInt, 1> classes = {input.sym_size(1)};
    check_shape(op, "weight", *weight, "[c]", classes, input);
    check_same_device(op, "input", input, "weight", *weight);
  }
  DILSEG_CHECK_VALUE(op,
                     label_smoothing >= 0 && label_smoothing <= 1,
                     format("expected label_smoothing in [0, 1], but got {}.", label_smoothing));
}

inline IndexType to_index_type(at::ScalarType type) {
  return type == at::kLong  ? IndexType::kInt64
         : type == at::kInt ? IndexType::kInt32
                            : IndexType::kUInt8;
}

// The dense copies that the kernels read must outlive the launch.
struct DenseArguments {
  at::Tensor target;
  at::Tensor weight;

  DenseArguments(const at::Tensor& input,
                 const at::Tensor& target,
                 const std::optional<at::Tensor>& weight)
      : target(target.contiguous()),
        weight(weight.has_value() ? weight->to(loss_type(input)).contiguous() : at::Tensor()) {}
};

// Raises for a label that the CPU met out of range; the pixels are [n, h, w].
inline void check_labels(
    const char* op, int64_t c, int64_t h, int64_t w, int64_t ignore_index, LabelError error) {
  DILSEG_CHECK_VALUE(
      op,
      error.pixel < 0,
      format("expected target labels in [0, {}) for {} classes, or ignore_index={}, but got label "
             "{} at pixel n={}, h={}, w={}; did you forget ignore_index=255?",
             c,
             c,
             ignore_index,
             error.label,
             error.pixel / (h * w),
             error.pixel / w % h,
             error.pixel % w));
}

}  // namespace dilseg::ops
