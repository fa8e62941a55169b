#include "cuda/gram_norm/gram_norm.cuh"

namespace backpack_cuda::cuda {

void gram_norm_bfloat16(const GramNormParams& params, const GramNormPlan& plan, void* workspace,
                        cudaStream_t stream) {
  launch_gram_norm<__nv_bfloat16, 1>(params, plan, workspace, stream);
}

}  // namespace backpack_cuda::cuda
