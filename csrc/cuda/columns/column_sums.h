// Second-order statistics of per-sample gradients G_vn that are in memory, or a few parts of each: the last
// pass where a kernel cannot keep all columns of a sample to itself. Bound by the one read of them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/outer_problem.h"

namespace backpack_cuda::cuda {

struct GradientsInMemory {
  Element element;
  const void* data;  // [V, N, count, parts]; G_vn sums the parts
  int64_t N, count;
  int parts;
  int64_t stride_v, stride_n, stride_element, stride_part;  // in elements, any
};

struct ColumnSumsPlan {
  int warps;                 // of a block, which share the columns of 32 elements
  int splits;                // of the samples n
  int64_t workspace_floats;  // at most 64 per thread that fits on the chip
};

ColumnSumsPlan plan_column_sums(int64_t N, const ColumnOutputs& columns, int64_t count, int sm_count);

// `output`: the element type of columns.factor. Of `columns`, V, the signs and the results matter.
void launch_column_sums(const GradientsInMemory& gradients, const ColumnOutputs& columns, Element output,
                        const ColumnSumsPlan& plan, float* workspace, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
