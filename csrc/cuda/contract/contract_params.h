// Arguments of the contract kernel: one plain struct for all instantiations, filled by contract_launch.cpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/contract/contract.h"

namespace backpack_cuda::cuda {

// An operand as a source of patches; b, and a of a Linear layer, have kernel 1. Strides in elements.
struct ContractOperand {
  const void* data;
  int64_t stride_n, stride_c, stride_group, stride[3];
  int64_t stride_t;  // of positions; only where they have a single one
  int64_t stride_v;  // of columns
  int columns;       // of one group: channels times kernel volume
  int channels;
  int size[3], kernel[3], step[3], padding[3], dilation[3];
};

struct ContractParams {
  ContractOperand a, b;
  int N, T, O, I, groups, positions[3];
  int tiles_o, tiles_i;              // per group
  int splits, t_splits;              // of the samples and of the positions
  int t_per_split;                   // a multiple of the slab's rows
  bool packed;                       // two samples per slab
  int copy_bytes;                    // of b in ContractLoader::kPositions
  bool vector_stores;                // results are aligned for stores of several adjacent columns
  bool centered;                     // squares are of deviations from the split's mean
  const float* weights;              // [N], or null
  float* norms;                      // [N, tiles] squared norms of the tiles, or null
  void* batch_grad;                  // [N, R, I], or null
  float* partial_sums;               // [splits * t_splits, R, I], or null with the rest: results are final
  float* partial_squares;            // [splits, R, I]
  void* grad;                        // [R, I], or null
  float* sum_grad_squared;           // [R, I], or null
  float* sum_grad_centered_squared;  // [R, I], or null
  // Second order (ContractMode::kColumns): the samples are the pairs (n, v), v fastest.
  int V;
  int split_unit;       // splits begin at a multiple of so many samples
  bool keep_a, keep_b;  // this operand's slabs stay in the ring for all columns of n
  int kept_slabs;       // of each n, at most kContractStages
  bool squares;         // batch_diag or diag is wanted
  const float* signs;   // [V, N], or null
  void* factor;         // [V, N, R, I], or null
  float* parts;         // [N, V, t_splits, R, I] with splits of the positions, and nothing else; or null
  float* batch_diag;    // [N, R, I], or null
  float* diag;          // [R, I], or null; splits leave parts of it in partial_sums
};

// What an instantiation keeps of the samples besides the accumulators.
enum class ContractMode : int {
  kSum,      // a tile of sums
  kSquares,  // and one of squares
  kColumns,  // second order: squares, of one n and of all
};

constexpr int kContractStages = 4;  // of the ring of slabs

// Launches an instantiation; one function per .cu file.
using ContractLauncher = void (*)(const ContractParams& params, ContractTile tile, bool squares,
                                  cudaStream_t stream);
#define CONTRACT_LAUNCHERS(precision)                                                                 \
  void contract_##precision##_rows(const ContractParams&, ContractTile, bool, cudaStream_t);          \
  void contract_##precision##_channels_last(const ContractParams&, ContractTile, bool, cudaStream_t); \
  void contract_##precision##_positions(const ContractParams&, ContractTile, bool, cudaStream_t);     \
  void contract_##precision##_elements(const ContractParams&, ContractTile, bool, cudaStream_t);
CONTRACT_LAUNCHERS(tf32)
CONTRACT_LAUNCHERS(tf32x3)
CONTRACT_LAUNCHERS(bfloat16)
CONTRACT_LAUNCHERS(float16)
#undef CONTRACT_LAUNCHERS

void contract_tf32_columns(const ContractParams&, ContractLoader, ContractTile, cudaStream_t);
void contract_tf32x3_columns(const ContractParams&, ContractLoader, ContractTile, cudaStream_t);
void contract_bfloat16_columns(const ContractParams&, ContractLoader, ContractTile, cudaStream_t);
void contract_float16_columns(const ContractParams&, ContractLoader, ContractTile, cudaStream_t);

// Second pass after splits of the positions: adds the parts of each G_n and does all that the kernel would
// have done with it. `norms` are then [N, ceil(R I / 32)].
void contract_join_parts(const ContractParams& params, Element element, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
