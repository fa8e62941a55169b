#include "cuda/gram_norm/gram_norm.h"

namespace backpack_cuda::cuda {

void launch_gram_norm(const GramNormParams& params, const GramNormPlan& plan, void* workspace,
                      cudaStream_t stream) {
  switch (params.element) {
    case Element::kBFloat16:
      return gram_norm_bfloat16(params, plan, workspace, stream);
    case Element::kFloat16:
      return gram_norm_float16(params, plan, workspace, stream);
    case Element::kFloat32:
      return params.tf32 ? gram_norm_tf32(params, plan, workspace, stream)
                         : gram_norm_tf32x3(params, plan, workspace, stream);
  }
}

}  // namespace backpack_cuda::cuda
