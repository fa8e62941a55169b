// The launcher. Compiled always; without BACKPACK_CUDA_SM90A, which says that the kernels are linked, the
// path never applies.
#include "cuda/contract_sm90/contract_sm90.h"

#include <stdexcept>

#include "cuda/common/cuda_check.h"
#include "cuda/contract_sm90/contract_sm90_params.h"
#include "cuda/contract_sm90/dense_rows.h"
#include "cuda/merge/merge.h"

namespace backpack_cuda::cuda {

#if defined(BACKPACK_CUDA_SM90A)

namespace {

// Code for sm_90a runs on 9.0 alone, unlike any other target's.
bool device_is_hopper() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return major == 9 && minor == 0;
}

bool divides(int64_t bytes, const void* address) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

}  // namespace

bool contract_sm90_applies(const OuterProblem& problem) {
  DenseRows a, b;
  return find_dense_rows(problem, &a, &b) && device_is_hopper() && has_tensor_maps();
}

void launch_contract_sm90(const OuterProblem& problem, const StatsOutputs& outputs,
                          const ContractSm90Plan& plan, void* workspace, cudaStream_t stream) {
  DenseRows a, b;
  if (!find_dense_rows(problem, &a, &b)) {
    throw std::logic_error("backpack_cuda: contract_sm90 does not apply to this problem");
  }
  const auto in_workspace = [&](int64_t at) {
    return reinterpret_cast<float*>(static_cast<char*>(workspace) + at);
  };
  const int64_t tiles = int64_t{plan.tiles_o} * plan.tiles_i;
  const bool partial = plan.splits > 1;

  ContractSm90Params params{};
  make_tensor_map(a, problem.element, &params.a);
  make_tensor_map(b, problem.element, &params.b);
  params.N = static_cast<int>(problem.N);
  params.T = problem.T();
  params.O = problem.O;
  params.I = problem.I();
  params.centered = outputs.sum_grad_centered_squared != nullptr;
  params.weights = outputs.weights;
  params.norms = outputs.batch_l2 && tiles > 1 ? in_workspace(plan.norms_at) : outputs.batch_l2;
  params.batch_grad = outputs.batch_grad;
  if (partial) {
    if (outputs.grad || outputs.squares()) params.partial_sums = in_workspace(plan.sums_at);
    if (outputs.squares()) params.partial_squares = in_workspace(plan.squares_at);
  } else {
    params.grad = outputs.grad;
    params.sum_grad_squared = outputs.sum_grad_squared;
    params.sum_grad_centered_squared = outputs.sum_grad_centered_squared;
  }
  params.paired_stores = params.I % 2 == 0 && divides(4, outputs.grad) && divides(4, outputs.batch_grad) &&
                         divides(8, outputs.sum_grad_squared) &&
                         divides(8, outputs.sum_grad_centered_squared);

  auto* const kernel = problem.element == Element::kBFloat16 ? contract_sm90_bfloat16 : contract_sm90_float16;
  kernel(params, outputs.squares(), dim3(plan.tiles_i, plan.tiles_o, plan.splits), stream);
  if (params.partial_sums) {
    const SplitSums sums{
        plan.splits,    problem.N, int64_t{params.O} * params.I, params.partial_sums, params.partial_squares,
        params.centered};
    merge_splits(sums, problem.element, outputs, stream);
  }
  if (outputs.batch_l2 && tiles > 1) sum_rows(params.norms, outputs.batch_l2, problem.N, tiles, stream);
}

#else

bool contract_sm90_applies(const OuterProblem&) { return false; }

void launch_contract_sm90(const OuterProblem&, const StatsOutputs&, const ContractSm90Plan&, void*,
                          cudaStream_t) {
  throw std::logic_error("backpack_cuda: this library was built without kernels for sm_90a");
}

#endif

}  // namespace backpack_cuda::cuda
