#include "cuda/contract/contract.cuh"

namespace backpack_cuda::cuda {

void contract_bfloat16_positions(const ContractParams& params, ContractTile tile, bool squares,
                                 cudaStream_t stream) {
  launch_contract_stats<ContractPrecision::kBFloat16, ContractLoader::kPositions>(params, tile, squares,
                                                                                  stream);
}

}  // namespace backpack_cuda::cuda
