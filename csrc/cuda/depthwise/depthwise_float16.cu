#include <cuda_fp16.h>

#include "cuda/depthwise/depthwise_kernels.h"

namespace backpack_cuda::cuda {

void depthwise_float16(const DepthwiseParams& params, cudaStream_t stream) {
  launch_depthwise_kernel<__half>(params, stream);
}

}  // namespace backpack_cuda::cuda
