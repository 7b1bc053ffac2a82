// SPDX-License-Identifier: Apache-2.0
//
// Included before the files of csrc/ops (-include) in the emulated library: what those files
// register for CUDA becomes the CPU implementation of torch.ops.dilseg_emulated.*, and what they
// register for the CPU is compiled but not registered. The files themselves stay as they are.
#pragma once

#include <torch/library.h>

#undef TORCH_LIBRARY
#define TORCH_LIBRARY(ns, m) EMU_TORCH_LIBRARY(dilseg_emulated, m)
#define EMU_TORCH_LIBRARY(ns, m)                                                 \
  static void C10_CONCATENATE(register_, ns)(torch::Library&);                   \
  static const torch::detail::TorchLibraryInit C10_CONCATENATE(registered_, ns)( \
      torch::Library::DEF,                                                       \
      &C10_CONCATENATE(register_, ns),                                           \
      C10_STRINGIZE(ns),                                                         \
      std::nullopt,                                                              \
      __FILE__,                                                                  \
      __LINE__);                                                                 \
  static void C10_CONCATENATE(register_, ns)(torch::Library & m)

#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(ns, key, m) EMU_IMPL_##key(m)
#define EMU_IMPL_CUDA(m) _TORCH_LIBRARY_IMPL(dilseg_emulated, CPU, m, C10_UID)
#define EMU_IMPL_Meta(m) _TORCH_LIBRARY_IMPL(dilseg_emulated, Meta, m, C10_UID)
#define EMU_IMPL_CompositeExplicitAutograd(m) \
  _TORCH_LIBRARY_IMPL(dilseg_emulated, CompositeExplicitAutograd, m, C10_UID)
#define EMU_IMPL_CPU(m) EMU_UNREGISTERED(m)
#define EMU_UNREGISTERED(m) \
  [[maybe_unused]] static void C10_CONCATENATE(unregistered_, C10_UID)(torch::Library & m)
