#include "cuda/bias/bias_kernels.h"
#include "cuda/merge/merge.h"

namespace backpack_cuda::cuda {
namespace {

void launch_pass(const BiasProblem& problem, Element output, const StatsOutputs& outputs,
                 const BiasPass& pass, int t_splits, float* workspace, cudaStream_t stream) {
  const int64_t vector = pass.vector_positions ? 16 / element_size(problem.element) : 1;
  BiasParams params = {};
  params.problem = problem;
  params.output = output;
  params.outputs = outputs;
  params.pass = pass;
  params.samples = problem.N * t_splits;
  params.steps = problem.T() / vector;
  params.t_splits = t_splits;
  params.one_dim = problem.size[0] == 1 && problem.size[1] == 1;
  params.sums = outputs.grad || outputs.sum_grad_centered_squared;
  params.squares = outputs.squares();
  params.centered = outputs.sum_grad_centered_squared;
  if (outputs.batch_l2) params.norm = pass.unit_blocks > 1 ? workspace + pass.norm_offset : outputs.batch_l2;
  if (pass.splits > 1) {
    params.sum = workspace + pass.sum_offset;
    params.square = workspace + pass.square_offset;
  }
  switch (problem.element) {
    case Element::kFloat32:
      bias_float32(params, stream);
      break;
    case Element::kBFloat16:
      bias_bfloat16(params, stream);
      break;
    case Element::kFloat16:
      bias_float16(params, stream);
      break;
  }
  if (outputs.batch_l2 && pass.unit_blocks > 1) {
    sum_rows(params.norm, outputs.batch_l2, problem.N, pass.unit_blocks, stream);
  }
  if (pass.splits > 1 && (params.sums || params.squares)) {
    const SplitSums sums = {pass.splits,
                            problem.N,
                            problem.O,
                            params.sums ? params.sum : nullptr,
                            params.squares ? params.square : nullptr,
                            params.centered};
    merge_splits(sums, output, outputs, stream);
  }
}

void launch(const BiasProblem& given, Element output, const StatsOutputs& outputs, const BiasPlan& plan,
            void* workspace, cudaStream_t stream) {
  const BiasProblem problem = merge_positions(given);
  float* const floats = static_cast<float*>(workspace);
  if (plan.t_splits == 1) {
    launch_pass(problem, output, outputs, plan.first, 1, floats, stream);
    return;
  }
  StatsOutputs parts = {};
  parts.batch_grad = floats;  // [N, t_splits, O]
  launch_pass(problem, Element::kFloat32, parts, plan.first, plan.t_splits, floats, stream);
  launch_pass(second_problem(problem, plan.t_splits, floats), output, outputs, plan.second, 1, floats,
              stream);
}

}  // namespace

void launch_bias(const BiasProblem& problem, const StatsOutputs& outputs, const BiasPlan& plan,
                 void* workspace, cudaStream_t stream) {
  launch(problem, problem.element, outputs, plan, workspace, stream);
}

void launch_bias_sums(const BiasProblem& problem, float* sums, const BiasPlan& plan, void* workspace,
                      cudaStream_t stream) {
  StatsOutputs outputs = {};
  outputs.batch_grad = sums;
  launch(problem, Element::kFloat32, outputs, plan, workspace, stream);
}

}  // namespace backpack_cuda::cuda
