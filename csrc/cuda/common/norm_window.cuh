// Per-sample sums over a block that takes the samples one after another: the warps leave their shares in
// shared memory, and only every 32 samples the block meets to add them.
#pragma once

#include "cuda/common/reduce.cuh"

namespace backpack_cuda::cuda {

template <int kMaxWarps>
struct NormWindow {
  static constexpr int kSamples = 32;
  float shares[kSamples][kMaxWarps];

  // Adds over the warp; all of its threads must call it, in order of the samples.
  __device__ __forceinline__ void add(int64_t sample, float share) {
    share = sum_over_warp(share);
    if (threadIdx.x % 32 == 0) shares[sample % kSamples][threadIdx.x / 32] = share;
  }

  // After `sample` is there: when the window is full or the samples [first, end) are over, writes its sums to
  // out[n * stride]. All threads of the block must call it.
  __device__ __forceinline__ void flush(int64_t sample, int64_t first, int64_t end, float* out,
                                        int64_t stride) {
    const int64_t taken = sample - first + 1;
    if (taken % kSamples != 0 && sample + 1 != end) return;
    const int in_window = static_cast<int>((taken - 1) % kSamples) + 1;
    __syncthreads();  // the shares of all warps are there
    const int warps = blockDim.x / 32;
    for (int s = threadIdx.x; s < in_window; s += blockDim.x) {
      const int64_t n = sample + 1 - in_window + s;
      float sum = 0;
      for (int warp = 0; warp < warps; ++warp) sum += shares[n % kSamples][warp];
      out[n * stride] = sum;
    }
    __syncthreads();  // they have been read
  }
};

}  // namespace backpack_cuda::cuda
