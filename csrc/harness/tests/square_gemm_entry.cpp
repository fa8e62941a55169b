// The C entry point through which tests plan and run one launcher of square_gemm: compiled with
// -DLAUNCHER=square_gemm_tf32 or another, and linked with its .cu file and the plan.
#include <algorithm>
#include <cstring>
#include <memory>

#include "cuda/square_gemm/square_gemm.h"
#include "harness/guarded_call.h"

using namespace backpack_cuda::cuda;

// A workspace of just the planned size, full of NaN. The plan's choices go to `chosen`, in the order of
// Python's PLAN.
extern "C" int run_square_gemm(const SquareGemmParams* params, const StatsOutputs* outputs, int sm_count,
                               const Options* options, int64_t* chosen) {
  return cuda_on_cpu::guarded([&] {
    const SquareGemmPlan plan = plan_square_gemm(*params, *outputs, sm_count, *options);
    const int64_t choices[] = {plan.tile,   plan.sums,   plan.tiles,          plan.splits,
                               plan.copy_a, plan.copy_b, plan.workspace_bytes};
    std::copy(std::begin(choices), std::end(choices), chosen);
    const std::unique_ptr<char[]> workspace(new char[plan.workspace_bytes]);
    memset(workspace.get(), 0xff, plan.workspace_bytes);
    LAUNCHER(*params, *outputs, plan, workspace.get(), nullptr);
  });
}
