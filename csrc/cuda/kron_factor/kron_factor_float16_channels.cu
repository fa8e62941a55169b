#include "cuda/kron_factor/kron_factor.cuh"

namespace backpack_cuda::cuda {

void kron_factor_float16_channels(const KronJob& job, ContractTile tile, cudaStream_t stream) {
  launch_kron_tile<ContractPrecision::kFloat16, ContractLoader::kChannelsLast>(job, tile, stream);
}

}  // namespace backpack_cuda::cuda
