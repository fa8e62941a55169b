// The runtime's data: threads as fibers, warps, blocks, and the launch they belong to. One launch runs at a
// time, on one OS thread, so all of it is plain globals.
#pragma once

#include <exception>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "harness/runtime.h"

namespace cuda_on_cpu {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kBarriers = 16;     // per block, as in hardware
constexpr unsigned kCollectives = 16;  // operations that the diverged lanes of one warp may have open

struct Block;
struct Warp;

struct AsyncCopy {
  void* destination;
  const void* source;
  uint32_t size, source_size;  // bytes; those past source_size are zero-filled
  Site site;
};
using AsyncCopies = std::vector<AsyncCopy>;

struct Fiber : Thread {
  // fibers.cpp
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  bool needs_frame = true;
  void* thread_sanitizer_fiber = nullptr;
  void* address_sanitizer_stack = nullptr;
  int quiet_depth = 0;
  // scheduler.cpp
  Warp* warp = nullptr;
  Block* block = nullptr;
  bool done = false;
  const char* waiting_for = nullptr;
  Site waiting_at = {nullptr, 0};
  int barrier_result = 0;
  // async_copies.cpp
  AsyncCopies open_copies;
  std::vector<AsyncCopies> committed_copies;
  // warpgroup_mma.cpp
  bool registers_fenced = false;  // by wgmma.fence, since accumulators were last free to change
};

struct Collective {
  bool open;
  const char* name;
  uint32_t mask, arrived;
  void* slots[kWarpSize];
  CollectiveBody body;
};

// Registers that a wgmma is working on: poisoned from its issue to the wait, when the values are written.
struct Accumulators {
  uint64_t last_wgmma;
  std::vector<float*> variables;  // [32 lanes, registers]
  std::vector<float> values;
};

struct Warp {
  uint32_t live, ready;  // lane masks: not exited; able to run
  Fiber* fibers[kWarpSize];
  Collective collectives[kCollectives];
  // Two words that ThreadSanitizer synchronises on, in turn: with one, an early release of the next phase
  // would reach a late acquire of this one and hide a race.
  int sync_words[2];
  unsigned phase;
  // warpgroup_mma.cpp
  std::map<const void*, Accumulators> in_flight;  // by the first lane's first register
  std::vector<uint64_t> open_wgmmas;
  std::vector<std::vector<uint64_t>> committed_wgmmas;
  int wgmma_sync_word;
};

struct Barrier {
  unsigned arrived, wanted;  // wanted 0: all threads of the block
  BarrierKind kind;
  int reduction;
  Site site;
  std::vector<Fiber*> waiting;
  int sync_words[2];  // as in Warp
  unsigned phase;
};

// Four warps at a wgmma.
struct WarpgroupSlot;
struct Warpgroup {
  unsigned arrived = 0;
  std::vector<Fiber*> fibers;         // [128]
  std::vector<WarpgroupSlot*> slots;  // [128]
};

// 16 bytes of a shared-memory operand of a wgmma, as they were at its issue.
struct OperandBytes {
  const char* where;
  char bytes[16];
};
struct PendingWgmma {
  std::vector<OperandBytes> operands;
  int warps_to_wait = 4;
};

// A copy by the TMA unit: performed at a random moment after its issue.
struct TensorCopy {
  struct Piece {  // 16 bytes of the box
    char* destination;
    const char* source;
    uint32_t source_size;  // bytes; those past it are zero-filled
  };
  std::vector<Piece> pieces;
  uint64_t* barrier;
  Site site;
};

struct BarrierWaiter {
  Fiber* fiber;
  uint64_t* barrier;
  unsigned parity;
};

struct SharedMemory {
  char* mapping = nullptr;  // guard page, dynamic part, guard page
  size_t dynamic_capacity = 0;
  char* dynamic_begin = nullptr;  // placed so that the dynamic part ends at the guard page
  char* slots = nullptr;          // arena of the static variables
  size_t slot_bytes_used = 0;
  std::map<const void*, void*> slot_of_key;
};

struct Block {
  std::vector<Warp> warps;
  std::vector<unsigned> priorities;  // warp numbers, the most urgent first
  Barrier barriers[kBarriers];
  unsigned live_threads, threads;
  SharedMemory shared;
  // sm_90
  std::vector<BarrierWaiter> barrier_waiters;     // memory_barriers.cpp
  std::map<uint64_t*, Fiber*> unfenced_barriers;  // initialised, but not yet visible to the TMA unit
  std::vector<TensorCopy> tensor_copies;          // tensor_copies.cpp: issued, not yet performed
  std::vector<Warpgroup> warpgroups;              // warpgroup_mma.cpp
  std::map<uint64_t, PendingWgmma> pending_wgmmas;
};

struct Launch {
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  size_t shared_bytes = 0;
  std::exception_ptr error;  // of the first thread that failed
  // For ThreadSanitizer: threads start after the scheduler's preparation, and the scheduler goes on after
  // their end. Two words, or every thread would be ordered after those that ended before it began.
  int start_word = 0, end_word = 0;
  bool sequential = false;
  std::vector<Block*> resident;
};
extern Launch current_launch;

inline Fiber& current_fiber() { return *static_cast<Fiber*>(current_thread); }

std::string place(Site site);  // "file:line"

// fibers.cpp
Fiber& pooled_fiber(size_t index);
void resume(Fiber& fiber);   // scheduler -> fiber
void switch_to_scheduler();  // fiber -> scheduler
void abandon_all_fibers();   // after an error: every fiber starts afresh

// scheduler.cpp
void seed_random(uint64_t seed);
uint64_t random_below(uint64_t bound);
template <class T>
void random_shuffle(std::vector<T>& values) {
  if (current_launch.sequential) return;
  for (size_t i = values.size(); i > 1; --i) std::swap(values[i - 1], values[random_below(i)]);
}
Fiber* pick_fiber();  // null: nobody can run
void make_ready(Fiber& fiber);
void wait_here(const char* operation, Site site);  // until another thread calls make_ready
void thread_exits(Fiber& fiber);
std::string deadlock_report();

// barriers.cpp, warp_collectives.cpp: a barrier or operation may be complete once a thread has exited
void check_barrier(Block& block, Barrier& barrier);
void check_collective(Warp& warp, Collective& collective);

// shared_memory.cpp
void prepare_shared_memory(SharedMemory& shared);

// tensor_copies.cpp
bool perform_a_tensor_copy(Block& block);  // false: none was pending

}  // namespace cuda_on_cpu
