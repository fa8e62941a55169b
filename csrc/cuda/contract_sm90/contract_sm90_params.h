// Arguments of the kernel; what its host and device sides share.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace backpack_cuda::cuda {

constexpr int kSm90Tile = 128;       // rows o and columns i of a block's tile
constexpr int kSm90SlabRows = 64;    // positions per stage of the ring
constexpr int kSm90BoxColumns = 64;  // channels per copy: the 128 bytes over which shared memory is swizzled

struct ContractSm90Params {
  CUtensorMap a, b;  // [N, T, I], [N, T, O] in boxes of [1, 64, 64]
  int N, T, O, I;
  // registers
  bool centered;                     // squares are of deviations from the split's mean
  bool paired_stores;                // results are aligned for stores of two adjacent columns
  const float* weights;              // [N], or null
  float* norms;                      // [N, tiles] squared norms of the tiles, or null
  void* batch_grad;                  // [N, O, I], or null
  float* partial_sums;               // [splits, O, I], or null with the next: results are final
  float* partial_squares;            // [splits, O, I]
  void* grad;                        // [O, I], or null
  float* sum_grad_squared;           // [O, I], or null
  float* sum_grad_centered_squared;  // [O, I], or null
};

// One function per .cu file. Grid: (tiles_i, tiles_o, splits).
void contract_sm90_bfloat16(const ContractSm90Params& params, bool squares, dim3 grid, cudaStream_t stream);
void contract_sm90_float16(const ContractSm90Params& params, bool squares, dim3 grid, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
