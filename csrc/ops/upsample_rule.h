// SPDX-License-Identifier: Apache-2.0
//
// The checks of the bilinear index rule, shared by the ops that upsample: which arguments make a
// rule, and the sizes and rule as numbers for the kernels.
#pragma once

#include "dilseg/upsample_add.h"
#include "ops/checks.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string_view>

#include <c10/core/SymInt.h>
#include <c10/core/SymIntArrayRef.h>

namespace dilseg::ops {

using ScaleFactors = std::optional<at::ArrayRef<double>>;

// The index rule as the user gave it.
struct UpsampleRule {
  std::array<double, 2> scale;  // 0: the step follows from the sizes
  bool align_corners;
  Border border;
  std::array<c10::SymInt, 2> origin;
};

struct UpsampleSizes {
  c10::SymInt n, c, h_in, w_in, h_out, w_out;
};

inline std::array<c10::SymInt, 2> check_pair(const char* op,
                                             const char* name,
                                             c10::SymIntArrayRef values) {
  DILSEG_CHECK_VALUE(
      op,
      values.size() == 2,
      format("expected {} of 2 numbers (vertical, horizontal), but got {}.", name, values));
  return {values[0], values[1]};
}

inline UpsampleRule check_rule(const char* op,
                               ScaleFactors scale_factors,
                               bool align_corners,
                               std::string_view border,
                               c10::SymIntArrayRef origin) {
  UpsampleRule rule{{0.0, 0.0}, align_corners, Border::kClamp, check_pair(op, "origin", origin)};
  DILSEG_CHECK_VALUE(
      op,
      border == "clamp" || border == "zero",
      format("expected border \"clamp\" or \"zero\", but got \"{}\". \"clamp\" repeats the edge, "
             "as torch does; \"zero\" is the bilinear deconvolution.",
             border));
  rule.border = border == "zero" ? Border::kZero : Border::kClamp;
  if (scale_factors.has_value()) {
    const at::ArrayRef<double> values = *scale_factors;
    DILSEG_CHECK_VALUE(
        op,
        values.size() == 2 &&
            std::ranges::all_of(values, [](double v) { return std::isfinite(v) && v > 0; }),
        format("expected scale_factors of 2 finite numbers above 0 (vertical, horizontal), but got "
               "{}. Pass a larger scale, or a size instead.",
               values));
    rule.scale = {values[0], values[1]};
  } else {
    DILSEG_CHECK_VALUE(op,
                       rule.origin[0].sym_eq(0).sym_and(rule.origin[1].sym_eq(0)),
                       format("expected origin (0, 0) without scale_factors, but got ({}, {}). "
                              "Pass scale_factors: a window moves over a map whose step is known.",
                              rule.origin[0],
                              rule.origin[1]));
  }
  return rule;
}

inline void check_map_sizes(const char* op, const UpsampleSizes& s) {
  DILSEG_CHECK_VALUE(
      op,
      s.h_in.sym_ge(1).sym_and(s.w_in.sym_ge(1)),
      format(
          "expected an input map of at least 1x1, but got {}x{}. There is nothing to interpolate.",
          s.h_in,
          s.w_in));
  DILSEG_CHECK_VALUE(op,
                     s.h_out.sym_ge(1).sym_and(s.w_out.sym_ge(1)),
                     format("expected an output map of at least 1x1, but got {}x{} from an input "
                            "map of {}x{}. Pass a larger size or scale factor.",
                            s.h_out,
                            s.w_out,
                            s.h_in,
                            s.w_in));
}

// Sizes as numbers, for the kernels.
inline UpsampleGeometry to_geometry(const char* op,
                                    const UpsampleSizes& s,
                                    const UpsampleRule& rule) {
  const UpsampleGeometry g = {.n = s.n.expect_int(),
                              .c = s.c.expect_int(),
                              .h_in = s.h_in.expect_int(),
                              .w_in = s.w_in.expect_int(),
                              .h_out = s.h_out.expect_int(),
                              .w_out = s.w_out.expect_int(),
                              .scale_h = rule.scale[0],
                              .scale_w = rule.scale[1],
                              .align_corners = rule.align_corners,
                              .border = rule.border,
                              .origin_h = rule.origin[0].expect_int(),
                              .origin_w = rule.origin[1].expect_int()};
  DILSEG_CHECK_VALUE(op,
                     std::max({g.c, g.h_in, g.w_in, g.h_out, g.w_out}) <= kUpsampleMaxSize,
                     format("expected channels, heights and widths of at most 2^30 = {}, but got "
                            "c={}, input {}x{}, output {}x{}. Split the map into tiles.",
                            kUpsampleMaxSize,
                            g.c,
                            g.h_in,
                            g.w_in,
                            g.h_out,
                            g.w_out));
  DILSEG_CHECK_VALUE(op,
                     std::min(g.origin_h, g.origin_w) >= -kUpsampleMaxSize &&
                         std::max(g.origin_h, g.origin_w) <= kUpsampleMaxSize,
                     format("expected origin from -2^30 to 2^30, but got ({}, {}). The window lies "
                            "far outside of the map.",
                            g.origin_h,
                            g.origin_w));
  return g;
}

}  // namespace dilseg::ops
