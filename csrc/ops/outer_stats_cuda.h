// Weight statistics on CUDA: from a problem to the kernels of the cheapest way.
#pragma once

#include "cuda/bias/bias.h"
#include "ops/cuda_call.h"

namespace backpack_cuda::cuda {

// Everything in one pass of the contraction, by the kernel of the device's architecture.
void contract_stats(const OuterProblem& problem, const StatsOutputs& out, const CudaCall& call);

void contract_columns(const OuterProblem& problem, const ColumnOutputs& columns, const CudaCall& call);

// The operand of a bias; may replace it by a copy, which must live as long as the problem.
BiasProblem bias_problem_of(Tensor& operand, int64_t channel_dim);

// The bias of any layer.
void bias_stats(const Tensor& grad_output, int64_t channel_dim, const StatsOutputs& out,
                const CudaCall& call);

// Convolutions with few channels per group.
void depthwise_columns(const OuterProblem& problem, const ColumnOutputs& columns, const CudaCall& call);
void depthwise_stats(const OuterProblem& problem, const StatsOutputs& out, const CudaCall& call);

}  // namespace backpack_cuda::cuda
