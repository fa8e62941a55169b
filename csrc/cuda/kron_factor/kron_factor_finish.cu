// The second pass of kron_factor: blocks of the factors from partial tiles.
#include "cuda/common/cuda_check.h"
#include "cuda/kron_factor/kron_tables.cuh"

namespace backpack_cuda::cuda {
namespace {

constexpr int kFinishTile = 32, kFinishThreads = 256;

}  // namespace

// One entry of one product, over every job.ways-th split from `way` on. column = job.columns: the sum of the
// row instead.
__device__ __forceinline__ float sum_of_splits(const KronJob& job, const int (&segment)[3], int group,
                                               int row, int column, int way) {
  const int product = (segment[0] * job.axes[1].segments + segment[1]) * job.axes[2].segments + segment[2];
  const bool diagonal = on_the_diagonal(job, segment), row_sum = column == job.columns;
  const int tile_row = row / job.edge, tile_column = row_sum ? tile_row : column / job.edge;
  const int64_t tile =
      diagonal ? upper_tile(tile_row, tile_column) : int64_t{tile_row} * tiles_across(job) + tile_column;
  const int first = job.first_item[product], tiles = tiles_of(job, diagonal);
  const int splits = (job.first_item[product + 1] - first) / (tiles * job.groups);
  const int64_t size = int64_t{job.edge} * (job.edge + 1);
  const int64_t item = first + (int64_t{group} * tiles + tile) * splits;
  const float* const parts =
      job.partial + item * size + row % job.edge * (job.edge + 1) + (row_sum ? job.edge : column % job.edge);
  float sum = 0;
#pragma unroll 4
  for (int s = way; s < splits; s += job.ways) sum += parts[s * size];
  return sum;
}

// A way's share of the sum over all rows of x[i] x[j], i <= j, of one of the layer's groups.
__device__ __forceinline__ float entry(const KronJob& job, int layer_group, int i, int j, int way) {
  const int volume = job.layer_kernel[0] * job.layer_kernel[1] * job.layer_kernel[2];
  const int D = job.layer_channels * volume;
  if (i == D) return way == 0 ? job.count : 0;
  if (job.products == 0) return 0;
  const int group = layer_group / job.groups_per_tile;
  const bool row_sum = j == D;
  if (row_sum) j = i;
  int c[2] = {i / volume, j / volume}, k[2] = {i % volume, j % volume};
  if (!job.lags) {
    const int member = layer_group % job.groups_per_tile;
    int column[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int channel = member * job.layer_channels + c[e];
      column[e] = job.channels_inner ? k[e] * job.channels + channel : channel * volume + k[e];
    }
    const int least = min(column[0], column[1]), most = max(column[0], column[1]);
    return sum_of_splits(job, {0, 0, 0}, group, least, row_sum ? job.columns : most, way);
  }
  if (k[0] > k[1]) {  // this lag's transpose is there
    const int other_c = c[0], other_k = k[0];
    c[0] = c[1], k[0] = k[1];
    c[1] = other_c, k[1] = other_k;
  }
  int first[3], end[3];
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    const int K = job.layer_kernel[d], pair = k[0] % K * K + k[1] % K;
    first[d] = job.axes[d].first[pair];
    end[d] = job.axes[d].end[pair];
    k[0] /= K;
    k[1] /= K;
  }
  const int cells[2] = {end[1] - first[1], end[2] - first[2]};
  const int count = (end[0] - first[0]) * cells[0] * cells[1];
  float sum = 0;
  for (int cell = 0; cell < count; ++cell) {
    const int segment[3] = {first[0] + cell / cells[1] / cells[0], first[1] + cell / cells[1] % cells[0],
                            first[2] + cell % cells[1]};
    sum += sum_of_splits(job, segment, group, c[0], row_sum ? job.columns : c[1], way);
  }
  return sum;
}

// Grid (columns, rows, groups) of blocks of 32 columns; several warps share each entry's splits, and have
// fewer rows then. Blocks below the diagonal have nothing to do.
__global__ void __launch_bounds__(kFinishThreads)
    kron_factor_finish_kernel(const __grid_constant__ KronJob job) {
  KERNEL_SHARED(sums, float[kFinishTile][kFinishTile + 1]);  // [row, way][column]
  const int rows = kFinishTile / job.ways, row0 = blockIdx.y * rows, column0 = blockIdx.x * kFinishTile;
  if (row0 >= column0 + kFinishTile) return;
  const int64_t size = out_size(job);
  const int lane = threadIdx.x % kFinishTile, warp = threadIdx.x / kFinishTile;
  constexpr int kWarps = kFinishThreads / kFinishTile;
  for (int group = blockIdx.z; group < job.layer_groups; group += gridDim.z) {
    float* const out = job.out + group * size * size;
    for (int share = warp; share < kFinishTile; share += kWarps) {
      const int i = row0 + share / job.ways, j = column0 + lane;
      if (i <= j && j < size) sums[share][lane] = entry(job, group, i, j, share % job.ways);
    }
    __syncthreads();  // the sums
    for (int r = warp; r < rows; r += kWarps) {
      const int i = row0 + r, j = column0 + lane;
      if (i > j || j >= size) continue;
      float& sum = sums[r * job.ways][lane];
      for (int way = 1; way < job.ways; ++way) sum += sums[r * job.ways + way][lane];
      sum = updated(job, group, i, j, sum);
      out[i * size + j] = sum;
    }
    __syncthreads();  // the entries
    for (int e = threadIdx.x; e < rows * kFinishTile; e += kFinishThreads) {
      const int r = e % rows, c = e / rows, i = row0 + r, j = column0 + c;
      if (i < j && j < size) out[j * size + i] = sums[r * job.ways][c];
    }
    __syncthreads();  // they have been read
  }
}

void kron_factor_finish(const KronJob& job, cudaStream_t stream) {
  const int64_t size =
      int64_t{job.layer_channels} * job.layer_kernel[0] * job.layer_kernel[1] * job.layer_kernel[2] +
      job.homogeneous;
  const auto blocks = [&](int64_t entries) { return static_cast<unsigned>((size + entries - 1) / entries); };
  constexpr int kMostBlocks = 65535;  // in the second and third dim of a grid
  const dim3 grid(blocks(kFinishTile), blocks(kFinishTile / job.ways),
                  job.layer_groups < kMostBlocks ? job.layer_groups : kMostBlocks);
  KERNEL_LAUNCH(grid, dim3(kFinishThreads), 0, stream, kron_factor_finish_kernel, job);
  check(cudaGetLastError(), "kron_factor, finishing");
}

}  // namespace backpack_cuda::cuda
