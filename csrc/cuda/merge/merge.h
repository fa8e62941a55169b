// Second passes, shared by the kernels that split their work: partial results become results, always added
// in the same order. Asynchronous; they throw when a launch fails.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/outer_problem.h"

namespace backpack_cuda::cuda {

// out[r] = sum_c partial[r, c]
void sum_rows(const float* partial,  // [rows, columns]
              float* out,            // [rows]
              int64_t rows, int64_t columns, cudaStream_t stream);

// Sums over splits of the samples: split s holds the samples [N s / splits, N (s + 1) / splits).
struct SplitSums {
  int splits;
  int64_t N;
  int64_t count;     // elements of the parameter
  const float* sum;  // [splits, count]  sum of G_n over the split's samples
  const float*
      square;  // [splits, count]  sum of G_n^2, or of (G_n - the split's mean)^2 if `centered`; or null
  bool centered;
};

// Writes out.grad, out.sum_grad_squared and out.sum_grad_centered_squared, as far as they are wanted; the
// latter needs `centered`, with which both can be had. Merges by Chan, Golub and LeVeque (1983).
void merge_splits(const SplitSums& sums, Element element, const StatsOutputs& out, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
