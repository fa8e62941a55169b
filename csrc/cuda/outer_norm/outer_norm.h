// Launchers of the outer_norm kernel, one per element type. Asynchronous; they throw when the launch fails.
#pragma once

#include <cuda_runtime.h>

#include "ops/outer_norm.h"

namespace backpack_cuda::cuda {

void outer_norm_float32(const OuterNormParams& params, cudaStream_t stream);
void outer_norm_float64(const OuterNormParams& params, cudaStream_t stream);
void outer_norm_bfloat16(const OuterNormParams& params, cudaStream_t stream);
void outer_norm_float16(const OuterNormParams& params, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
