#include "cpu/result_pool.h"

#include <cstdlib>
#include <mutex>

#include <torch/csrc/stable/ops.h>

namespace backpack_cuda::cpu {
namespace {

constexpr size_t kSmallest = 128 << 10, kLargest = 16 << 20, kKept = 32 << 20;

class Pool {
 public:
  // A block of exactly `bytes`, or null.
  void* take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (size_t i = blocks_.size(); i-- > 0;) {
        if (blocks_[i].bytes != bytes) continue;
        void* const data = blocks_[i].data;
        blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
        kept_ -= bytes;
        return data;
      }
    }
    return std::aligned_alloc(4096, bytes);
  }

  // Keeps the block, in place of those that have not been asked for the longest.
  void give_back(void* data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks_.push_back({data, bytes});
    kept_ += bytes;
    while (kept_ > kKept) {
      kept_ -= blocks_.front().bytes;
      std::free(blocks_.front().data);
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> blocks_;  // oldest first
  size_t kept_ = 0;
};

// Never destroyed: tensors may die after everything else when a program ends.
Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

}  // namespace

Tensor pooled_empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  size_t bytes = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 0;
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  if (bytes < kSmallest || bytes > kLargest) return torch::stable::new_empty(like, shape, dtype);
  bytes = (bytes + 4095) & ~size_t{4095};
  void* const data = pool().take(bytes);
  STD_TORCH_CHECK(data != nullptr, "out of memory for a result of ", bytes, " bytes");
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * shape[d];
  return torch::stable::from_blob(data, shape, strides, like.device(), dtype,
                                  [bytes](void* block) { pool().give_back(block, bytes); });
}

}  // namespace backpack_cuda::cpu
