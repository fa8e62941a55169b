// mbarrier. Its state is in its own 8 bytes, so that uninitialised, overwritten and misplaced barriers show:
// bit 0 the phase's parity, 1 to 20 pending arrivals, 21 to 40 arrivals per phase, 41 to 63 the bytes still
// to come, signed.
#include "harness/instructions_sm90.h"
#include "harness/sanitizers.h"

namespace cuda_on_cpu {
namespace {

constexpr uint64_t kInvalid = ~uint64_t{0};  // as poisoned shared memory
constexpr int64_t kMaxArrivals = (1 << 20) - 1, kMaxBytes = (1 << 20) - 1;

struct State {
  unsigned parity;
  int64_t pending, arrivals, bytes;

  explicit State(uint64_t word)
      : parity(word & 1),
        pending(word >> 1 & kMaxArrivals),
        arrivals(word >> 21 & kMaxArrivals),
        bytes(static_cast<int64_t>(word) >> 41) {}
  uint64_t word() const {
    return parity | uint64_t(pending) << 1 | uint64_t(arrivals) << 21 | uint64_t(bytes) << 41;
  }
};

// ThreadSanitizer synchronises on one byte of the barrier per parity, for the reason given at Warp.
void* sync_word(uint64_t* barrier, unsigned parity) { return reinterpret_cast<char*>(barrier) + parity; }

void check_initialised(uint64_t* barrier, Site site) {
  if (*barrier == kInvalid) fail("the mbarrier is used before mbarrier.init", site);
}

void update(Block& block, uint64_t* barrier, int64_t arriving, int64_t bytes, Site site) {
  State state(*barrier);
  if (arriving > state.pending) fail("more arrivals at the mbarrier than one phase expects", site);
  state.pending -= arriving;
  state.bytes += bytes;
  if (state.bytes > kMaxBytes || state.bytes < -kMaxBytes) fail("too many bytes for an mbarrier", site);
  if (state.pending == 0 && state.bytes == 0) {
    state.parity ^= 1;
    state.pending = state.arrivals;
    auto& waiters = block.barrier_waiters;
    for (size_t i = 0; i < waiters.size();) {
      if (waiters[i].barrier == barrier && waiters[i].parity != state.parity) {
        make_ready(*waiters[i].fiber);
        waiters[i] = waiters.back();
        waiters.pop_back();
      } else {
        ++i;
      }
    }
  }
  *barrier = state.word();
}

}  // namespace

void init_memory_barrier(uint64_t* barrier, unsigned arrivals, Site site) {
  Quiet quiet;
  if (arrivals < 1 || arrivals > kMaxArrivals) fail("mbarrier.init: arrival count out of range", site);
  announce_write(barrier, 8, site);
  State state(0);
  state.pending = state.arrivals = arrivals;
  *barrier = state.word();
  current_fiber().block->unfenced_barriers[barrier] = &current_fiber();
}

void invalidate_memory_barrier(uint64_t* barrier, Site site) {
  Quiet quiet;
  check_initialised(barrier, site);
  announce_write(barrier, 8, site);
  *barrier = kInvalid;
}

void fence_memory_barrier_init() {
  Quiet quiet;
  auto& unfenced = current_fiber().block->unfenced_barriers;
  for (auto entry = unfenced.begin(); entry != unfenced.end();) {
    entry = entry->second == &current_fiber() ? unfenced.erase(entry) : std::next(entry);
  }
}

void expect_bytes(uint64_t* barrier, int64_t bytes, Site site) {
  Quiet quiet;
  check_initialised(barrier, site);
  announce_read(barrier, 8, site);  // init must have been ordered before, the
                                    // arrivals among each other need not
  update(*current_fiber().block, barrier, 0, bytes, site);
}

void arrive(uint64_t* barrier, unsigned count, Site site) {
  Quiet quiet;
  check_initialised(barrier, site);
  announce_read(barrier, 8, site);
  sanitizers::release(sync_word(barrier, State(*barrier).parity));
  update(*current_fiber().block, barrier, count, 0, site);
}

bool wait_for_phase(uint64_t* barrier, unsigned parity, Site site) {
  Quiet quiet;
  check_initialised(barrier, site);
  announce_read(barrier, 8, site);
  Fiber& fiber = current_fiber();
  if (State(*barrier).parity == parity) {
    if (random_below(4) == 1) return false;
    fiber.block->barrier_waiters.push_back({&fiber, barrier, parity});
    wait_here("mbarrier.try_wait", site);
  }
  if (State(*barrier).parity == parity) return false;  // a whole phase has passed since this thread was woken
  sanitizers::acquire(sync_word(barrier, parity));
  return true;
}

void release_copy(uint64_t* barrier) { sanitizers::release(sync_word(barrier, State(*barrier).parity)); }

void complete_bytes(Block& block, uint64_t* barrier, int64_t bytes, Site site) {
  if (*barrier == kInvalid) fail("a copy completes at an mbarrier that is not initialised, issued", site);
  update(block, barrier, 0, -bytes, site);
}

}  // namespace cuda_on_cpu
