// The C entry point through which tests plan and run bias_stats. With -DONLY_FLOAT32 the instances for other
// element types are left out.
#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "cuda/bias/bias.h"
#include "harness/guarded_call.h"

using namespace backpack_cuda::cuda;

#ifdef ONLY_FLOAT32
namespace backpack_cuda::cuda {
struct BiasParams;
void bias_bfloat16(const BiasParams&, cudaStream_t) { throw std::logic_error("left out"); }
void bias_float16(const BiasParams&, cudaStream_t) { throw std::logic_error("left out"); }
}  // namespace backpack_cuda::cuda
#endif

// A workspace of just the planned size, full of NaN. The choices for the pass over the operand go to
// `chosen`.
extern "C" int run_bias(const BiasProblem* problem, const StatsOutputs* outputs, int sm_count,
                        const Options* options, int64_t* chosen) {
  return cuda_on_cpu::guarded([&] {
    const BiasPlan plan = plan_bias(*problem, *outputs, sm_count, *options);
    const BiasPass& pass = plan.first;
    const int64_t choices[] = {
        pass.lanes_along_outputs, pass.vector_outputs, pass.vector_positions, pass.slots,          pass.units,
        pass.unit_blocks,         pass.splits,         plan.t_splits,         plan.workspace_bytes};
    std::copy(std::begin(choices), std::end(choices), chosen);
    const std::unique_ptr<char[]> workspace(new char[plan.workspace_bytes]);
    memset(workspace.get(), 0xff, plan.workspace_bytes);
    launch_bias(*problem, *outputs, plan, workspace.get(), nullptr);
  });
}
