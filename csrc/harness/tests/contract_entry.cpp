// C entry points through which tests plan and run the contract kernel.
#include <algorithm>
#include <cstring>
#include <memory>

#include "cuda/contract/contract.h"
#include "harness/guarded_call.h"

using namespace backpack_cuda::cuda;

// The plan's choices; those that Python's PLAN names, in its order.
static ContractPlan plan_into(const OuterProblem& problem, const StatsOutputs& outputs, int sm_count,
                              const Options& options, int64_t* chosen) {
  const ContractPlan plan = plan_contract(problem, outputs, sm_count, options);
  const int64_t choices[] = {int64_t(plan.loader), int64_t(plan.tile), plan.splits,     plan.t_splits,
                             plan.packed,          plan.squares,       plan.copy_bytes, plan.workspace_bytes};
  std::copy(std::begin(choices), std::end(choices), chosen);
  return plan;
}

extern "C" int run_contract_plan(const OuterProblem* problem, const StatsOutputs* outputs, int sm_count,
                                 const Options* options, int64_t* chosen) {
  return cuda_on_cpu::guarded([&] { plan_into(*problem, *outputs, sm_count, *options, chosen); });
}

// With a workspace of just the planned size, full of NaN.
extern "C" int run_contract(const OuterProblem* problem, const StatsOutputs* outputs, int sm_count,
                            const Options* options, int64_t* chosen) {
  return cuda_on_cpu::guarded([&] {
    const ContractPlan plan = plan_into(*problem, *outputs, sm_count, *options, chosen);
    const std::unique_ptr<char[]> workspace(new char[plan.workspace_bytes]);
    memset(workspace.get(), 0xff, plan.workspace_bytes);
    launch_contract(*problem, *outputs, plan, workspace.get(), nullptr);
  });
}

// Second order; the plan's choices are those that Python's COLUMNS_PLAN names, in its order.
extern "C" int run_contract_columns(const OuterProblem* problem, const ColumnOutputs* columns, int sm_count,
                                    const Options* options, int64_t* chosen) {
  return cuda_on_cpu::guarded([&] {
    const ContractPlan plan = plan_contract(*problem, *columns, sm_count, *options);
    const int64_t choices[] = {int64_t(plan.loader), int64_t(plan.tile), plan.splits, plan.t_splits,
                               plan.packed,          plan.keep_a,        plan.keep_b, plan.workspace_bytes};
    std::copy(std::begin(choices), std::end(choices), chosen);
    const std::unique_ptr<char[]> workspace(new char[plan.workspace_bytes]);
    memset(workspace.get(), 0xff, plan.workspace_bytes);
    launch_contract(*problem, *columns, plan, workspace.get(), nullptr);
  });
}

extern "C" int run_column_sums(const GradientsInMemory* gradients, const ColumnOutputs* columns, int output,
                               int sm_count, int64_t* splits) {
  return cuda_on_cpu::guarded([&] {
    const ColumnSumsPlan plan = plan_column_sums(gradients->N, *columns, gradients->count, sm_count);
    *splits = plan.splits;
    const std::unique_ptr<float[]> workspace(new float[plan.workspace_floats]);
    memset(workspace.get(), 0xff, 4 * plan.workspace_floats);
    launch_column_sums(*gradients, *columns, Element(output), plan, workspace.get(), nullptr);
  });
}
