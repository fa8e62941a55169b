#include "cuda/contract/contract.cuh"

namespace backpack_cuda::cuda {

void contract_tf32_elements(const ContractParams& params, ContractTile tile, bool squares,
                            cudaStream_t stream) {
  launch_contract_stats<ContractPrecision::kTf32, ContractLoader::kElements>(params, tile, squares, stream);
}

}  // namespace backpack_cuda::cuda
