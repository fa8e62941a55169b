// outer_norm on the CPU.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "ops/outer_norm_tensors.h"

namespace backpack_cuda {
namespace {

// Sixteen independent sums fill the vector registers and hide the latency of the additions.
template <class Sum, class T>
Sum sum_of_squares(const T* row, int64_t count, int64_t stride) {
  constexpr int kLanes = 16;
  Sum sums[kLanes] = {};
  int64_t k = 0;
  if (stride == 1) {
    for (; k + kLanes <= count; k += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const Sum value = static_cast<Sum>(row[k + lane]);
        sums[lane] += value * value;
      }
    }
  }
  for (; k < count; ++k) {
    const Sum value = static_cast<Sum>(row[k * stride]);
    sums[k % kLanes] += value * value;
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <class T>
double norm_squared(const T* row, int64_t count, int64_t stride) {
  if constexpr (!std::is_same_v<T, double>) {
    const float sum = sum_of_squares<float>(row, count, stride);
    if (sum >= kOuterNormSmallest && sum <= kOuterNormLargest) return sum;
  }
  return sum_of_squares<double>(row, count, stride);
}

template <class T>
void outer_norm_rows(const OuterNormParams& params, int64_t begin, int64_t end) {
  using Result = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const T* const input = static_cast<const T*>(params.input);
  const T* const grad_output = static_cast<const T*>(params.grad_output);
  Result* const out = static_cast<Result*>(params.out);
  for (int64_t n = begin; n < end; ++n) {
    const double input_norm =
        norm_squared(input + n * params.input_strides[0], params.I, params.input_strides[1]);
    const double grad_output_norm = norm_squared(grad_output + n * params.grad_output_strides[0], params.O,
                                                 params.grad_output_strides[1]);
    const bool empty = params.I == 0 || params.O == 0;  // not 0 * Inf
    out[n] = empty ? Result{0} : static_cast<Result>(input_norm * grad_output_norm);
  }
}

Tensor outer_norm_cpu(const Tensor& input, const Tensor& grad_output) {
  const OuterNormTensors tensors = prepare_outer_norm(input, grad_output);
  const OuterNormParams& params = tensors.params;
  auto* rows = &outer_norm_rows<float>;
  if (input.scalar_type() == ScalarType::Double) rows = &outer_norm_rows<double>;
  if (input.scalar_type() == ScalarType::BFloat16) rows = &outer_norm_rows<torch::headeronly::BFloat16>;
  if (input.scalar_type() == ScalarType::Half) rows = &outer_norm_rows<torch::headeronly::Half>;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, params.I + params.O));
  torch::stable::parallel_for(0, params.N, grain,
                              [&](int64_t begin, int64_t end) { rows(params, begin, end); });
  return tensors.out;
}

}  // namespace
}  // namespace backpack_cuda

STABLE_TORCH_LIBRARY_IMPL(backpack_cuda, CPU, m) {
  m.impl("outer_norm", TORCH_BOX(&backpack_cuda::outer_norm_cpu));
}
