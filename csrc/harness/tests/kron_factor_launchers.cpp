// Stands in for the instantiations that a test library leaves out, to compile fewer.
#include <stdexcept>

#include "cuda/kron_factor/kron_factor_job.h"

namespace backpack_cuda::cuda {

#define LEFT_OUT(name)                                                          \
  __attribute__((weak)) void name(const KronJob&, ContractTile, cudaStream_t) { \
    throw std::runtime_error(#name " is not part of this library");             \
  }
#define ALL_LEFT_OUT(precision)                 \
  LEFT_OUT(kron_factor_##precision##_channels)  \
  LEFT_OUT(kron_factor_##precision##_positions) \
  LEFT_OUT(kron_factor_##precision##_elements)
ALL_LEFT_OUT(tf32)
ALL_LEFT_OUT(tf32x3)
ALL_LEFT_OUT(bfloat16)
ALL_LEFT_OUT(float16)

}  // namespace backpack_cuda::cuda
