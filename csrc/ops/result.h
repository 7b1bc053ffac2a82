// SPDX-License-Identifier: Apache-2.0
//
// Where results live.
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>
#include <c10/core/TensorOptions.h>

namespace dilseg::ops {

// at::empty for a result that a kernel writes from end to end. Large ones on the CPU come from
// dilseg/cpu.h's blocks of pages.
at::Tensor empty_result(c10::SymIntArrayRef sizes,
                        const at::TensorOptions& options,
                        std::optional<at::MemoryFormat> memory_format = std::nullopt);

}  // namespace dilseg::ops
