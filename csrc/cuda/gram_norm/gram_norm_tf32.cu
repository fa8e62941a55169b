#include "cuda/gram_norm/gram_norm.cuh"

namespace backpack_cuda::cuda {

void gram_norm_tf32(const GramNormParams& params, const GramNormPlan& plan, void* workspace,
                    cudaStream_t stream) {
  launch_gram_norm<float, 1>(params, plan, workspace, stream);
}

}  // namespace backpack_cuda::cuda
