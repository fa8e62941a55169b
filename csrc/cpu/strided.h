// Rows of a strided tensor, and where its runs of equally spaced rows lie.
#pragma once
#include <algorithm>
#include <vector>

#include "common/dtype.h"

namespace backpack_cuda::cpu {

// The positions of some dims of a tensor, in order; strides in elements.
struct Rows {
  std::vector<int64_t> sizes, strides;

  // Dims [begin, end) of `tensor` without those of size 1, neighbours merged where one stride serves both.
  Rows(const Tensor& tensor, int64_t begin, int64_t end) {
    for (int64_t d = begin; d < end; ++d) {
      const int64_t size = tensor.size(d), stride = tensor.stride(d);
      if (size == 1) continue;
      if (!sizes.empty() && strides.back() == size * stride) {
        sizes.back() *= size, strides.back() = stride;
      } else {
        sizes.push_back(size), strides.push_back(stride);
      }
    }
    if (sizes.empty()) sizes.push_back(1), strides.push_back(0);
  }

  int64_t count() const {
    int64_t product = 1;
    for (int64_t size : sizes) product *= size;
    return product;
  }

  // Calls run(first row, number of rows, offset of the first, stride) for every run of equally spaced rows in
  // [begin, end).
  template <class F>
  void for_runs(int64_t begin, int64_t end, const F& run) const {
    const int64_t inner = sizes.back();
    for (int64_t row = begin; row < end;) {
      const int64_t start = row % inner, length = std::min(inner - start, end - row);
      int64_t offset = start * strides.back(), outer = row / inner;
      for (size_t d = sizes.size() - 1; d-- > 0; outer /= sizes[d]) offset += outer % sizes[d] * strides[d];
      run(row, length, offset, strides.back());
      row += length;
    }
  }
};

}  // namespace backpack_cuda::cpu
