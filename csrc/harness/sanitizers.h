// ThreadSanitizer and AddressSanitizer, reached by weak symbols: the runtime is compiled without -fsanitize,
// only kernels with it, and one object file serves every build.
//
// ThreadSanitizer sees each CUDA thread as a fiber, switched to without a happens-before edge; barriers add
// the edges that the CUDA memory model has, shuffles and matrix operations add none.
#pragma once

#include "harness/state.h"

namespace cuda_on_cpu {

// Hides the runtime's bookkeeping on behalf of a thread: malloc and memcpy are intercepted in all code.
class Quiet {
 public:
  Quiet();
  ~Quiet();
};

// Memory accesses that an instruction performs inside the runtime, announced as the kernel's own. Throws
// where AddressSanitizer knows the bytes to be out of bounds.
void announce_read(const void* address, size_t bytes, Site site);
void announce_write(void* address, size_t bytes, Site site);

namespace sanitizers {

// The same for the scheduler, when it performs copies.
class SchedulerQuiet {
 public:
  SchedulerQuiet();
  ~SchedulerQuiet();
};

bool any_active();
void release(void* sync_word);
void acquire(void* sync_word);
void* create_fiber();
void destroy_fiber(void* fiber);
void poison(const void* address, size_t bytes);
void unpoison(const void* address, size_t bytes);

// Around every switch of stacks.
void remember_scheduler();
void before_resume(Fiber& fiber, size_t stack_bytes);
void after_resume();
void before_switch_to_scheduler(Fiber& fiber);
void after_switch_to_fiber(Fiber& fiber);

}  // namespace sanitizers
}  // namespace cuda_on_cpu
