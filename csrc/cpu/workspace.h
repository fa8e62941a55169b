// Scratch memory of one operator call.
#pragma once
#include <cstddef>
#include <cstdint>

namespace backpack_cuda::cpu {

// Hands out blocks that stay valid until the Workspace is destroyed; Workspaces of a thread nest. The thread
// keeps up to kRetainedBytes of them for its next call: fresh pages for every call cost 5 to 10 % of a small
// network's step.
class Workspace {
 public:
  static constexpr size_t kRetainedBytes = 16 << 20;

  Workspace();
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Uninitialised, aligned to 64 bytes.
  template <class T>
  T* get(int64_t count) {
    return static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  void* allocate(size_t bytes);

  size_t begin_;  // blocks in use outside
};

// Asks for huge pages for a large block that was not touched yet: page faults otherwise dominate the writing
// of large outputs. Not for blocks above 512 MiB: the system looks for that many free huge pages in memory
// that it has not used for long, and a virtual machine then has to get it from its host, page by page; small
// pages come from what was freed last.
void advise_huge_pages(void* data, size_t bytes);

}  // namespace backpack_cuda::cpu
