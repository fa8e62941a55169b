#include "cuda/depthwise/depthwise_kernels.h"
#include "cuda/merge/merge.h"

namespace backpack_cuda::cuda {

namespace {

void launch_kernel(const DepthwiseParams& params, cudaStream_t stream) {
  switch (params.problem.element) {
    case Element::kFloat32:
      return depthwise_float32(params, stream);
    case Element::kBFloat16:
      return depthwise_bfloat16(params, stream);
    case Element::kFloat16:
      return depthwise_float16(params, stream);
  }
}

}  // namespace

void launch_depthwise(const OuterProblem& problem, const StatsOutputs& outputs, const DepthwisePlan& plan,
                      void* workspace, cudaStream_t stream) {
  DepthwiseParams params = {};
  params.problem = problem;
  params.outputs = outputs;
  params.plan = plan;
  params.units = problem.N;
  params.unit = 1;
  float* const floats = static_cast<float*>(workspace);
  const int64_t norm_columns = int64_t{plan.unit_blocks} * plan.chunk_blocks;
  if (outputs.batch_l2) params.norm = norm_columns > 1 ? floats + plan.norm_offset : outputs.batch_l2;
  params.sums = outputs.grad || outputs.sum_grad_centered_squared;
  params.squares = outputs.squares();
  params.centered = outputs.sum_grad_centered_squared;
  if (plan.splits > 1) {
    params.sum = floats + plan.sum_offset;
    params.square = floats + plan.square_offset;
  }

  launch_kernel(params, stream);

  if (outputs.batch_l2 && norm_columns > 1) {
    sum_rows(params.norm, outputs.batch_l2, problem.N, norm_columns, stream);
  }
  if (plan.splits > 1 && (params.sums || params.squares)) {
    const int64_t count = int64_t{problem.groups} * problem.O * problem.I();
    const SplitSums sums = {plan.splits,
                            problem.N,
                            count,
                            params.sums ? params.sum : nullptr,
                            params.squares ? params.square : nullptr,
                            params.centered};
    merge_splits(sums, problem.element, outputs, stream);
  }
}

void launch_depthwise(const OuterProblem& problem, const ColumnOutputs& columns, const DepthwisePlan& plan,
                      void* workspace, cudaStream_t stream) {
  DepthwiseParams params = {};
  params.problem = problem;
  params.plan = plan;
  params.columns = columns;
  params.unit = columns.batch_diag ? columns.V : 1;
  params.units = problem.N * columns.V / params.unit;
  const bool merge = plan.splits > 1 && columns.diag;
  float* const partial = static_cast<float*>(workspace) + plan.square_offset;
  params.squares = merge;
  if (merge) params.square = partial;
  launch_kernel(params, stream);
  if (merge) {
    StatsOutputs outputs = {};
    outputs.grad = columns.diag;
    const int64_t count = int64_t{problem.groups} * problem.O * problem.I();
    merge_splits({plan.splits, problem.N, count, partial, nullptr, false}, Element::kFloat32, outputs,
                 stream);
  }
}

}  // namespace backpack_cuda::cuda
