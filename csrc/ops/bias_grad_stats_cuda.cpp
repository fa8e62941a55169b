// Additive biases on CUDA.
#include "cuda/bias/bias.h"

#include "common/operator_library.h"
#include "ops/operators.h"
#include "ops/outer_problem_of.h"
#include "ops/outer_stats_cuda.h"

namespace backpack_cuda::cuda {

BiasProblem bias_problem_of(Tensor& operand, int64_t channel_dim) {
  std::vector<int64_t> positions;
  for (int64_t d = 1; d < operand.dim(); ++d) {
    if (d != channel_dim) positions.push_back(d);
  }
  MergedDims dims(operand, operand, positions);
  if (dims.sizes.size() > 3) {  // contiguous, at most two remain: before and after the channels
    operand = torch::stable::contiguous(operand);
    dims = MergedDims(operand, operand, positions);
  }
  BiasProblem problem;
  problem.element = element_of(operand);
  problem.data = operand.const_data_ptr();
  problem.N = as_int(operand.size(0), "the batch size");
  problem.O = as_int(operand.size(channel_dim), "the channels");
  problem.stride_n = operand.stride(0), problem.stride_o = operand.stride(channel_dim);
  for (int d = 0; d < 3; ++d) {
    const int from = d - (3 - int(dims.sizes.size()));
    problem.size[d] = from < 0 ? 1 : dims.sizes[from];
    problem.stride[d] = from < 0 ? 0 : dims.strides[from][0];
  }
  as_int(problem.T(), "the number of positions");
  return problem;
}

void bias_stats(const Tensor& grad_output, int64_t channel_dim, const StatsOutputs& out,
                const CudaCall& call) {
  Tensor operand = grad_output;
  const BiasProblem problem = bias_problem_of(operand, channel_dim);
  const BiasPlan plan = plan_bias(problem, out, call.sm_count(), options());
  const Tensor workspace = call.workspace(plan.workspace_bytes);
  launch_bias(problem, out, plan, workspace.mutable_data_ptr(), call.stream);
}

namespace {

void statistics(const Tensor& grad_output, int64_t channel_dim, int64_t want, const StatsTensors& bias) {
  bias_stats(grad_output, channel_dim, outputs_of(bias, want), CudaCall(grad_output));
}

}  // namespace
}  // namespace backpack_cuda::cuda

CUDA_IMPLEMENTATIONS(m) {
  m.impl("bias_grad_stats", TORCH_BOX(&backpack_cuda::bias_grad_stats<backpack_cuda::cuda::statistics>));
}
