#include "ops/outer_stats_cuda.h"

#include "cuda/contract/contract.h"
#include "cuda/contract_sm90/contract_sm90.h"
#include "cuda/cost_model.h"
#include "cuda/depthwise/depthwise.h"

namespace backpack_cuda::cuda {

void contract_stats(const OuterProblem& problem, const StatsOutputs& out, const CudaCall& call) {
  if (wants_sm90(problem, options()) && contract_sm90_applies(problem)) {
    const ContractSm90Plan plan = plan_contract_sm90(problem, out, call.sm_count(), options());
    const Tensor workspace = call.workspace(plan.workspace_bytes);
    return launch_contract_sm90(problem, out, plan, workspace.mutable_data_ptr(), call.stream);
  }
  const ContractPlan plan = plan_contract(problem, out, call.sm_count(), options());
  const Tensor workspace = call.workspace(plan.workspace_bytes);
  launch_contract(problem, out, plan, workspace.mutable_data_ptr(), call.stream);
}

void contract_columns(const OuterProblem& problem, const ColumnOutputs& columns, const CudaCall& call) {
  const ContractPlan plan = plan_contract(problem, columns, call.sm_count(), options());
  const Tensor workspace = call.workspace(plan.workspace_bytes);
  launch_contract(problem, columns, plan, workspace.mutable_data_ptr(), call.stream);
}

void depthwise_stats(const OuterProblem& problem, const StatsOutputs& out, const CudaCall& call) {
  const DepthwisePlan plan = plan_depthwise(problem, out, call.sm_count(), options());
  const Tensor workspace = call.workspace(plan.workspace_bytes);
  launch_depthwise(problem, out, plan, workspace.mutable_data_ptr(), call.stream);
}

void depthwise_columns(const OuterProblem& problem, const ColumnOutputs& columns, const CudaCall& call) {
  const DepthwisePlan plan = plan_depthwise(problem, columns, call.sm_count(), options());
  const Tensor workspace = call.workspace(plan.workspace_bytes);
  launch_depthwise(problem, columns, plan, workspace.mutable_data_ptr(), call.stream);
}

}  // namespace backpack_cuda::cuda
