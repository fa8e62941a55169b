#include "cuda/contract/contract.cuh"

namespace backpack_cuda::cuda {

void contract_tf32x3_rows(const ContractParams& params, ContractTile tile, bool squares,
                          cudaStream_t stream) {
  launch_contract_stats<ContractPrecision::kTf32x3, ContractLoader::kRows>(params, tile, squares, stream);
}

}  // namespace backpack_cuda::cuda
