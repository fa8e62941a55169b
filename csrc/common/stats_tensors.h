// The five results of one parameter.
#pragma once
#include <tuple>
#include <vector>

#include "common/dtype.h"
#include "ops/grad_stats.h"

namespace backpack_cuda {

// A result that is not wanted has shape [0].
struct StatsTensors {
  Tensor grad;                       // [*shape]
  Tensor batch_grad;                 // [N, *shape]
  Tensor batch_l2;                   // [N]
  Tensor sum_grad_squared;           // [*shape]
  Tensor sum_grad_centered_squared;  // [*shape]

  // Uninitialised results for a parameter of this shape; device and dtypes after `like`.
  StatsTensors(const Tensor& like, const std::vector<int64_t>& shape, int64_t N, int64_t want);
  void fill_zero();
};

// Operands without elements: fills what follows from them with zeros and takes it out of `weight_want`.
// Returns whether nothing is left to compute.
bool zero_if_empty(const Tensor& input, const Tensor& grad_output, StatsTensors& weight, StatsTensors& bias,
                   int64_t& weight_want);

using FiveStats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using TenStats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
FiveStats as_tuple(const StatsTensors& parameter);
TenStats as_tuple(const StatsTensors& weight, const StatsTensors& bias);

// The data of a wanted result, null for one that is not.
template <class T = void>
T* data_or_null(const Tensor& tensor, bool wanted) {
  return wanted ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

}  // namespace backpack_cuda
