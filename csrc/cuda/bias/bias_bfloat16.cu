#include "cuda/bias/bias_kernels.h"

namespace backpack_cuda::cuda {

void bias_bfloat16(const BiasParams& params, cudaStream_t stream) {
  launch_bias_pass<__nv_bfloat16>(params, stream);
}

}  // namespace backpack_cuda::cuda
