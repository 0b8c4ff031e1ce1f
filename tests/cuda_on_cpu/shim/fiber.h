// One thread of a block: a stack of its own on the one OS thread, entered and left by a switch of the stack pointer.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>

#include "sanitizers.h"

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
// Ten times as fast as swapcontext, which saves the signal mask by a system call.
#define CUDA_ON_CPU_ASM_SWITCH
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
  .pushsection .text.cuda_on_cpu_switch,"axG",@progbits,cuda_on_cpu_switch,comdat
  .weak cuda_on_cpu_switch
  .type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
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
  .size cuda_on_cpu_switch, .-cuda_on_cpu_switch
  .popsection
)");
#endif

namespace cuda_on_cpu {

class Fiber {
 public:
  void start(char* stack, size_t size, void (*entry)()) {
    bottom_ = stack, size_ = size, started_ = true;
#ifdef CUDA_ON_CPU_ASM_SWITCH
    auto top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15});
    *--top = nullptr;  // where entry would return to; it never does
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = size;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stack, size);
#endif
#ifdef __SANITIZE_THREAD__
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  bool started() const { return started_; }

  // Whatever it was doing, it will not go on; start it again before the next use. What it did lies before `sync`.
  void abandon([[maybe_unused]] void* sync) {
    started_ = false;
#ifdef __SANITIZE_THREAD__
    void* caller = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(tsan_, __tsan_switch_to_fiber_no_sync);
    __tsan_release(sync);
    __tsan_switch_to_fiber(caller, __tsan_switch_to_fiber_no_sync);
#endif
  }

  void become_current_thread() {
#ifdef __SANITIZE_THREAD__
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // A switch orders nothing: only barriers do.
  static void switch_to(Fiber& from, Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
#ifdef __SANITIZE_THREAD__
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef CUDA_ON_CPU_ASM_SWITCH
    cuda_on_cpu_switch(&from.stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
  }

  // First thing on a new fiber; tells the address sanitizer where the stack lies that started it.
  static void entered([[maybe_unused]] Fiber& from) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &from.bottom_, &from.size_);
#endif
  }

 private:
#ifdef CUDA_ON_CPU_ASM_SWITCH
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_{};
#endif
  bool started_ = false;
  [[maybe_unused]] const void* bottom_ = nullptr;
  [[maybe_unused]] size_t size_ = 0;
  [[maybe_unused]] void* fake_stack_ = nullptr;
  [[maybe_unused]] void* tsan_ = nullptr;
};

}  // namespace cuda_on_cpu
