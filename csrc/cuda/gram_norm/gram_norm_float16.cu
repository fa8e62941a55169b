#include "cuda/gram_norm/gram_norm.cuh"

namespace backpack_cuda::cuda {

void gram_norm_float16(const GramNormParams& params, const GramNormPlan& plan, void* workspace,
                       cudaStream_t stream) {
  launch_gram_norm<__half, 1>(params, plan, workspace, stream);
}

}  // namespace backpack_cuda::cuda
