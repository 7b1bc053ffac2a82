// SPDX-License-Identifier: Apache-2.0
//
// The Python module dilseg._C. Loading it registers the operators (csrc/ops) with torch's
// dispatcher; what it binds itself is only what describes the binary.
#include "dilseg/cpu.h"

#include <pybind11/pybind11.h>
#include <torch/version.h>

#ifdef DILSEG_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

namespace py = pybind11;

// What the compiler saw, as opposed to what the build recorded beside the binary.
py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
#ifdef DILSEG_WITH_CUDA
  info["kind"] = "cuda";
  info["cudart"] = CUDART_VERSION;
#else
  info["kind"] = "cpu";
  info["cudart"] = py::none();
#endif
  info["cpu_instruction_set"] = dilseg::cpu::instruction_set_name();
#ifdef __OPTIMIZE__
  info["optimized"] = true;
#else
  info["optimized"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators of dilseg; importing it registers torch.ops.dilseg.*";
  m.def("build_info",
        &build_info,
        "Returns what the compiler saw (kind, torch, cudart, cxx_standard, optimized) and the "
        "cpu_instruction_set in use.");
}
