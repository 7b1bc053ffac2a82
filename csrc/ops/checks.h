// SPDX-License-Identifier: Apache-2.0
//
// Argument checks shared by all ops. Every text has the form
//   dilseg::<op>: expected <arg> <property> <wanted>, but got <actual>. <how to fix>
// Sizes are compared as symbolic integers: a check on a traced shape becomes a guard (or, for a
// size unknown until run time, a deferred assertion) and never forces a size to a number.
#pragma once

#include <sstream>
#include <string>
#include <string_view>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/core/SymBool.h>
#include <c10/core/SymInt.h>
#include <c10/util/Exception.h>

namespace dilseg::ops {

inline bool holds(bool condition) { return condition; }
inline bool holds(const c10::SymBool& condition) {
  return condition.expect_true(__FILE__, __LINE__);
}

inline void format_to(std::ostream& out, std::string_view pattern) { out << pattern; }
template <class First, class... Rest>
void format_to(std::ostream& out,
               std::string_view pattern,
               const First& first,
               const Rest&... rest) {
  const size_t hole = pattern.find("{}");
  TORCH_INTERNAL_ASSERT(hole != std::string_view::npos, "too few {} for the arguments of a text");
  out << pattern.substr(0, hole) << first;
  format_to(out, pattern.substr(hole + 2), rest...);
}

// `pattern` with each {} replaced by the next argument, as it prints to a stream (std::format
// cannot print torch's types, and is missing from GCC 12).
template <class... Args>
std::string format(std::string_view pattern, const Args&... args) {
  std::ostringstream out;
  format_to(out, pattern, args...);
  return out.str();
}

// DILSEG_CHECK_VALUE(op, condition, text...) raises ValueError, DILSEG_CHECK_TYPE TypeError. Macros
// because the text must be built only when the check fails.
#define DILSEG_CHECK_VALUE(op, condition, ...) \
  TORCH_CHECK_VALUE(::dilseg::ops::holds(condition), "dilseg::", op, ": ", __VA_ARGS__)
#define DILSEG_CHECK_TYPE(op, condition, ...) \
  TORCH_CHECK_TYPE(::dilseg::ops::holds(condition), "dilseg::", op, ": ", __VA_ARGS__)

// `layout` names the axes, as in "[n, c, h, w]".
inline void check_rank(
    const char* op, const char* name, const at::Tensor& tensor, int64_t rank, const char* layout) {
  DILSEG_CHECK_VALUE(op,
                     tensor.dim() == rank,
                     format("expected {} of rank {} {}, but got rank {} with shape {}.",
                            name,
                            rank,
                            layout,
                            tensor.dim(),
                            tensor.sym_sizes()));
}

// The name a Python user knows the dtype by: "torch.float16", not "Half".
inline std::string dtype_name(at::ScalarType type) {
  return "torch." + std::string(c10::getDtypeNames(type).first);
}

inline bool is_supported_float(at::ScalarType type) {
  return type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

inline void check_float(const char* op, const char* name, const at::Tensor& tensor) {
  DILSEG_CHECK_TYPE(
      op,
      is_supported_float(tensor.scalar_type()),
      format("expected {} of dtype float64, float32, float16 or bfloat16, but got {}. "
             "Convert it with .to(torch.float32).",
             name,
             dtype_name(tensor.scalar_type())));
}

// `other` must have the dtype of `input`, which is called `input_name`.
inline void check_same_dtype(const char* op,
                             const char* input_name,
                             const at::Tensor& input,
                             const char* name,
                             const at::Tensor& other) {
  DILSEG_CHECK_TYPE(op,
                    other.scalar_type() == input.scalar_type(),
                    format("expected {} of the dtype of {}, {}, but got {} of dtype {}. Use "
                           "torch.autocast or convert with {}.to({}.dtype).",
                           name,
                           input_name,
                           dtype_name(input.scalar_type()),
                           name,
                           dtype_name(other.scalar_type()),
                           name,
                           input_name));
}

inline void check_same_device(const char* op,
                              const char* input_name,
                              const at::Tensor& input,
                              const char* name,
                              const at::Tensor& other) {
  TORCH_CHECK(other.device() == input.device(),
              format("dilseg::{}: expected {} on the device of {}, {}, but got {} on {}. Move it "
                     "with {}.to({}.device).",
                     op,
                     name,
                     input_name,
                     input.device(),
                     name,
                     other.device(),
                     name,
                     input_name));
}

}  // namespace dilseg::ops
