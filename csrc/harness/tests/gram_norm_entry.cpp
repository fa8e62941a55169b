// The C entry point through which tests plan and run one launcher of gram_norm: compiled with
// -DLAUNCHER=gram_norm_tf32 or another, and linked with its .cu file and the plan.
#include <algorithm>
#include <cstring>
#include <memory>

#include "cuda/gram_norm/gram_norm.h"
#include "harness/guarded_call.h"

using namespace backpack_cuda::cuda;

// A workspace of just the planned size, full of NaN. The plan's choices go to `chosen`, in the order of
// Python's PLAN.
extern "C" int run_gram_norm(const GramNormParams* params, int sm_count, const Options* options,
                             int64_t* chosen) {
  return cuda_on_cpu::guarded([&] {
    const GramNormPlan plan = plan_gram_norm(*params, sm_count, *options);
    const int64_t choices[] = {plan.tile,   plan.slot,   plan.pairs,  plan.units,
                               plan.splits, plan.copy_a, plan.copy_b, plan.workspace_bytes};
    std::copy(std::begin(choices), std::end(choices), chosen);
    const std::unique_ptr<char[]> workspace(new char[plan.workspace_bytes]);
    memset(workspace.get(), 0xff, plan.workspace_bytes);
    LAUNCHER(*params, plan, workspace.get(), nullptr);
  });
}
