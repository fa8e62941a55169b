#include "cuda/square_gemm/square_gemm.cuh"

namespace backpack_cuda::cuda {

void square_gemm_float16(const SquareGemmParams& params, const StatsOutputs& outputs,
                         const SquareGemmPlan& plan, void* workspace, cudaStream_t stream) {
  launch_square_gemm<__half, 1>(params, outputs, plan, workspace, stream);
}

}  // namespace backpack_cuda::cuda
