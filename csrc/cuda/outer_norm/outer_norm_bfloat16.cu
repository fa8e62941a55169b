#include <cuda_bf16.h>

#include "cuda/outer_norm/outer_norm.cuh"

namespace backpack_cuda::cuda {

void outer_norm_bfloat16(const OuterNormParams& params, cudaStream_t stream) {
  launch_outer_norm<__nv_bfloat16>(params, stream);
}

}  // namespace backpack_cuda::cuda
