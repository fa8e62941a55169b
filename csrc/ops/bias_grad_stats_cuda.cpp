// Additive biases on CUDA: checks, then the kernel of csrc/cuda/bias.
#include "cuda/bias/bias.h"

#include "common/check.h"
#include "common/operator_library.h"
#include "common/stats_tensors.h"
#include "ops/outer_problem_of.h"
#include "ops/outer_stats_cuda.h"

namespace backpack_cuda::cuda {

void bias_stats(const Tensor& grad_output, int64_t channel_dim, const StatsOutputs& out,
                const CudaCall& call) {
  std::vector<int64_t> positions;
  for (int64_t d = 1; d < grad_output.dim(); ++d) {
    if (d != channel_dim) positions.push_back(d);
  }
  Tensor operand = grad_output;
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
  const BiasPlan plan = plan_bias(problem, out, call.sm_count(), options());
  const Tensor workspace = call.workspace(plan.workspace_bytes);
  launch_bias(problem, out, plan, workspace.mutable_data_ptr(), call.stream);
}

namespace {

FiveStats bias_grad_stats(const Tensor& grad_output, int64_t channel_dim, int64_t want) {
  channel_dim = check_bias_operand(grad_output, channel_dim, want);
  const CudaCall call(grad_output);
  StatsTensors bias(grad_output, {grad_output.size(channel_dim)}, grad_output.size(0), want);
  if (grad_output.numel() == 0) {
    bias.fill_zero();
  } else if (want) {
    bias_stats(grad_output, channel_dim, outputs_of(bias, want), call);
  }
  return as_tuple(bias);
}

}  // namespace
}  // namespace backpack_cuda::cuda

CUDA_IMPLEMENTATIONS(m) { m.impl("bias_grad_stats", TORCH_BOX(&backpack_cuda::cuda::bias_grad_stats)); }
