#include "cuda/contract/contract.cuh"

namespace backpack_cuda::cuda {

void contract_tf32_columns(const ContractParams& params, ContractLoader loader, ContractTile tile,
                           cudaStream_t stream) {
  launch_contract_columns<ContractPrecision::kTf32>(params, loader, tile, stream);
}

}  // namespace backpack_cuda::cuda
