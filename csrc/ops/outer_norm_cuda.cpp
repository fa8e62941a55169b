// outer_norm on CUDA. For the host compiler: no torch header reaches nvcc.
#include "common/operator_library.h"
#include "cuda/outer_norm/outer_norm.h"
#include "ops/cuda_call.h"
#include "ops/outer_norm_tensors.h"

namespace backpack_cuda {
namespace {

Tensor outer_norm_cuda(const Tensor& input, const Tensor& grad_output) {
  const cuda::CudaCall call(input);
  const OuterNormTensors tensors = prepare_outer_norm(input, grad_output);
  auto* launch = &cuda::outer_norm_float32;
  if (input.scalar_type() == ScalarType::Double) launch = &cuda::outer_norm_float64;
  if (input.scalar_type() == ScalarType::BFloat16) launch = &cuda::outer_norm_bfloat16;
  if (input.scalar_type() == ScalarType::Half) launch = &cuda::outer_norm_float16;
  launch(tensors.params, call.stream);
  return tensors.out;
}

}  // namespace
}  // namespace backpack_cuda

CUDA_IMPLEMENTATIONS(m) { m.impl("outer_norm", TORCH_BOX(&backpack_cuda::outer_norm_cuda)); }
