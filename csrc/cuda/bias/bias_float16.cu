#include "cuda/bias/bias_kernels.h"

namespace backpack_cuda::cuda {

void bias_float16(const BiasParams& params, cudaStream_t stream) { launch_bias_pass<__half>(params, stream); }

}  // namespace backpack_cuda::cuda
