// Kernels of the second passes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/moments.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/merge/merge.h"

namespace backpack_cuda::cuda {

constexpr int kMergeThreads = 256;
constexpr int kSumRowsPerBlock = 8;  // a warp each

// A lane's share and the butterfly have a fixed order.
static __global__ void __launch_bounds__(32 * kSumRowsPerBlock)
    sum_rows_kernel(const float* __restrict__ partial,  // [rows, columns]
                    float* __restrict__ out,            // [rows]
                    int64_t rows, int64_t columns) {
  const int lane = threadIdx.x % 32;
  for (int64_t row = int64_t{blockIdx.x} * kSumRowsPerBlock + threadIdx.x / 32; row < rows;
       row += int64_t{gridDim.x} * kSumRowsPerBlock) {
    float total = 0;
#pragma unroll 4
    for (int64_t c = lane; c < columns; c += 32) total += partial[row * columns + c];
    total = sum_over_warp(total);
    if (lane == 0) out[row] = total;
  }
}

// Eight warps share 32 neighbouring elements: warp w takes the splits w, w + 8, ..., and their sums are added
// in the order of the warps.
template <class T>
__global__ void __launch_bounds__(kMergeThreads)
    merge_splits_kernel(SplitSums sums, T* __restrict__ grad,             // [count]
                        float* __restrict__ sum_grad_squared,             // [count]
                        float* __restrict__ sum_grad_centered_squared) {  // [count]
  constexpr int kWarps = kMergeThreads / 32;
  KERNEL_SHARED(totals, float[kWarps][32]);
  KERNEL_SHARED(squares, float[kWarps][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float inverse_N = 1.f / static_cast<float>(sums.N);
  for (int64_t first = int64_t{blockIdx.x} * 32; first < sums.count; first += int64_t{gridDim.x} * 32) {
    const int64_t e = first + lane;
    const bool valid = e < sums.count;
    float total = 0, square = 0;
    if (sums.sum && valid) {
#pragma unroll 4
      for (int s = warp; s < sums.splits; s += kWarps) total += sums.sum[s * sums.count + e];
    }
    totals[warp][lane] = total;
    __syncthreads();  // all totals are there
    total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += totals[w][lane];
    if (sums.square && valid) {
      const float mean = total * inverse_N;
#pragma unroll 2
      for (int s = warp; s < sums.splits; s += kWarps) {
        square += sums.square[s * sums.count + e];
        if (sums.centered) {  // the split's own deviation from the mean of all
          const float n = static_cast<float>(sums.N * (s + 1) / sums.splits - sums.N * s / sums.splits);
          const float difference = sums.sum[s * sums.count + e] / n - mean;
          square = fmaf(difference * n, difference, square);
        }
      }
    }
    squares[warp][lane] = square;
    __syncthreads();  // all squares are there, and all totals have been read
    if (warp != 0 || !valid) continue;
    if (grad) grad[e] = static_cast<T>(total);
    square = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) square += squares[w][lane];
    if (sum_grad_centered_squared) sum_grad_centered_squared[e] = square;
    if (sum_grad_squared) {
      sum_grad_squared[e] = sums.centered ? uncentered(square, total, inverse_N) : square;
    }
  }
}

}  // namespace backpack_cuda::cuda
