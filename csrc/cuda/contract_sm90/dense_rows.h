// The operands as TMA takes them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/common/outer_problem.h"

namespace backpack_cuda::cuda {

// [N, T, channels], channels adjacent; strides in elements.
struct DenseRows {
  const void* data;
  int64_t N, T, channels, stride_n, stride_t;
};

// False when the problem is not one of dense rows that TMA can read.
bool find_dense_rows(const OuterProblem& problem, DenseRows* a, DenseRows* b);

// Writes the tensor map of boxes [1, kSm90SlabRows, kSm90BoxColumns], swizzled over 128 bytes. Throws when
// the driver refuses it.
void make_tensor_map(const DenseRows& rows, Element element, CUtensorMap* map);

// Whether the driver has tensor maps: null without one, or with one older than CUDA 12.
bool has_tensor_maps();

}  // namespace backpack_cuda::cuda
