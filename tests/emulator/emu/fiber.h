// SPDX-License-Identifier: Apache-2.0
//
// One fiber per CUDA thread: a stack and a saved position. Switching costs a few nanoseconds on
// x86-64 (callee-saved registers only); elsewhere ucontext does it. AddressSanitizer is told of
// every switch, or it would take a fiber's stack for a wild pointer.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif

namespace emu {

// Memory of a fiber's stack, with an unmapped page below it. Reused from block to block.
class Stack {
 public:
  static constexpr size_t kBytes = EMU_ASAN ? 256 << 10 : 128 << 10;

  Stack();
  ~Stack();
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return bottom_; }
  bool contains(const void* p) const {
    return static_cast<const char*>(p) >= bottom_ && static_cast<const char*>(p) < bottom_ + kBytes;
  }

 private:
  char* bottom_;
};

class Fiber {
 public:
  // The next switch to this fiber calls entry(), which must not return.
  void prepare(const Stack& stack, void (*entry)());

  // Leaves `from` and continues `to`; returns when somebody switches to `from`.
  static void switch_to(Fiber& from, Fiber& to);

  // Must be the first call of an entry.
  static void entered();

 private:
#if defined(__x86_64__)
  void* position_ = nullptr;
#else
  ucontext_t position_;
#endif
  const void* stack_bottom_ = nullptr;
  size_t stack_bytes_ = 0;
  void* asan_stack_ = nullptr;
};

}  // namespace emu
