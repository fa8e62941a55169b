// C entry points through which the tests run contract_sm90.
#include "cuda/contract_sm90/contract_sm90.h"
#include "cuda/contract_sm90/contract_sm90_params.h"
#include "harness/guarded_call.h"

using namespace backpack_cuda::cuda;

#if defined(BFLOAT16_ALONE)  // half of the compilation
void backpack_cuda::cuda::contract_sm90_float16(const ContractSm90Params&, bool, dim3, cudaStream_t) {}
#endif

extern "C" int contract_sm90_applies_to(const OuterProblem* problem) {
  return contract_sm90_applies(*problem);
}

extern "C" int plan_contract_sm90_for(const OuterProblem* problem, const StatsOutputs* outputs, int sm_count,
                                      const Options* options, ContractSm90Plan* plan) {
  return cuda_on_cpu::guarded([&] { *plan = plan_contract_sm90(*problem, *outputs, sm_count, *options); });
}

extern "C" int run_contract_sm90(const OuterProblem* problem, const StatsOutputs* outputs,
                                 const ContractSm90Plan* plan, void* workspace) {
  return cuda_on_cpu::guarded([&] { launch_contract_sm90(*problem, *outputs, *plan, workspace, nullptr); });
}
