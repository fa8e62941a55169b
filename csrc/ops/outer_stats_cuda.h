// Weight statistics on CUDA: from a problem to the kernels of the cheapest way.
#pragma once

#include "ops/cuda_call.h"

namespace backpack_cuda::cuda {

// Everything in one pass of the contraction, by the kernel of the device's architecture.
void contract_stats(const OuterProblem& problem, const StatsOutputs& out, const CudaCall& call);

// The bias of any layer.
void bias_stats(const Tensor& grad_output, int64_t channel_dim, const StatsOutputs& out,
                const CudaCall& call);

// Convolutions with few channels per group.
void depthwise_stats(const OuterProblem& problem, const StatsOutputs& out, const CudaCall& call);

}  // namespace backpack_cuda::cuda
