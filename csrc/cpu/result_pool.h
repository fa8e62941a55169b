// Memory of middle-sized results, kept for the next step.
#pragma once
#include <vector>

#include "common/dtype.h"

namespace backpack_cuda::cpu {

// An uninitialised tensor on the CPU. Results of 128 KiB to 16 MiB come from blocks that a pool keeps when
// their tensors die, up to 32 MiB in all: a training step allocates and frees the same results again and
// again, and malloc returns memory of that size to the system each time. The page faults of fresh memory cost
// more than the statistics themselves in small networks.
Tensor pooled_empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype);

}  // namespace backpack_cuda::cpu
