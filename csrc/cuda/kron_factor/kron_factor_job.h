// Arguments of the kron_factor kernels: one plain struct, filled by kron_factor_launch.cpp.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kron_factor/kron_factor.h"

namespace backpack_cuda::cuda {

struct KronJob {
  // The input, strides in elements.
  const void* data;
  int64_t stride_n, stride_c, stride[3];
  int64_t N;
  int size[3], step[3], dilation[3];
  // The products. With lags their columns are the channels alone: kernel is 1.
  bool lags;
  bool channels_inner;  // columns in the order (k, c) instead of (c, k)
  bool whole_copies;    // kPositions: 16 bytes of adjacent positions, kernel 1
  int kernel[3];
  int groups, columns, channels;  // as the plan puts them together; channels of one such group
  int total_channels;             // of the input: the last group may have fewer
  KronAxis axes[3];
  int edge;        // of the tiles
  float* partial;  // [items, edge, edge + 1]: tiles, each with a column of its rows' sums; or null
  int ways;        // in which the second pass shares the splits of an entry out: a power of two up to 32
  // The layer's factors.
  float* out;  // [layer_groups, D', D']
  int layer_groups, groups_per_tile;
  int layer_channels, layer_kernel[3];  // of one group
  bool homogeneous;
  float scale, decay;
  float count;  // of the rows, what the homogeneous column has for itself
  int products;
  int first_item[kKronProducts + 1];
};
static_assert(sizeof(KronJob) <= 4096, "arguments of a kernel");

// Launches an instantiation; one function per .cu file.
using KronLauncher = void (*)(const KronJob& job, ContractTile tile, cudaStream_t stream);
#define KRON_LAUNCHERS(precision)                                                       \
  void kron_factor_##precision##_channels(const KronJob&, ContractTile, cudaStream_t);  \
  void kron_factor_##precision##_positions(const KronJob&, ContractTile, cudaStream_t); \
  void kron_factor_##precision##_elements(const KronJob&, ContractTile, cudaStream_t);
KRON_LAUNCHERS(tf32)
KRON_LAUNCHERS(tf32x3)
KRON_LAUNCHERS(bfloat16)
KRON_LAUNCHERS(float16)
#undef KRON_LAUNCHERS

// Second pass: adds the partial tiles in a fixed order and writes `out`.
void kron_factor_finish(const KronJob& job, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
