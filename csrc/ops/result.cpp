// SPDX-License-Identifier: Apache-2.0
//
// The allocator behind large results on the CPU.
#include "ops/result.h"

#include "dilseg/cpu.h"

#include <memory>

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

namespace dilseg::ops {
namespace {

// Small requests, and those that find no pages, go to torch's allocator and end in its error.
class PageAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes >= cpu::kPageBlockBytes) {
      auto block = std::make_unique<cpu::PageBlock>(cpu::take_pages(bytes));
      if (block->data != nullptr) {
        c10::profiledCPUMemoryReporter().New(block->data, block->bytes);
        void* const data = block->data;
        return {data, block.release(), &give_back, at::kCPU};
      }
    }
    return c10::GetCPUAllocator()->allocate(bytes);
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void give_back(void* context) {
    const std::unique_ptr<cpu::PageBlock> block(static_cast<cpu::PageBlock*>(context));
    c10::profiledCPUMemoryReporter().Delete(block->data);
    cpu::give_pages(*block);
  }
};

}  // namespace

at::Tensor empty_result(c10::SymIntArrayRef sizes,
                        const at::TensorOptions& options,
                        std::optional<at::MemoryFormat> memory_format) {
  // Whoever gave torch another allocator shall see every request.
  if (!options.device().is_cpu() || c10::GetCPUAllocator() != c10::GetDefaultCPUAllocator()) {
    return at::empty_symint(sizes, options, memory_format);
  }
  static PageAllocator allocator;
  return at::detail::empty_generic_symint(sizes,
                                          &allocator,
                                          c10::DispatchKeySet(c10::DispatchKey::CPU),
                                          options.dtype().toScalarType(),
                                          memory_format);
}

}  // namespace dilseg::ops
