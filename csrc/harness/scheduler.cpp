// Which thread runs next. Warps of a block have strict random priorities, reshuffled at every barrier and now
// and then in between: that drives warps far apart and shows missing barriers, where a uniform choice would
// let all warps advance together.
#include "harness/sanitizers.h"

namespace cuda_on_cpu {
namespace {

uint64_t random_state = 1;
uint64_t picks_per_copy = 1;  // mean number of steps until a pending tensor copy is performed

uint64_t random_number() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

}  // namespace

void seed_random(uint64_t seed) {
  random_state = 0x9e3779b97f4a7c15ull * (2 * seed + 1);
  picks_per_copy = 8192;
}

uint64_t random_below(uint64_t bound) { return current_launch.sequential ? 0 : random_number() % bound; }

namespace {

Fiber* pick_ready_fiber() {
  const size_t blocks = current_launch.resident.size(), first = random_below(blocks);
  for (size_t b = 0; b < blocks; ++b) {
    Block& block = *current_launch.resident[(first + b) % blocks];
    auto& priorities = block.priorities;
    if (random_below(64) == 1) std::swap(priorities[0], priorities[random_below(priorities.size())]);
    for (unsigned warp_number : priorities) {
      Warp& warp = block.warps[warp_number];
      uint32_t ready = warp.ready;
      if (!ready) continue;
      for (uint64_t skip = random_below(__builtin_popcount(ready)); skip; --skip) ready &= ready - 1;
      return warp.fibers[__builtin_ctz(ready)];
    }
  }
  return nullptr;
}

bool copies_are_pending() {
  for (const Block* block : current_launch.resident) {
    if (!block->tensor_copies.empty()) return true;
  }
  return false;
}

// Most copies come late, some soon: either may show an error.
void perform_any_tensor_copy() {
  const size_t blocks = current_launch.resident.size(), first = random_below(blocks);
  for (size_t b = 0; b < blocks; ++b) {
    if (!perform_a_tensor_copy(*current_launch.resident[(first + b) % blocks])) continue;
    picks_per_copy = random_below(4) == 1 ? 16 : 8192;
    return;
  }
}

}  // namespace

Fiber* pick_fiber() {
  if (copies_are_pending() && random_below(picks_per_copy) == 1) perform_any_tensor_copy();
  for (;;) {
    if (Fiber* const fiber = pick_ready_fiber()) return fiber;
    if (!copies_are_pending()) return nullptr;
    perform_any_tensor_copy();
  }
}

void make_ready(Fiber& fiber) {
  fiber.warp->ready |= 1u << fiber.lane;
  fiber.waiting_for = nullptr;
}

void wait_here(const char* operation, Site site) {
  Fiber& fiber = current_fiber();
  fiber.waiting_for = operation;
  fiber.waiting_at = site;
  fiber.warp->ready &= ~(1u << fiber.lane);
  switch_to_scheduler();
}

void thread_exits(Fiber& fiber) {
  fiber.done = true;
  if (!fiber.warp->in_flight.empty() && !current_launch.error) {
    fail("a thread exited without waiting for its wgmma instructions", fiber.waiting_at);
  }
  fiber.open_copies.clear();
  fiber.committed_copies.clear();
  fiber.warp->ready &= ~(1u << fiber.lane);
  fiber.warp->live &= ~(1u << fiber.lane);
  fiber.block->live_threads--;
  if (current_launch.error) return;
  for (auto& collective : fiber.warp->collectives) check_collective(*fiber.warp, collective);
  for (auto& barrier : fiber.block->barriers) check_barrier(*fiber.block, barrier);
}

std::string deadlock_report() {
  std::map<std::string, int> threads_at;
  for (Block* block : current_launch.resident) {
    for (Warp& warp : block->warps) {
      for (Fiber* fiber : warp.fibers) {
        if (fiber && !fiber->done) {
          threads_at[std::string(fiber->waiting_for) + " at " + place(fiber->waiting_at)]++;
        }
      }
    }
  }
  std::string report = "cuda_on_cpu: deadlock:";
  for (auto& [operation, threads] : threads_at) {
    report += " " + std::to_string(threads) + " threads in " + operation + ";";
  }
  return report;
}

}  // namespace cuda_on_cpu
