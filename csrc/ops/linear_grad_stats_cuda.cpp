// Linear layers on CUDA: the way that the cost model chooses.
#include <torch/csrc/stable/ops.h>

#include "common/aten.h"
#include "common/operator_library.h"
#include "cuda/cost_model.h"
#include "cuda/gram_norm/gram_norm.h"
#include "cuda/outer_norm/outer_norm.h"
#include "cuda/square_gemm/square_gemm.h"
#include "ops/operators.h"
#include "ops/outer_problem_of.h"
#include "ops/outer_stats_cuda.h"

namespace backpack_cuda::cuda {
namespace {

// All rows (n, t) of an operand, detached: [N T, columns].
Tensor rows(const Tensor& tensor) {
  return torch::stable::flatten(aten::detach(tensor), 0, tensor.dim() - 2);
}

void outer_norms(const OuterProblem& p, float* out, cudaStream_t stream) {
  const OuterNormParams params{p.a.data,
                               p.b.data,
                               out,
                               p.N,
                               p.channels,
                               p.O,
                               {p.a.stride_n, p.a.stride_c},
                               {p.b.stride_n, p.b.stride_c}};
  auto* launch = &outer_norm_float32;
  if (p.element == Element::kBFloat16) launch = &outer_norm_bfloat16;
  if (p.element == Element::kFloat16) launch = &outer_norm_float16;
  launch(params, stream);
}

void gram_norms(const OuterProblem& p, float* out, const CudaCall& call) {
  const GramNormParams params{p.element,
                              p.tf32,
                              p.N,
                              p.T(),
                              p.channels,
                              p.O,
                              {p.a.data, p.a.stride_n, p.a.stride[2], p.a.stride_c},
                              {p.b.data, p.b.stride_n, p.b.stride[2], p.b.stride_c},
                              out};
  const GramNormPlan plan = plan_gram_norm(params, call.sm_count(), options());
  const Tensor workspace = call.workspace(plan.workspace_bytes);
  launch_gram_norm(params, plan, workspace.mutable_data_ptr(), call.stream);
}

void square_products(const OuterProblem& p, const StatsOutputs& out, const CudaCall& call) {
  const SquareGemmParams params{p.element,
                                p.tf32,
                                p.N,
                                p.O,
                                p.channels,
                                {p.a.data, p.a.stride_n, p.a.stride_c},
                                {p.b.data, p.b.stride_n, p.b.stride_c}};
  const SquareGemmPlan plan = plan_square_gemm(params, out, call.sm_count(), options());
  const Tensor workspace = call.workspace(plan.workspace_bytes);
  launch_square_gemm(params, out, plan, workspace.mutable_data_ptr(), call.stream);
}

// Way::kSeparate: a kernel, or the library, for each kind of result.
void separate_stats(const OuterProblem& p, const Tensor& input, const Tensor& grad_output,
                    const StatsTensors& weight, StatsOutputs out, const CudaCall& call) {
  if (out.batch_l2) {
    p.T() == 1 ? outer_norms(p, out.batch_l2, call.stream) : gram_norms(p, out.batch_l2, call);
    out.batch_l2 = nullptr;
  }
  if (out.squares()) {
    square_products(p, out, call);
  } else if (out.grad) {
    aten::transposed_product(rows(grad_output), rows(input), weight.grad);
  }
}

void statistics(const Tensor& input, const Tensor& grad_output, int64_t weight_want, int64_t bias_want,
                bool tf32, const StatsTensors& weight, const StatsTensors& bias) {
  const CudaCall call(input);
  if (weight_want) {
    const LinearProblem problem(input, grad_output, tf32);
    const StatsOutputs out = outputs_of(weight, weight_want);
    if (choose_way(problem.p, out, true, options()) == Way::kSeparate) {
      separate_stats(problem.p, input, grad_output, weight, out, call);
    } else {
      contract_stats(problem.p, out, call);
    }
  }
  if (bias_want) bias_stats(grad_output, input.dim() - 1, outputs_of(bias, bias_want), call);
}

void weighted_sum(const Tensor& input, const Tensor& grad_output, const Tensor& sample_weights, bool tf32,
                  const StatsTensors& weight) {
  const CudaCall call(input);
  const LinearProblem problem(input, grad_output, tf32);
  const Tensor weights = torch::stable::contiguous(sample_weights);
  const StatsOutputs out = outputs_of(weight, kGrad, &weights);
  if (choose_way(problem.p, out, true, options()) == Way::kSeparate) {  // T = 1: rows of grad_output are few
    const Tensor scaled = aten::mul(rows(grad_output), torch::stable::unsqueeze(aten::detach(weights), 1));
    aten::transposed_product(torch::stable::to(scaled, input.scalar_type()), rows(input), weight.grad);
  } else {
    contract_stats(problem.p, out, call);
  }
}

}  // namespace
}  // namespace backpack_cuda::cuda

CUDA_IMPLEMENTATIONS(m) {
  m.impl("linear_grad_stats", TORCH_BOX(&backpack_cuda::linear_grad_stats<backpack_cuda::cuda::statistics>));
  m.impl("linear_weighted_grad",
         TORCH_BOX(&backpack_cuda::linear_weighted_grad<backpack_cuda::cuda::weighted_sum>));
}
