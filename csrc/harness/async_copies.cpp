// cp.async. The destination is poisoned at the issue and written at the wait: between the two nobody may read
// it (a missing wait shows) nor write or still need it (a missing barrier before a refill shows).
#include "harness/instructions.h"
#include "harness/sanitizers.h"

namespace cuda_on_cpu {
namespace {

void perform(AsyncCopies& copies) {  // the copies of a group are unordered
  random_shuffle(copies);
  for (const AsyncCopy& copy : copies) {
    if (copy.source_size) announce_read(copy.source, copy.source_size, copy.site);
    announce_write(copy.destination, copy.size, copy.site);
    if (copy.source_size) memcpy(copy.destination, copy.source, copy.source_size);
    memset(static_cast<char*>(copy.destination) + copy.source_size, 0, copy.size - copy.source_size);
  }
  copies.clear();
}

}  // namespace

void async_copy(void* destination, const void* source, uint32_t size, uint32_t source_size, Site site) {
  Quiet quiet;
  if (uintptr_t(destination) % size) fail("cp.async: misaligned shared address", site);
  if (source_size && uintptr_t(source) % size) fail("cp.async: misaligned global address", site);
  announce_write(destination, size, site);
  memset(destination, 0xff, size);
  current_fiber().open_copies.push_back({destination, source, size, source_size, site});
}

void async_commit_group() {
  Quiet quiet;
  Fiber& fiber = current_fiber();
  fiber.committed_copies.push_back(std::move(fiber.open_copies));
  fiber.open_copies.clear();
}

void async_wait_group(unsigned pending_groups) {
  Quiet quiet;
  auto& groups = current_fiber().committed_copies;
  while (groups.size() > pending_groups) {
    perform(groups.front());
    groups.erase(groups.begin());
  }
}

void async_wait_all() {
  async_wait_group(0);
  Quiet quiet;
  perform(current_fiber().open_copies);
}

}  // namespace cuda_on_cpu
