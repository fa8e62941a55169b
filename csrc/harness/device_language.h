// The device side of CUDA C++ for a plain C++ compiler: built-in variables, barriers, shuffles, atomics and
// intrinsics. NVIDIA's own headers supply types and empty __global__/__device__ when no nvcc is at work.
// Absent on purpose: __activemask(), whose value depends on the schedule on a GPU too.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "harness/runtime.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
// A plain `__shared__ float x[32]` could be neither poisoned nor kept apart for blocks that run at the same
// time.
#undef __shared__
#define __shared__ static_assert(false, "declare shared memory by KERNEL_SHARED or KERNEL_DYNAMIC_SHARED");

#define KERNEL_DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(::cuda_on_cpu::dynamic_shared_memory())
#define KERNEL_SHARED(name, ...)                    \
  static const char name##_key_ = 0;                \
  using name##_type_ = __VA_ARGS__;                 \
  name##_type_& name = *static_cast<name##_type_*>( \
      ::cuda_on_cpu::static_shared_memory(&name##_key_, sizeof(name##_type_), alignof(name##_type_)))
#define KERNEL_LAUNCH(grid, block, shared_bytes, stream, kernel, ...) \
  ((void)(stream), ::cuda_on_cpu::launch((grid), (block), (shared_bytes), [=]() { kernel(__VA_ARGS__); }))

#define threadIdx (::cuda_on_cpu::current_thread->thread_index)
#define blockIdx (::cuda_on_cpu::current_thread->block_index)
#define blockDim (::cuda_on_cpu::current_thread->block_size)
#define gridDim (::cuda_on_cpu::current_thread->grid_size)
static constexpr int warpSize = 32;

// ---- barriers and fences ----

inline void __syncthreads(CUDA_ON_CPU_SITE) {
  cuda_on_cpu::block_barrier(0, 0, 0, cuda_on_cpu::BarrierKind::kSync, site);
}
inline int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier(0, 0, predicate, cuda_on_cpu::BarrierKind::kCount, site);
}
inline int __syncthreads_and(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier(0, 0, predicate, cuda_on_cpu::BarrierKind::kAnd, site);
}
inline int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::block_barrier(0, 0, predicate, cuda_on_cpu::BarrierKind::kOr, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::warp_barrier(mask, site);
}
// Threads run one at a time and atomics are acquire-release: a missing fence cannot be detected here.
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- shuffles and votes ----

namespace cuda_on_cpu {

template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source_lane, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  ShuffleSlot slot{0, 0, source_lane};
  memcpy(&slot.in, &value, sizeof(T));
  warp_collective(name, mask, false, &slot, shuffle_body, site);
  T result;
  memcpy(static_cast<void*>(&result), &slot.out, sizeof(T));
  return result;
}

inline VoteSlot vote(const char* name, unsigned mask, int predicate, Site site) {
  VoteSlot slot{predicate != 0, 0, 0};
  warp_collective(name, mask, false, &slot, vote_body, site);
  return slot;
}

// The lanes [first, last] of the current lane's segment of `width` lanes.
struct Segment {
  unsigned lane, first, last;
  explicit Segment(int width)
      : lane(current_thread->lane), first(lane & ~unsigned(width - 1)), last(lane | unsigned(width - 1)) {}
};

}  // namespace cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Segment segment(width);
  return cuda_on_cpu::shuffle("shfl.idx", mask, value, segment.first | unsigned(source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Segment segment(width);
  const unsigned source = segment.lane ^ unsigned(lane_mask);
  return cuda_on_cpu::shuffle("shfl.bfly", mask, value, source <= segment.last ? source : segment.lane, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Segment segment(width);
  const unsigned source = segment.lane + delta;
  return cuda_on_cpu::shuffle("shfl.down", mask, value, source <= segment.last ? source : segment.lane, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::Segment segment(width);
  const bool inside = segment.lane >= segment.first + delta;
  return cuda_on_cpu::shuffle("shfl.up", mask, value, inside ? segment.lane - delta : segment.lane, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote("vote.ballot", mask, predicate, site).ballot;
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::vote("vote.any", mask, predicate, site).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  const cuda_on_cpu::VoteSlot slot = cuda_on_cpu::vote("vote.all", mask, predicate, site);
  return slot.ballot == slot.present;
}

// ---- atomics: the host's own, so that ThreadSanitizer understands them ----

namespace cuda_on_cpu {

template <class T, class Update>
T atomic_update(T* address, Update update) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  Bits* const word = reinterpret_cast<Bits*>(address);
  Bits old_bits = __atomic_load_n(word, __ATOMIC_RELAXED);
  for (;;) {
    T value;
    memcpy(&value, &old_bits, sizeof(T));
    const T updated = update(value);
    Bits new_bits;
    memcpy(&new_bits, &updated, sizeof(T));
    if (__atomic_compare_exchange_n(word, &old_bits, new_bits, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
      return value;
    }
  }
}

}  // namespace cuda_on_cpu

inline float atomicAdd(float* address, float value) {
  return cuda_on_cpu::atomic_update(address, [=](float old) { return old + value; });
}
inline double atomicAdd(double* address, double value) {
  return cuda_on_cpu::atomic_update(address, [=](double old) { return old + value; });
}
inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL); }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return __atomic_fetch_add(address, value, __ATOMIC_ACQ_REL);
}
inline int atomicMax(int* address, int value) {
  return cuda_on_cpu::atomic_update(address, [=](int old) { return old < value ? value : old; });
}
inline unsigned atomicMax(unsigned* address, unsigned value) {
  return cuda_on_cpu::atomic_update(address, [=](unsigned old) { return old < value ? value : old; });
}
template <class T>
T atomicCAS(T* address, T compare, T value) {
  __atomic_compare_exchange_n(address, &compare, value, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  return compare;
}

// ---- scalar intrinsics ----

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
// Overloads, not templates, as in CUDA.
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

inline size_t __cvta_generic_to_shared(const void* pointer, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::shared_address(pointer, site);
}
