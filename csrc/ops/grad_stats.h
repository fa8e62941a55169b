// First-order statistics of per-sample gradients: what the operators return, on any device.
#pragma once
#include <cstdint>

namespace backpack_cuda {

// Which statistics to compute; also their order in an operator's result.
enum Want : int64_t {
  kGrad = 1,                     // sum_n G_n
  kBatchGrad = 2,                // G_n
  kBatchL2 = 4,                  // |G_n|^2
  kSumGradSquared = 8,           // sum_n G_n^2
  kSumGradCenteredSquared = 16,  // sum_n (G_n - mean G)^2
  kEveryWant = 31,
};

}  // namespace backpack_cuda
