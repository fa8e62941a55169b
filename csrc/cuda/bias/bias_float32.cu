#include "cuda/bias/bias_kernels.h"

namespace backpack_cuda::cuda {

void bias_float32(const BiasParams& params, cudaStream_t stream) { launch_bias_pass<float>(params, stream); }

}  // namespace backpack_cuda::cuda
