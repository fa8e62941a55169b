// The C entry point through which tests plan and run depthwise_stats. With -DONLY_FLOAT32 the instances for
// other element types are left out.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "cuda/depthwise/depthwise.h"
#include "harness/guarded_call.h"

using namespace backpack_cuda::cuda;

#ifdef ONLY_FLOAT32
namespace backpack_cuda::cuda {
struct DepthwiseParams;
void depthwise_bfloat16(const DepthwiseParams&, cudaStream_t) { throw std::logic_error("left out"); }
void depthwise_float16(const DepthwiseParams&, cudaStream_t) { throw std::logic_error("left out"); }
}  // namespace backpack_cuda::cuda
#endif

// A workspace of just the planned size, full of NaN. The plan's choices go to `chosen`.
extern "C" int run_depthwise(const OuterProblem* problem, const StatsOutputs* outputs, int sm_count,
                             const Options* options, int64_t* chosen) {
  return cuda_on_cpu::guarded([&] {
    const DepthwisePlan plan = plan_depthwise(*problem, *outputs, sm_count, *options);
    const int64_t choices[] = {int64_t(plan.box), plan.lanes_along_units, plan.slots,  plan.units,
                               plan.unit_blocks,  plan.chunk_blocks,      plan.splits, plan.workspace_bytes};
    std::copy(std::begin(choices), std::end(choices), chosen);
    const std::unique_ptr<char[]> workspace(new char[plan.workspace_bytes]);
    memset(workspace.get(), 0xff, plan.workspace_bytes);
    launch_depthwise(*problem, *outputs, plan, workspace.get(), nullptr);
  });
}

// Second order.
extern "C" int run_depthwise_columns(const OuterProblem* problem, const ColumnOutputs* columns, int sm_count,
                                     const Options* options) {
  return cuda_on_cpu::guarded([&] {
    const DepthwisePlan plan = plan_depthwise(*problem, *columns, sm_count, *options);
    const std::unique_ptr<char[]> workspace(new char[plan.workspace_bytes]);
    memset(workspace.get(), 0xff, plan.workspace_bytes);
    launch_depthwise(*problem, *columns, plan, workspace.get(), nullptr);
  });
}
