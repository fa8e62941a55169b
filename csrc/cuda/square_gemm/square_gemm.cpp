#include "cuda/square_gemm/square_gemm.h"

namespace backpack_cuda::cuda {

void launch_square_gemm(const SquareGemmParams& params, const StatsOutputs& outputs,
                        const SquareGemmPlan& plan, void* workspace, cudaStream_t stream) {
  switch (params.element) {
    case Element::kBFloat16:
      return square_gemm_bfloat16(params, outputs, plan, workspace, stream);
    case Element::kFloat16:
      return square_gemm_float16(params, outputs, plan, workspace, stream);
    case Element::kFloat32:
      return params.tf32 ? square_gemm_tf32(params, outputs, plan, workspace, stream)
                         : square_gemm_tf32x3(params, outputs, plan, workspace, stream);
  }
}

}  // namespace backpack_cuda::cuda
