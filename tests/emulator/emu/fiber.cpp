// SPDX-License-Identifier: Apache-2.0
#include "emu/fiber.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <sys/mman.h>
#include <unistd.h>

#if EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// void emu_switch(void** save, void* load): pushes what a callee must preserve, swaps the stack
// pointers, pops the same of the other side.
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.globl emu_switch
.hidden emu_switch
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");
#endif

namespace emu {
namespace {

#if EMU_ASAN
thread_local Fiber* left = nullptr;  // by the last switch
#endif

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

Stack::Stack() {
  void* memory = mmap(nullptr,
                      kBytes + page_bytes(),
                      PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                      -1,
                      0);
  if (memory == MAP_FAILED || mprotect(memory, page_bytes(), PROT_NONE) != 0) {
    std::perror("emulator: no memory for a fiber's stack");
    std::abort();
  }
  bottom_ = static_cast<char*>(memory) + page_bytes();
}

Stack::~Stack() { munmap(bottom_ - page_bytes(), kBytes + page_bytes()); }

void Fiber::prepare(const Stack& stack, void (*entry)()) {
  stack_bottom_ = stack.bottom();
  stack_bytes_ = Stack::kBytes;
#if EMU_ASAN
  // A fiber that was abandoned in a fault leaves its red zones behind.
  __asan_unpoison_memory_region(stack.bottom(), Stack::kBytes);
  asan_stack_ = nullptr;
#endif
#if defined(__x86_64__)
  // As if called: after `ret` pops the entry, the stack pointer is 8 below a multiple of 16.
  auto** top = reinterpret_cast<void**>(stack.bottom() + Stack::kBytes - 8);
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) {
    *--top = nullptr;
  }
  position_ = top;
#else
  getcontext(&position_);
  position_.uc_stack.ss_sp = stack.bottom();
  position_.uc_stack.ss_size = Stack::kBytes;
  position_.uc_link = nullptr;
  makecontext(&position_, entry, 0);
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
#if EMU_ASAN
  left = &from;
  __sanitizer_start_switch_fiber(&from.asan_stack_, to.stack_bottom_, to.stack_bytes_);
#endif
#if defined(__x86_64__)
  emu_switch(&from.position_, to.position_);
#else
  swapcontext(&from.position_, &to.position_);
#endif
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(from.asan_stack_, &left->stack_bottom_, &left->stack_bytes_);
#endif
}

void Fiber::entered() {
#if EMU_ASAN
  // Also tells where the stack of the thread that runs the scheduler lies.
  __sanitizer_finish_switch_fiber(nullptr, &left->stack_bottom_, &left->stack_bytes_);
#endif
}

}  // namespace emu
