// Shared memory of a block, filled before each block with 0xff bytes: NaN in every floating-point type. The
// dynamic part ends at a page without access rights, so an index too far faults; static variables get slots
// of an arena, with a gap between them that AddressSanitizer guards.
#include <sys/mman.h>

#include <stdexcept>

#include "harness/sanitizers.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kPageBytes = 4096, kSlotArenaBytes = 64 << 10, kSlotGapBytes = 64;
constexpr size_t kMaxStaticBytes = 48 << 10;  // the hardware's limit for static shared memory
// Numbers of the 32-bit window. The dynamic part keeps the low 10 bits of its host address, because swizzles
// XOR address bits.
constexpr uint32_t kDynamicWindow = 0x400, kStaticWindow = 0x80000;

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

char* map(size_t bytes, int protection) {
  void* mapping = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::runtime_error("cuda_on_cpu: no memory for shared memory");
  return static_cast<char*>(mapping);
}

uint32_t dynamic_window(const SharedMemory& shared) {
  return kDynamicWindow + uint32_t((shared.dynamic_begin - shared.mapping) & 0x3ff);
}

}  // namespace

void prepare_shared_memory(SharedMemory& shared) {
  const size_t bytes = current_launch.shared_bytes, capacity = round_up(bytes, kPageBytes);
  if (!shared.slots) shared.slots = map(kSlotArenaBytes, PROT_READ | PROT_WRITE);
  if (!shared.mapping || shared.dynamic_capacity != capacity) {
    if (shared.mapping) {
      sanitizers::unpoison(shared.mapping, shared.dynamic_capacity + 2 * kPageBytes);
      munmap(shared.mapping, shared.dynamic_capacity + 2 * kPageBytes);
    }
    shared.mapping = map(capacity + 2 * kPageBytes, PROT_NONE);
    if (capacity) mprotect(shared.mapping + kPageBytes, capacity, PROT_READ | PROT_WRITE);
    shared.dynamic_capacity = capacity;
  }
  char* const begin = shared.mapping + kPageBytes;
  sanitizers::unpoison(begin, capacity);
  if (capacity) memset(begin, 0xff, capacity);
  // Kernels that swizzle over 128-byte rows need 1024-byte alignment; those are the ones with much shared
  // memory.
  const size_t placed = round_up(bytes, bytes > kMaxStaticBytes ? 1024 : 128);
  shared.dynamic_begin = begin + capacity - placed;
  sanitizers::poison(shared.dynamic_begin + bytes, placed - bytes);
  sanitizers::unpoison(shared.slots, kSlotArenaBytes);
  memset(shared.slots, 0xff, kSlotArenaBytes);
  shared.slot_bytes_used = 0;
  shared.slot_of_key.clear();
}

void* dynamic_shared_memory() { return current_fiber().block->shared.dynamic_begin; }

void* static_shared_memory(const void* key, size_t size, size_t alignment) {
  Quiet quiet;
  SharedMemory& shared = current_fiber().block->shared;
  void*& slot = shared.slot_of_key[key];
  if (!slot) {
    const size_t begin = round_up(shared.slot_bytes_used, alignment), end = begin + size;
    shared.slot_bytes_used = round_up(end + kSlotGapBytes, 8);
    if (shared.slot_bytes_used > kMaxStaticBytes) fail("more than 48 KiB of static shared memory", {"", 0});
    sanitizers::poison(shared.slots + end, shared.slot_bytes_used - end);
    slot = shared.slots + begin;
  }
  return slot;
}

uint32_t shared_address(const void* pointer, Site site) {
  const SharedMemory& shared = current_fiber().block->shared;
  const char* const p = static_cast<const char*>(pointer);
  if (p >= shared.dynamic_begin && p < shared.dynamic_begin + current_launch.shared_bytes) {
    return dynamic_window(shared) + uint32_t(p - shared.dynamic_begin);
  }
  if (p >= shared.slots && p < shared.slots + kSlotArenaBytes)
    return kStaticWindow + uint32_t(p - shared.slots);
  fail("the address is not in the block's shared memory", site);
}

char* shared_pointer(uint32_t address, size_t bytes, Site site) {
  const SharedMemory& shared = current_fiber().block->shared;
  if (address >= kStaticWindow) {
    const size_t offset = address - kStaticWindow;
    if (offset + bytes > shared.slot_bytes_used) fail("shared-memory address out of range", site);
    return shared.slots + offset;
  }
  const int64_t offset = int64_t{address} - dynamic_window(shared);
  if (offset < 0 || offset + bytes > current_launch.shared_bytes)
    fail("shared-memory address out of range", site);
  return shared.dynamic_begin + offset;
}

}  // namespace cuda_on_cpu
