// Statistics of the per-sample gradients G_vn of V output gradients per sample: what the column operators
// return, on any device.
#pragma once
#include <cstdint>

namespace backpack_cuda {

// Which statistics to compute; also their order in an operator's result.
enum ColumnWant : int64_t {
  kFactor = 1,     // G_vn
  kBatchDiag = 2,  // sum_v signs[v, n] G_vn^2
  kDiag = 4,       // sum_vn signs[v, n] G_vn^2
  kEveryColumnWant = 7,
};

}  // namespace backpack_cuda
