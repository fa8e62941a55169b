// Stands in for the instantiations that a test library leaves out, to compile fewer.
#include <stdexcept>

#include "cuda/contract/contract_params.h"

namespace backpack_cuda::cuda {

#define LEFT_OUT(name)                                                                       \
  __attribute__((weak)) void name(const ContractParams&, ContractTile, bool, cudaStream_t) { \
    throw std::runtime_error(#name " is not part of this library");                          \
  }
#define ALL_LEFT_OUT(precision)                  \
  LEFT_OUT(contract_##precision##_rows)          \
  LEFT_OUT(contract_##precision##_channels_last) \
  LEFT_OUT(contract_##precision##_positions)     \
  LEFT_OUT(contract_##precision##_elements)
ALL_LEFT_OUT(tf32)
ALL_LEFT_OUT(tf32x3)
ALL_LEFT_OUT(bfloat16)
ALL_LEFT_OUT(float16)

#define COLUMNS_LEFT_OUT(precision)                                                                \
  __attribute__((weak)) void contract_##precision##_columns(const ContractParams&, ContractLoader, \
                                                            ContractTile, cudaStream_t) {          \
    throw std::runtime_error("contract_" #precision "_columns is not part of this library");       \
  }
COLUMNS_LEFT_OUT(tf32)
COLUMNS_LEFT_OUT(tf32x3)
COLUMNS_LEFT_OUT(bfloat16)
COLUMNS_LEFT_OUT(float16)

}  // namespace backpack_cuda::cuda
