// SPDX-License-Identifier: Apache-2.0
//
// What lets csrc/ops run on CPU tensors as it runs on CUDA tensors: a stream handle for the CPU,
// and an allocator that puts guard zones around tensors while the emulated backend is active.
#include "emu/memory.h"

#include <atomic>

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

std::atomic<bool> guarded{false};

struct StreamHandle final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CPU> {
  void* getStreamNativeHandle(const c10::Stream) const override { return nullptr; }
};

c10::Allocator* torchs_own = nullptr;

// Memory of either kind: the switch may have been thrown since it was allocated.
void release_either(void* p) {
  if (emu::owns(p)) {
    emu::release_memory(p);
  } else {
    torchs_own->raw_deallocate(p);
  }
}

class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (!guarded) {
      return torchs_own->allocate(bytes);
    }
    void* p = emu::allocate(bytes);
    return {p, p, &emu::release_memory, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release_either; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

const bool installed = [] {
  static const StreamHandle stream;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CPU)].store(&stream);
  torchs_own = c10::GetAllocator(c10::DeviceType::CPU);
  static GuardedAllocator allocator;
  c10::SetCPUAllocator(&allocator, 100);
  return true;
}();

}  // namespace

extern "C" __attribute__((visibility("default"))) void emu_guard_tensors(bool on) { guarded = on; }
