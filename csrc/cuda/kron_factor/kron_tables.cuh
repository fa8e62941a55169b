// Where results lie: tiles on or above the diagonal, columns of the products, entries of the factors.
#pragma once

#include "cuda/common/kernel.h"
#include "cuda/kron_factor/kron_factor_job.h"

namespace backpack_cuda::cuda {

// Tile (row, column), row <= column, of the upper triangle: column by column.
__device__ __forceinline__ int64_t upper_tile(int64_t row, int64_t column) {
  return column * (column + 1) / 2 + row;
}

__device__ __forceinline__ int column_of_upper_tile(int tile) {
  int column = static_cast<int>((sqrtf(8.f * static_cast<float>(tile) + 1.f) - 1.f) / 2.f);
  while (upper_tile(0, column) > tile) --column;  // float has 24 bits
  while (upper_tile(0, column + 1) <= tile) ++column;
  return column;
}

// Tiles of one product and group. segment: its number in each dim.
__device__ __forceinline__ bool on_the_diagonal(const KronJob& job, const int (&segment)[3]) {
  return job.axes[0].lag[segment[0]] == 0 && job.axes[1].lag[segment[1]] == 0 &&
         job.axes[2].lag[segment[2]] == 0;
}
__device__ __forceinline__ int tiles_across(const KronJob& job) {
  return (job.columns + job.edge - 1) / job.edge;
}
__device__ __forceinline__ int tiles_of(const KronJob& job, bool diagonal) {
  const int across = tiles_across(job);
  return diagonal ? across * (across + 1) / 2 : across * across;
}

// Rows of a factor, D'.
__device__ __forceinline__ int64_t out_size(const KronJob& job) {
  return int64_t{job.layer_channels} * job.layer_kernel[0] * job.layer_kernel[1] * job.layer_kernel[2] +
         job.homogeneous;
}

// The new value of entry (i, j) and (j, i), i <= j, of which that above the diagonal is read.
__device__ __forceinline__ float updated(const KronJob& job, int group, int64_t i, int64_t j, float sum) {
  const int64_t size = out_size(job);
  const float value = job.scale * sum;
  return job.decay == 0 ? value : fmaf(job.decay, job.out[(group * size + i) * size + j], value);
}

}  // namespace backpack_cuda::cuda
