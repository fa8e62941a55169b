#include <cuda_bf16.h>

#include "cuda/depthwise/depthwise_kernels.h"

namespace backpack_cuda::cuda {

void depthwise_bfloat16(const DepthwiseParams& params, cudaStream_t stream) {
  launch_depthwise_kernel<__nv_bfloat16>(params, stream);
}

}  // namespace backpack_cuda::cuda
