#include "cuda/kron_factor/kron_factor.cuh"

namespace backpack_cuda::cuda {

void kron_factor_tf32_positions(const KronJob& job, ContractTile tile, cudaStream_t stream) {
  launch_kron_tile<ContractPrecision::kTf32, ContractLoader::kPositions>(job, tile, stream);
}

}  // namespace backpack_cuda::cuda
