// Memory for results that are allocated in Python.
#include <torch/csrc/stable/library.h>

#include "common/operator_library.h"
#include "cpu/result_pool.h"

namespace backpack_cuda::cpu {
namespace {

Tensor empty_result(const Tensor& like, std::vector<int64_t> size) {
  return pooled_empty(like, size, statistics_dtype(like));
}

}  // namespace
}  // namespace backpack_cuda::cpu

STABLE_TORCH_LIBRARY_IMPL(backpack_cuda, CPU, m) {
  m.impl("_empty_result", TORCH_BOX(&backpack_cuda::cpu::empty_result));
}
