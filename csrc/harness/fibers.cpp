// CUDA threads as fibers: a stack each, and a switch that saves the callee-saved registers only (2 ns;
// swapcontext makes a system call).
#include <sys/mman.h>

#include <memory>
#include <stdexcept>

#include "harness/sanitizers.h"

#if !defined(__x86_64__)
#error "the fiber switch is written for x86-64"
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kStackBytes = 256 << 10, kPageBytes = 4096;

void* scheduler_stack_pointer;
std::vector<std::unique_ptr<Fiber>> pool;

__attribute__((naked, noinline)) void switch_stack(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

// Endless, so that a frame is built once per fiber and not once per block. No exception may leave it.
void fiber_main() {
  sanitizers::after_switch_to_fiber(current_fiber());
  for (;;) {
    sanitizers::acquire(&current_launch.start_word);
    try {
      current_launch.body(current_launch.context);
    } catch (...) {
      if (!current_launch.error) current_launch.error = std::current_exception();
    }
    sanitizers::release(&current_launch.end_word);
    Quiet quiet;
    try {
      thread_exits(current_fiber());
    } catch (...) {
      if (!current_launch.error) current_launch.error = std::current_exception();
    }
    switch_to_scheduler();
  }
}

void build_frame(Fiber& fiber) {
  sanitizers::unpoison(fiber.stack, kStackBytes);
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes);
  *--top = nullptr;  // fake return address; leaves rsp at 8 modulo 16 on entry, as after a call
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.needs_frame = false;
  fiber.address_sanitizer_stack = nullptr;
}

}  // namespace

Fiber& pooled_fiber(size_t index) {
  while (pool.size() <= index) {
    void* mapping = mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) throw std::runtime_error("cuda_on_cpu: no memory for a thread's stack");
    mprotect(mapping, kPageBytes, PROT_NONE);  // a stack overflow faults
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = static_cast<char*>(mapping) + kPageBytes;
    fiber->thread_sanitizer_fiber = sanitizers::create_fiber();
    pool.push_back(std::move(fiber));
  }
  return *pool[index];
}

void resume(Fiber& fiber) {
  if (fiber.needs_frame) build_frame(fiber);
  current_thread = &fiber;
  sanitizers::before_resume(fiber, kStackBytes);
  switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
  sanitizers::after_resume();
  current_thread = nullptr;
}

void switch_to_scheduler() {
  Fiber& fiber = current_fiber();
  sanitizers::before_switch_to_scheduler(fiber);
  switch_stack(&fiber.stack_pointer, scheduler_stack_pointer);
  sanitizers::after_switch_to_fiber(fiber);
}

void abandon_all_fibers() {
  for (auto& fiber : pool) {
    fiber->needs_frame = true;
    fiber->quiet_depth = 0;
    sanitizers::destroy_fiber(fiber->thread_sanitizer_fiber);  // it may have been left ignoring accesses
    fiber->thread_sanitizer_fiber = sanitizers::create_fiber();
    fiber->open_copies.clear();
    fiber->committed_copies.clear();
  }
}

}  // namespace cuda_on_cpu
