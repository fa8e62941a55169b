// Sums of squared deviations, one sample at a time or merged from parts.
#pragma once

#include "cuda/common/kernel.h"

namespace backpack_cuda::cuda {

// What turns the (count + 1)-th sample into an update; the same for all elements.
struct SampleWeights {
  float inverse;  // 1 / count, 0 for the first sample
  float share;    // count / (count + 1)
  __device__ __forceinline__ explicit SampleWeights(int count)
      : inverse(count ? 1.f / static_cast<float>(count) : 0.f),
        share(static_cast<float>(count) / static_cast<float>(count + 1)) {}
};

// Adds g to the sum and to the sum of squared deviations from the mean (Welford, 1962). Kept as a sum, so
// that the ordinary gradient comes out without a further rounding.
__device__ __forceinline__ void add_centered(float g, const SampleWeights& weights, float& sum,
                                             float& square) {
  const float difference = fmaf(-sum, weights.inverse, g);
  square = fmaf(difference * weights.share, difference, square);
  sum += g;
}

// sum_n G_n^2 from the centered sum. Infinite samples leave a centered sum of NaN, but not a sum of squares.
__device__ __forceinline__ float uncentered(float centered, float sum, float inverse_count) {
  const float square = fmaf(sum * inverse_count, sum, centered);
  return square != square && sum == sum ? sum * sum : square;
}

}  // namespace backpack_cuda::cuda
