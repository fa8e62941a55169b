// The results of one parameter.
#pragma once
#include <tuple>
#include <vector>

#include "common/dtype.h"
#include "ops/column_want.h"
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

// The same of V columns per sample.
struct ColumnTensors {
  Tensor factor;      // [V, N, *shape]
  Tensor batch_diag;  // [N, *shape]
  Tensor diag;        // [*shape]

  ColumnTensors(const Tensor& like, const std::vector<int64_t>& shape, int64_t V, int64_t N, int64_t want);
  void fill_zero();
};

// Operands without elements: fills what follows from them with zeros and takes it out of `weight_want`.
// Returns whether nothing is left to compute.
template <class Results>
bool zero_if_empty(const Tensor& input, const Tensor& grad_output, Results& weight, Results& bias,
                   int64_t& weight_want) {
  const bool no_bias = grad_output.numel() == 0, no_weight = no_bias || input.numel() == 0;
  if (no_bias) bias.fill_zero();
  if (no_weight) {
    weight.fill_zero();
    weight_want = 0;
  }
  return no_bias;
}

using FiveStats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using TenStats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using ThreeStats = std::tuple<Tensor, Tensor, Tensor>;
using SixStats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
FiveStats as_tuple(const StatsTensors& parameter);
TenStats as_tuple(const StatsTensors& weight, const StatsTensors& bias);
ThreeStats as_tuple(const ColumnTensors& parameter);
SixStats as_tuple(const ColumnTensors& weight, const ColumnTensors& bias);

// The data of a wanted result, null for one that is not.
template <class T = void>
T* data_or_null(const Tensor& tensor, bool wanted) {
  return wanted ? static_cast<T*>(tensor.mutable_data_ptr()) : nullptr;
}

}  // namespace backpack_cuda
