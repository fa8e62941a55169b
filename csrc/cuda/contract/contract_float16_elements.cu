#include "cuda/contract/contract.cuh"

namespace backpack_cuda::cuda {

void contract_float16_elements(const ContractParams& params, ContractTile tile, bool squares,
                               cudaStream_t stream) {
  launch_contract_stats<ContractPrecision::kFloat16, ContractLoader::kElements>(params, tile, squares,
                                                                                stream);
}

}  // namespace backpack_cuda::cuda
