#include "cuda/outer_norm/outer_norm.cuh"

namespace backpack_cuda::cuda {

void outer_norm_float64(const OuterNormParams& params, cudaStream_t stream) {
  launch_outer_norm<double>(params, stream);
}

}  // namespace backpack_cuda::cuda
