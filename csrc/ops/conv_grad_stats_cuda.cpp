// Convolutions and transposed convolutions on CUDA: the way that the cost model chooses.
#include "common/operator_library.h"
#include "cuda/cost_model.h"
#include "ops/operators.h"
#include "ops/outer_problem_of.h"
#include "ops/outer_stats_cuda.h"

namespace backpack_cuda::cuda {
namespace {

void weight_stats(const Convolution& conv, const StatsOutputs& out, bool tf32, const CudaCall& call) {
  const OuterProblem problem = problem_of(conv, tf32);
  if (choose_way(problem, out, false, options()) == Way::kDepthwise) {
    depthwise_stats(problem, out, call);
  } else {
    contract_stats(problem, out, call);
  }
}

void statistics(const Convolution& conv, int64_t weight_want, int64_t bias_want, bool tf32,
                const StatsTensors& weight, const StatsTensors& bias) {
  const CudaCall call(conv.input);
  if (weight_want) weight_stats(conv, outputs_of(weight, weight_want), tf32, call);
  if (bias_want) bias_stats(conv.grad_output, 1, outputs_of(bias, bias_want), call);
}

void weighted_sum(const Convolution& conv, const Tensor& sample_weights, bool tf32,
                  const StatsTensors& weight) {
  const CudaCall call(conv.input);
  const Tensor weights = torch::stable::contiguous(sample_weights);
  weight_stats(conv, outputs_of(weight, kGrad, &weights), tf32, call);
}

}  // namespace
}  // namespace backpack_cuda::cuda

CUDA_IMPLEMENTATIONS(m) {
  m.impl("conv_grad_stats", TORCH_BOX(&backpack_cuda::conv_grad_stats<backpack_cuda::cuda::statistics>));
  m.impl("conv_transpose_grad_stats",
         TORCH_BOX(&backpack_cuda::conv_transpose_grad_stats<backpack_cuda::cuda::statistics>));
  m.impl("conv_weighted_grad",
         TORCH_BOX(&backpack_cuda::conv_weighted_grad<backpack_cuda::cuda::weighted_sum>));
  m.impl("conv_transpose_weighted_grad",
         TORCH_BOX(&backpack_cuda::conv_transpose_weighted_grad<backpack_cuda::cuda::weighted_sum>));
}
