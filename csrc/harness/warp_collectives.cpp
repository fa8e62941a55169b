// Operations of a warp: every lane posts a slot on its own stack and waits; the last to come does the work
// for all.
#include "harness/sanitizers.h"

namespace cuda_on_cpu {

void check_collective(Warp& warp, Collective& collective) {
  if (!collective.open) return;
  const uint32_t needed = collective.mask & warp.live;
  if ((collective.arrived & needed) != needed) return;
  collective.body(collective.slots, collective.arrived);
  collective.open = false;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if ((collective.arrived >> lane & 1) && warp.fibers[lane] != current_thread)
      make_ready(*warp.fibers[lane]);
  }
}

void warp_collective(const char* name, uint32_t mask, bool aligned, void* slot, CollectiveBody body,
                     Site site) {
  Quiet quiet;
  Fiber& fiber = current_fiber();
  Warp& warp = *fiber.warp;
  if (!(mask >> fiber.lane & 1)) {
    fail((std::string(name) + ": the calling lane is not in its own mask").c_str(), site);
  }
  if (aligned && warp.live != ~0u) {
    fail((std::string(name) + ": .aligned instruction with missing or exited lanes").c_str(), site);
  }
  Collective* mine = nullptr;
  for (auto& other : warp.collectives) {
    if (other.open && other.mask == mask && other.body == body && !strcmp(other.name, name)) mine = &other;
  }
  if (!mine) {
    for (auto& unused : warp.collectives) {
      if (!unused.open) mine = &unused;
    }
    if (!mine) fail("too many open operations in one warp", site);
    *mine = Collective{};
    mine->open = true;
    mine->name = name;
    mine->mask = mask;
    mine->body = body;
  }
  mine->slots[fiber.lane] = slot;
  mine->arrived |= 1u << fiber.lane;
  check_collective(warp, *mine);
  if (mine->open) wait_here(name, site);
}

void warp_barrier(uint32_t mask, Site site) {
  Warp& warp = *current_fiber().warp;
  int* const sync_word = &warp.sync_words[warp.phase % 2];
  int no_slot;
  sanitizers::release(sync_word);
  warp_collective(
      "syncwarp", mask, false, &no_slot, [](void**, uint32_t) { current_fiber().warp->phase++; }, site);
  sanitizers::acquire(sync_word);
}

void shuffle_body(void** slots, uint32_t present) {
  constexpr uint64_t kPoison = 0xfff8dead7fc0dead;  // NaN as float64 and, in its low half, as float32
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(present >> lane & 1)) continue;
    auto* slot = static_cast<ShuffleSlot*>(slots[lane]);
    const bool there = present >> slot->source_lane & 1;
    slot->out = there ? static_cast<ShuffleSlot*>(slots[slot->source_lane])->in : kPoison;
  }
}

void vote_body(void** slots, uint32_t present) {
  uint32_t ballot = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (present >> lane & 1) ballot |= uint32_t{static_cast<VoteSlot*>(slots[lane])->in} << lane;
  }
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(present >> lane & 1)) continue;
    auto* slot = static_cast<VoteSlot*>(slots[lane]);
    slot->ballot = ballot;
    slot->present = present;
  }
}

}  // namespace cuda_on_cpu
