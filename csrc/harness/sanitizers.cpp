#include "harness/sanitizers.h"

#define WEAK __attribute__((weak))
extern "C" {
void* __asan_region_is_poisoned(void*, size_t) WEAK;
void __asan_poison_memory_region(const volatile void*, size_t) WEAK;
void __asan_unpoison_memory_region(const volatile void*, size_t) WEAK;
void __sanitizer_start_switch_fiber(void**, const void*, size_t) WEAK;
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) WEAK;
void* __tsan_get_current_fiber() WEAK;
void* __tsan_create_fiber(unsigned) WEAK;
void __tsan_destroy_fiber(void*) WEAK;
void __tsan_switch_to_fiber(void*, unsigned) WEAK;
void __tsan_acquire(void*) WEAK;
void __tsan_release(void*) WEAK;
void __tsan_read_range(void*, unsigned long) WEAK;
void __tsan_write_range(void*, unsigned long) WEAK;
void AnnotateIgnoreReadsBegin(const char*, int) WEAK;
void AnnotateIgnoreReadsEnd(const char*, int) WEAK;
void AnnotateIgnoreWritesBegin(const char*, int) WEAK;
void AnnotateIgnoreWritesEnd(const char*, int) WEAK;
}

namespace cuda_on_cpu {
namespace {

constexpr unsigned kNoSynchronisation = 1;

struct SchedulerStack {
  void* thread_sanitizer_fiber;
  void* address_sanitizer_stack;
  const void* bottom;
  size_t bytes;
} scheduler;

void ignore_accesses(bool on) {
  if (!AnnotateIgnoreReadsBegin) return;
  if (on) {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  } else {
    AnnotateIgnoreReadsEnd("", 0);
    AnnotateIgnoreWritesEnd("", 0);
  }
}

void fail_if_poisoned(const void* address, size_t bytes, const char* what, Site site) {
  if (__asan_region_is_poisoned && __asan_region_is_poisoned(const_cast<void*>(address), bytes))
    fail(what, site);
}

// Lifts the current thread's Quiet.
class Loud {
 public:
  Loud() {
    if (current_fiber().quiet_depth) ignore_accesses(false);
  }
  ~Loud() {
    if (current_fiber().quiet_depth) ignore_accesses(true);
  }
};

}  // namespace

Quiet::Quiet() {
  if (!current_fiber().quiet_depth++) ignore_accesses(true);
}
Quiet::~Quiet() {
  if (!--current_fiber().quiet_depth) ignore_accesses(false);
}

void announce_read(const void* address, size_t bytes, Site site) {
  fail_if_poisoned(address, bytes, "AddressSanitizer: an instruction reads out of bounds", site);
  Loud loud;
  if (__tsan_read_range) __tsan_read_range(const_cast<void*>(address), bytes);
}
void announce_write(void* address, size_t bytes, Site site) {
  fail_if_poisoned(address, bytes, "AddressSanitizer: an instruction writes out of bounds", site);
  Loud loud;
  if (__tsan_write_range) __tsan_write_range(address, bytes);
}

namespace sanitizers {

SchedulerQuiet::SchedulerQuiet() { ignore_accesses(true); }
SchedulerQuiet::~SchedulerQuiet() { ignore_accesses(false); }

bool any_active() { return __tsan_create_fiber || __asan_poison_memory_region; }
void release(void* sync_word) {
  if (__tsan_release) __tsan_release(sync_word);
}
void acquire(void* sync_word) {
  if (__tsan_acquire) __tsan_acquire(sync_word);
}
void* create_fiber() { return __tsan_create_fiber ? __tsan_create_fiber(0) : nullptr; }
void destroy_fiber(void* fiber) {
  if (__tsan_destroy_fiber) __tsan_destroy_fiber(fiber);
}
void poison(const void* address, size_t bytes) {
  if (__asan_poison_memory_region) __asan_poison_memory_region(address, bytes);
}
void unpoison(const void* address, size_t bytes) {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(address, bytes);
}

void remember_scheduler() {
  if (__tsan_get_current_fiber) scheduler.thread_sanitizer_fiber = __tsan_get_current_fiber();
}
void before_resume(Fiber& fiber, size_t stack_bytes) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber.thread_sanitizer_fiber, kNoSynchronisation);
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&scheduler.address_sanitizer_stack, fiber.stack, stack_bytes);
  }
}
void after_resume() {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(scheduler.address_sanitizer_stack, nullptr, nullptr);
  }
}
void before_switch_to_scheduler(Fiber& fiber) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(scheduler.thread_sanitizer_fiber, kNoSynchronisation);
  if (__sanitizer_start_switch_fiber) {
    __sanitizer_start_switch_fiber(&fiber.address_sanitizer_stack, scheduler.bottom, scheduler.bytes);
  }
}
void after_switch_to_fiber(Fiber& fiber) {
  if (__sanitizer_finish_switch_fiber) {
    __sanitizer_finish_switch_fiber(fiber.address_sanitizer_stack, &scheduler.bottom, &scheduler.bytes);
  }
}

}  // namespace sanitizers
}  // namespace cuda_on_cpu
