// C entry points through which tests plan and run the kernels of kron_factor.
#include <algorithm>
#include <cstring>
#include <memory>

#include "cuda/kron_factor/kron_factor.h"
#include "harness/guarded_call.h"

using namespace backpack_cuda::cuda;

// The plan's choices; those that Python's PLAN names, in its order.
static KronPlan plan_into(const KronProblem& problem, int sm_count, const Options& options, int64_t* chosen) {
  const KronPlan plan = plan_kron_factor(problem, sm_count, options);
  const int64_t choices[] = {plan.lags ? 2 : 1,
                             int64_t(plan.loader),
                             int64_t(plan.tile),
                             plan.whole_copies,
                             plan.final,
                             plan.groups_per_tile,
                             plan.first_item[plan.products],
                             int64_t(plan.slabs),
                             plan.workspace_bytes};
  std::copy(std::begin(choices), std::end(choices), chosen);
  return plan;
}

extern "C" int run_kron_factor_plan(const KronProblem* problem, int sm_count, const Options* options,
                                    int64_t* chosen) {
  return cuda_on_cpu::guarded([&] { plan_into(*problem, sm_count, *options, chosen); });
}

// With a workspace of just the planned size, full of NaN.
extern "C" int run_kron_factor(const KronProblem* problem, int sm_count, const Options* options,
                               int64_t* chosen) {
  return cuda_on_cpu::guarded([&] {
    const KronPlan plan = plan_into(*problem, sm_count, *options, chosen);
    const std::unique_ptr<char[]> workspace(new char[plan.workspace_bytes]);
    memset(workspace.get(), 0xff, plan.workspace_bytes);
    launch_kron_factor(*problem, plan, workspace.get(), nullptr);
  });
}
