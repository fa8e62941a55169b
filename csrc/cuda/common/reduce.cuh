// Sums over the threads of a warp or of a block, in a fixed order.
#pragma once

#include "cuda/common/kernel.h"

namespace backpack_cuda::cuda {

// The sum of value over the warp's lanes, in every lane. All 32 must call it.
template <class Sum>
__device__ __forceinline__ Sum sum_over_warp(Sum value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// Replaces values[v] of every thread by the sum over kThreads threads: one warp, or one whole block of more.
// All of them must call it.
template <int kThreads, int kValues, class Sum>
__device__ __forceinline__ void sum_over_threads(Sum (&values)[kValues]) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
#pragma unroll
  for (int v = 0; v < kValues; ++v) values[v] = sum_over_warp(values[v]);
  if constexpr (kThreads > 32) {
    constexpr int kWarps = kThreads / 32;
    KERNEL_SHARED(partial, Sum[kWarps][kValues]);
    __syncthreads();  // the sums of the previous call have been read
    if (threadIdx.x % 32 == 0) {
      for (int v = 0; v < kValues; ++v) partial[threadIdx.x / 32][v] = values[v];
    }
    __syncthreads();  // all partial sums are there
    for (int v = 0; v < kValues; ++v) {
      values[v] = 0;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) values[v] += partial[warp][v];
    }
  }
}

}  // namespace backpack_cuda::cuda
