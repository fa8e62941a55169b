// The weights c_n of sum_n c_n G_n, as the *_weighted_grad operators take them.
#pragma once
#include <vector>

#include "common/check.h"

namespace backpack_cuda {

// [N], on the operands' device, in the type of their statistics; any stride.
inline void check_sample_weights(const Tensor& sample_weights, const Tensor& input) {
  STD_TORCH_CHECK(sample_weights.dim() == 1 && sample_weights.size(0) == input.size(0),
                  "sample_weights must have one entry per sample of input ", shape_text(input), ", got ",
                  shape_text(sample_weights));
  STD_TORCH_CHECK(sample_weights.is_cpu() == input.is_cpu() &&
                      sample_weights.get_device_index() == input.get_device_index(),
                  "sample_weights must be on the device of input");
  STD_TORCH_CHECK(sample_weights.scalar_type() == statistics_dtype(input),
                  "sample_weights must be float64 for float64 operands and float32 for others");
}

// A copy in host memory of a tensor that is there.
template <class Acc>
std::vector<Acc> values(const Tensor& vector) {
  const Acc* const data = static_cast<const Acc*>(vector.const_data_ptr());
  std::vector<Acc> result(vector.size(0));
  for (size_t n = 0; n < result.size(); ++n) result[n] = data[int64_t(n) * vector.stride(0)];
  return result;
}

}  // namespace backpack_cuda
