#include <cuda_fp16.h>

#include "cuda/outer_norm/outer_norm.cuh"

namespace backpack_cuda::cuda {

void outer_norm_float16(const OuterNormParams& params, cudaStream_t stream) {
  launch_outer_norm<__half>(params, stream);
}

}  // namespace backpack_cuda::cuda
