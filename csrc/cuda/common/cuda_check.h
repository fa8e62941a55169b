// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace backpack_cuda::cuda {

// The runtime linked into this library answers: no symbol of libtorch_cuda is needed, which a CPU-only torch
// lacks.
inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("backpack_cuda: ") + what + ": " + cudaGetErrorString(status));
  }
}

}  // namespace backpack_cuda::cuda
