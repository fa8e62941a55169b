#include "cuda/depthwise/depthwise_kernels.h"
#include "cuda/merge/merge.h"

namespace backpack_cuda::cuda {

void launch_depthwise(const OuterProblem& problem, const StatsOutputs& outputs, const DepthwisePlan& plan,
                      void* workspace, cudaStream_t stream) {
  DepthwiseParams params = {problem, outputs, plan, nullptr, nullptr, nullptr, false, false, false};
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

  switch (problem.element) {
    case Element::kFloat32:
      depthwise_float32(params, stream);
      break;
    case Element::kBFloat16:
      depthwise_bfloat16(params, stream);
      break;
    case Element::kFloat16:
      depthwise_float16(params, stream);
      break;
  }

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

}  // namespace backpack_cuda::cuda
