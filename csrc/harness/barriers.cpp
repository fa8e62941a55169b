// Barriers of a block: __syncthreads and its reductions, bar.sync with a number and a thread count.
#include "harness/sanitizers.h"

namespace cuda_on_cpu {

void check_barrier(Block& block, Barrier& barrier) {
  if (!barrier.arrived) return;
  if (barrier.arrived < (barrier.wanted ? barrier.wanted : block.live_threads)) return;
  if (!barrier.wanted && block.live_threads < block.threads) {
    fail("some threads of the block had exited before this barrier", barrier.site);
  }
  for (Fiber* fiber : barrier.waiting) {
    fiber->barrier_result = barrier.reduction;
    make_ready(*fiber);
  }
  barrier.waiting.clear();
  barrier.arrived = 0;
  barrier.phase++;
  random_shuffle(block.priorities);
}

int block_barrier(int id, unsigned thread_count, int predicate, BarrierKind kind, Site site) {
  Quiet quiet;
  Fiber& fiber = current_fiber();
  if (id < 0 || id >= int(kBarriers)) fail("barrier number out of range", site);
  if (thread_count % kWarpSize) fail("the thread count of a barrier must be a multiple of 32", site);
  Barrier& barrier = fiber.block->barriers[id];
  int* const sync_word = &barrier.sync_words[barrier.phase % 2];
  sanitizers::release(sync_word);
  if (!barrier.arrived) {
    barrier.wanted = thread_count;
    barrier.kind = kind;
    barrier.reduction = kind == BarrierKind::kAnd ? 1 : 0;
    barrier.site = site;
  } else if (barrier.site.line != site.line || strcmp(barrier.site.file, site.file) != 0) {
    fail(("divergent barrier: other threads wait at " + place(barrier.site)).c_str(), site);
  }
  switch (kind) {
    case BarrierKind::kSync:
      break;
    case BarrierKind::kCount:
      barrier.reduction += predicate != 0;
      break;
    case BarrierKind::kAnd:
      barrier.reduction = barrier.reduction && predicate;
      break;
    case BarrierKind::kOr:
      barrier.reduction = barrier.reduction || predicate;
      break;
  }
  barrier.arrived++;
  barrier.waiting.push_back(&fiber);
  fiber.waiting_for = "barrier";
  fiber.waiting_at = site;
  fiber.warp->ready &= ~(1u << fiber.lane);
  check_barrier(*fiber.block, barrier);
  switch_to_scheduler();
  sanitizers::acquire(sync_word);
  return fiber.barrier_result;
}

}  // namespace cuda_on_cpu
