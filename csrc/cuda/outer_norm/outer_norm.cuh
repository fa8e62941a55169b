// The outer_norm kernel. A warp works on a short pair of rows, a block on a long one; both read 16 bytes per
// thread and load where the elements of a row are adjacent.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/cuda_check.h"
#include "cuda/common/reduce.cuh"
#include "cuda/outer_norm/outer_norm.h"

namespace backpack_cuda::cuda {

constexpr int kOuterNormThreads = 256;            // per block
constexpr int kOuterNormWarpRowBytes = 4096;      // longest row for one warp: 8 loads per thread
constexpr int64_t kOuterNormMaxBlocks = 1 << 16;  // more samples than these hold: blocks take several

template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <class Sum, class T>
__device__ __forceinline__ Sum square(T value) {
  if constexpr (std::is_same_v<T, double>) {
    return value * value;
  } else {
    const Sum x = static_cast<Sum>(static_cast<float>(value));
    return x * x;
  }
}

// This thread's share of the sum over a row.
template <class Sum, int kThreads, class T>
__device__ __forceinline__ Sum sum_of_squares(const T* row,  // [count]
                                              int64_t count, int64_t stride, int thread) {
  constexpr int kPack = Pack<T>::kSize;
  constexpr int kSums = kPack < 4 ? kPack : 4;  // independent additions
  // Loads in flight. The second look at a row, for its range, is rare and must not cost registers.
  [[maybe_unused]] constexpr int kUnroll = std::is_same_v<Sum, double> && !std::is_same_v<T, double> ? 1 : 4;
  static_assert(kPack <= kThreads);
  Sum sums[kSums] = {};
  if (stride == 1) {
    // Up to the first address that 16 divides, then whole packs, then the rest.
    const int64_t to_boundary = (16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T);
    const int64_t head = to_boundary < count ? to_boundary : count;
    const int64_t packs = (count - head) / kPack;
    const Pack<T>* const body = reinterpret_cast<const Pack<T>*>(row + head);
    if (thread < head) sums[0] += square<Sum>(row[thread]);
#pragma unroll kUnroll
    for (int64_t p = thread; p < packs; p += kThreads) {
      const Pack<T> pack = body[p];
#pragma unroll
      for (int k = 0; k < kPack; ++k) sums[k % kSums] += square<Sum>(pack.values[k]);
    }
    const int64_t tail = head + packs * kPack + thread;
    if (tail < count) sums[0] += square<Sum>(row[tail]);
  } else {
#pragma unroll kUnroll
    for (int64_t k = thread; k < count; k += kThreads) sums[0] += square<Sum>(row[k * stride]);
  }
  Sum total = sums[0];
#pragma unroll
  for (int s = 1; s < kSums; ++s) total += sums[s];
  return total;
}

// norms = |input_n|^2, |grad_output_n|^2, in every thread.
template <class T, int kThreads, class Sum>
__device__ __forceinline__ void row_norms(const OuterNormParams& params, int64_t n, int thread,
                                          Sum (&norms)[2]) {
  norms[0] = sum_of_squares<Sum, kThreads>(static_cast<const T*>(params.input) + n * params.input_strides[0],
                                           params.I, params.input_strides[1], thread);
  norms[1] = sum_of_squares<Sum, kThreads>(
      static_cast<const T*>(params.grad_output) + n * params.grad_output_strides[0], params.O,
      params.grad_output_strides[1], thread);
  sum_over_threads<kThreads>(norms);
}

__device__ __forceinline__ bool in_range(float norm) {
  return norm >= kOuterNormSmallest && norm <= kOuterNormLargest;
}

// kThreads per sample: a warp or the whole block.
template <class T, int kThreads>
__global__ void __launch_bounds__(kOuterNormThreads) outer_norm_kernel(OuterNormParams params) {
  using Result = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr int kSamples = kOuterNormThreads / kThreads;  // per block
  const int thread = threadIdx.x % kThreads;
  const int64_t first = int64_t{blockIdx.x} * kSamples + threadIdx.x / kThreads;
  for (int64_t n = first; n < params.N; n += int64_t{gridDim.x} * kSamples) {
    Result norms[2];
    row_norms<T, kThreads>(params, n, thread, norms);
    double product = static_cast<double>(norms[0]) * norms[1];
    if constexpr (!std::is_same_v<T, double>) {
      if (!in_range(norms[0]) || !in_range(norms[1])) {  // rare; the same for all threads of the sample
        double wide_norms[2];
        row_norms<T, kThreads>(params, n, thread, wide_norms);
        product = wide_norms[0] * wide_norms[1];
      }
    }
    if (params.I == 0 || params.O == 0) product = 0;  // not 0 * Inf
    if (thread == 0) static_cast<Result*>(params.out)[n] = static_cast<Result>(product);
  }
}

template <class T>
void launch_outer_norm(const OuterNormParams& params, cudaStream_t stream) {
  if (params.N == 0) return;
  const int64_t longest = params.I > params.O ? params.I : params.O;
  const bool warp_per_sample = longest * int64_t{sizeof(T)} <= kOuterNormWarpRowBytes;
  const int64_t samples_per_block = warp_per_sample ? kOuterNormThreads / 32 : 1;
  const int64_t wanted_blocks = (params.N + samples_per_block - 1) / samples_per_block;
  const int64_t blocks = wanted_blocks < kOuterNormMaxBlocks ? wanted_blocks : kOuterNormMaxBlocks;
  auto* const kernel = warp_per_sample ? &outer_norm_kernel<T, 32> : &outer_norm_kernel<T, kOuterNormThreads>;
  KERNEL_LAUNCH(dim3(static_cast<unsigned>(blocks)), dim3(kOuterNormThreads), 0, stream, kernel, params);
  check(cudaGetLastError(), "outer_norm");
}

}  // namespace backpack_cuda::cuda
