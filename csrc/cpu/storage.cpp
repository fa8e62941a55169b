#include "cpu/storage.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

namespace backpack_cuda::cpu {
namespace {

template <class To>
void convert(const float* from, int64_t count, void* to, int64_t to_offset) {
  To* out = static_cast<To*>(to) + to_offset;
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<To>(from[i]);
}

}  // namespace

Storage storage_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::Double:
      return kFloat64;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Half, "unsupported dtype");
      return kFloat16;
  }
}

template <>
Convert<float> converter<float>(Storage storage) {
  if (storage == kBFloat16) return convert<torch::headeronly::BFloat16>;
  if (storage == kFloat16) return convert<torch::headeronly::Half>;
  return nullptr;
}

template <>
Convert<double> converter<double>(Storage) {
  return nullptr;
}

}  // namespace backpack_cuda::cpu
