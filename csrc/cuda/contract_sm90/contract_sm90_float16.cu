#include "cuda/contract_sm90/contract_sm90.cuh"

namespace backpack_cuda::cuda {

void contract_sm90_float16(const ContractSm90Params& params, bool squares, dim3 grid, cudaStream_t stream) {
  launch_contract_sm90_kernel<__half>(params, squares, grid, stream);
}

}  // namespace backpack_cuda::cuda
