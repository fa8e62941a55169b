// The kernels' instances, one file per element type.
#pragma once

#include "cuda/bias/bias.cuh"

namespace backpack_cuda::cuda {

void bias_float32(const BiasParams& params, cudaStream_t stream);
void bias_bfloat16(const BiasParams& params, cudaStream_t stream);
void bias_float16(const BiasParams& params, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
