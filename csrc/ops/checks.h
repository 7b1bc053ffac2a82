// SPDX-License-Identifier: Apache-2.0
//
// Argument checks shared by all ops. Every text has the form
//   dilseg::<op>: expected <arg> <property> <wanted>, but got <actual>. <how to fix>
// Sizes are compared as symbolic integers: a check on a traced shape becomes a guard (or, for a size
// unknown until run time, a deferred assertion) and never forces a size to a number.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/SymBool.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

#include <optional>
#include <string_view>

namespace dilseg::ops {

inline bool holds(bool condition) { return condition; }
inline bool holds(const c10::SymBool& condition) {
  return condition.expect_true(__FILE__, __LINE__);
}

// DILSEG_CHECK_VALUE(op, condition, "expected ...", ...) raises ValueError, DILSEG_CHECK_TYPE
// TypeError. Macros because the text must be built only when the check fails.
#define DILSEG_CHECK_VALUE(op, condition, ...) \
  TORCH_CHECK_VALUE(::dilseg::ops::holds(condition), "dilseg::", op, ": ", __VA_ARGS__)
#define DILSEG_CHECK_TYPE(op, condition, ...) \
  TORCH_CHECK_TYPE(::dilseg::ops::holds(condition), "dilseg::", op, ": ", __VA_ARGS__)

// `layout` names the axes, as in "[n, c, h, w]".
inline void check_rank(const char* op,
                       const char* name,
                       const at::Tensor& tensor,
                       int64_t rank,
                       const char* layout) {
  DILSEG_CHECK_VALUE(op,
                     tensor.dim() == rank,
                     "expected ", name, " of rank ", rank, " ", layout, ", but got rank ",
                     tensor.dim(), " with shape ", tensor.sym_sizes(), ".");
}

inline bool is_supported_float(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

inline void check_float(const char* op, const char* name, const at::Tensor& tensor) {
  DILSEG_CHECK_TYPE(op,
                    is_supported_float(tensor.scalar_type()),
                    "expected ", name, " of dtype float64, float32, float16 or bfloat16, but got ",
                    tensor.scalar_type(), ". Convert it with .to(torch.float32).");
}

// `other` must have the dtype of `input`, which is called `input_name`.
inline void check_same_dtype(const char* op,
                             const char* input_name,
                             const at::Tensor& input,
                             const char* name,
                             const at::Tensor& other) {
  DILSEG_CHECK_TYPE(op,
                    other.scalar_type() == input.scalar_type(),
                    "expected ", name, " of the dtype of ", input_name, ", ", input.scalar_type(),
                    ", but got ", name, " of dtype ", other.scalar_type(),
                    ". Use torch.autocast or convert with ", name, ".to(", input_name, ".dtype).");
}

inline void check_same_device(const char* op,
                              const char* input_name,
                              const at::Tensor& input,
                              const char* name,
                              const at::Tensor& other) {
  TORCH_CHECK(other.device() == input.device(),
              "dilseg::", op, ": expected ", name, " on the device of ", input_name, ", ",
              input.device(), ", but got ", name, " on ", other.device(), ". Move it with ", name,
              ".to(", input_name, ".device).");
}

}  // namespace dilseg::ops
