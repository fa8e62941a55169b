// Element types of operands and the type in which their statistics are kept.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace backpack_cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// float64 for float64, float32 for the rest.
inline ScalarType statistics_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_floating(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                      dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  name, " must be float32, float64, bfloat16 or float16, got dtype number ", int(dtype));
}

}  // namespace backpack_cuda
