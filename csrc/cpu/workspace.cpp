#include "cpu/workspace.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>
#include <vector>

namespace backpack_cuda::cpu {
namespace {

struct Block {
  void* data;
  size_t bytes;
};

// Blocks in the order of a call's requests: the k-th request of the next call finds the k-th block.
struct Arena {
  std::vector<Block> blocks;
  size_t used = 0;

  ~Arena() { keep(0); }
  void keep(size_t limit) {
    size_t total = 0, kept = 0;
    for (Block& block : blocks) {
      if (total + block.bytes > limit) {
        std::free(block.data);
        continue;
      }
      total += block.bytes;
      blocks[kept++] = block;
    }
    blocks.resize(kept);
  }
};
thread_local Arena arena;

}  // namespace

Workspace::Workspace() : begin_(arena.used) {}

Workspace::~Workspace() {
  arena.used = begin_;
  if (begin_ == 0) arena.keep(kRetainedBytes);
}

void* Workspace::allocate(size_t bytes) {
  bytes = (bytes + 4095) & ~size_t{4095};
  if (arena.used == arena.blocks.size()) arena.blocks.push_back({nullptr, 0});
  Block& block = arena.blocks[arena.used++];
  if (block.bytes < bytes) {
    std::free(block.data);
    block = {std::aligned_alloc(4096, bytes), bytes};
    if (!block.data) {
      block.bytes = 0;
      throw std::bad_alloc();
    }
  }
  return block.data;
}

void advise_huge_pages(void* data, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = 2 << 20, kLargestAdvised = 512 << 20;
  if (bytes < 2 * kHugePage || bytes > kLargestAdvised) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) & ~(kHugePage - 1),
                  end = (address + bytes) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace backpack_cuda::cpu
