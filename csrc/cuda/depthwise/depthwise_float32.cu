#include <cuda_runtime.h>

#include "cuda/depthwise/depthwise_kernels.h"

namespace backpack_cuda::cuda {

void depthwise_float32(const DepthwiseParams& params, cudaStream_t stream) {
  launch_depthwise_kernel<float>(params, stream);
}

}  // namespace backpack_cuda::cuda
