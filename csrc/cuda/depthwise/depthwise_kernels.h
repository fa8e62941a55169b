// The kernel's instances, one file per element type.
#pragma once

#include "cuda/depthwise/depthwise.cuh"

namespace backpack_cuda::cuda {

void depthwise_float32(const DepthwiseParams& params, cudaStream_t stream);
void depthwise_bfloat16(const DepthwiseParams& params, cudaStream_t stream);
void depthwise_float16(const DepthwiseParams& params, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
