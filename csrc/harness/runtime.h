// What kernel code compiled for the CPU may ask of the runtime. Included by every kernel, so kept light; the
// runtime's own data structures are in state.h.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace cuda_on_cpu {

// A place in the kernel source. As a last parameter, CUDA_ON_CPU_SITE takes the caller's place by default.
struct Site {
  const char* file;
  int line;
};
#define CUDA_ON_CPU_SITE ::cuda_on_cpu::Site site = {__builtin_FILE(), __builtin_LINE()}

// The part of a running CUDA thread that kernels see.
struct Thread {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
  unsigned lane;
};
extern Thread* current_thread;  // null outside kernels

// Throws std::runtime_error naming the place and, inside a kernel, the block and the thread.
[[noreturn]] void fail(const char* what, Site site);

// Shared memory of the current block: the dynamic part, and one poisoned slot per static variable.
void* dynamic_shared_memory();
void* static_shared_memory(const void* key, size_t size, size_t alignment);
// A shared address as the 32-bit number that PTX instructions take, and back. Both fail on other addresses.
uint32_t shared_address(const void* pointer, Site site);
char* shared_pointer(uint32_t address, size_t bytes, Site site);

enum class BarrierKind { kSync, kCount, kAnd, kOr };
// Waits at barrier `id` for `thread_count` threads (0: the whole block); returns the reduction of
// `predicate`.
int block_barrier(int id, unsigned thread_count, int predicate, BarrierKind kind, Site site);

// All lanes of `mask` that have not exited meet. Each brings a slot; the last to come runs body(slots,
// present lanes). An aligned operation needs all 32 lanes.
using CollectiveBody = void (*)(void** slots, uint32_t present);
void warp_collective(const char* name, uint32_t mask, bool aligned, void* slot, CollectiveBody body,
                     Site site);
void warp_barrier(uint32_t mask, Site site);  // __syncwarp: also orders memory

struct ShuffleSlot {
  uint64_t in, out;
  uint32_t source_lane;
};
void shuffle_body(void** slots, uint32_t present);
struct VoteSlot {
  bool in;
  uint32_t ballot, present;
};
void vote_body(void** slots, uint32_t present);

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context);
// Runs `kernel_call` once per thread of the grid. Returns when all are done; throws what a thread threw.
template <class KernelCall>
void launch(dim3 grid, dim3 block, size_t shared_bytes, KernelCall&& kernel_call) {
  using Call = std::remove_reference_t<KernelCall>;
  run_grid(grid, block, shared_bytes, [](void* call) { (*static_cast<Call*>(call))(); }, &kernel_call);
}

// Inline PTX, as rewrite_ptx.py leaves it: ptx("text", output("=r", x), input("l", p), ...).
struct PtxOperand {
  char constraint = 0;  // 'r', 'l', 'f', 'h', 'd' or 'n'
  bool writable = false;
  uint8_t size = 0;
  void* variable = nullptr;
  uint64_t bits = 0;
};
template <class T>
uint64_t operand_bits(const T& value) {
  static_assert(sizeof(T) <= 8);
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<uint64_t>(value);
  } else if constexpr (std::is_integral_v<T>) {
    return sizeof(T) == 8 ? uint64_t(value) : uint64_t(uint32_t(value));
  } else {
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof(T));
    return bits;
  }
}
template <class T>
PtxOperand output(const char* constraint, T& variable) {  // "=r" writes, "+r" reads and writes
  static_assert(sizeof(T) <= 8);
  const bool reads = constraint[0] == '+';
  return {constraint[1], true, uint8_t(sizeof(T)), &variable, reads ? operand_bits(variable) : ~uint64_t{0}};
}
template <class T>
PtxOperand input(const char* constraint, const T& value) {
  return {constraint[0], false, uint8_t(sizeof(T)), nullptr, operand_bits(value)};
}
struct PtxText {
  const char* text;
  Site site;
  PtxText(const char* text, CUDA_ON_CPU_SITE) : text(text), site(site) {}
};
void execute_ptx(const char* text, PtxOperand* operands, int count, Site site);
template <class... Operands>
void ptx(PtxText text, Operands... operands) {
  PtxOperand all[] = {operands..., PtxOperand{}};
  execute_ptx(text.text, all, int(sizeof...(operands)), text.site);
}

}  // namespace cuda_on_cpu
