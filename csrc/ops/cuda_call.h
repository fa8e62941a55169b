// What one call of an operator on CUDA tensors needs of device and allocator. For the host compiler.
#pragma once

#include <memory>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "common/dtype.h"
#include "cuda/common/cuda_check.h"
#include "cuda/common/options.h"
#include "cuda/common/outer_problem.h"
#include "cuda/common/stream.h"

namespace backpack_cuda::cuda {

// The test switches (operator _cuda_option).
Options& options();

// Makes the tensors' device the current one until it is destroyed.
class CudaCall {
 public:
  explicit CudaCall(const Tensor& on) : on_(on) {
    if (on.is_cpu()) return;  // the tests' build, whose kernels run on the CPU
    guard_ = std::make_unique<torch::stable::accelerator::DeviceGuard>(on.get_device_index());
    stream = current_stream(on.get_device_index());
  }

  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, on_.is_cpu() ? 0 : on_.get_device_index()),
          "device attribute");
    return value;
  }
  int sm_count() const {
    if (options().sm_count) return int(options().sm_count);
    return attribute(cudaDevAttrMultiProcessorCount);
  }

  // Scratch memory of the caching allocator. It may die before the kernels that use it have run: the
  // allocator hands it out again on the same stream only, behind them.
  Tensor workspace(int64_t bytes) const {
    return torch::stable::new_empty(on_, {bytes}, torch::headeronly::ScalarType::Byte);
  }

  cudaStream_t stream = nullptr;

 private:
  const Tensor& on_;
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
};

// float64 is left to the composite of the Python layer.
inline Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Half,
                      "the CUDA kernels take float32, bfloat16 and float16, got dtype number ",
                      int(tensor.scalar_type()));
      return Element::kFloat16;
  }
}

}  // namespace backpack_cuda::cuda
