// Linear layers on CUDA: checks, then the way that the cost model chooses.
#include <torch/csrc/stable/ops.h>

#include "common/aten.h"
#include "common/check.h"
#include "common/operator_library.h"
#include "common/stats_tensors.h"
#include "cuda/cost_model.h"
#include "cuda/gram_norm/gram_norm.h"
#include "cuda/outer_norm/outer_norm.h"
#include "cuda/square_gemm/square_gemm.h"
#include "ops/outer_problem_of.h"
#include "ops/outer_stats_cuda.h"
#include "ops/sample_weights.h"

namespace backpack_cuda::cuda {
namespace {

// All rows (n, t) of an operand, detached: [N T, columns].
Tensor rows(const Tensor& tensor) {
  return torch::stable::flatten(aten::detach(tensor), 0, tensor.dim() - 2);
}

// out [O, I] = b^T a
void multiply(Tensor b,         // [N T, O]
              const Tensor& a,  // [N T, I]
              const Tensor& out) {
  aten::mm_out(torch::stable::transpose(b, 0, 1), a, out);
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
    multiply(rows(grad_output), rows(input), weight.grad);
  }
}

void weight_stats(const Tensor& input, const Tensor& grad_output, const StatsTensors& weight, int64_t want,
                  bool tf32, const CudaCall& call) {
  const LinearProblem problem(input, grad_output, tf32);
  const StatsOutputs out = outputs_of(weight, want);
  if (choose_way(problem.p, out, true, options()) == Way::kSeparate) {
    separate_stats(problem.p, input, grad_output, weight, out, call);
  } else {
    contract_stats(problem.p, out, call);
  }
}

TenStats linear_grad_stats(const Tensor& input, const Tensor& grad_output, int64_t weight_want,
                           int64_t bias_want, bool tf32) {
  check_linear_operands(input, grad_output);
  check_want(weight_want, "weight_want");
  check_want(bias_want, "bias_want");
  const CudaCall call(input);
  const int64_t last = input.dim() - 1, N = input.size(0), I = input.size(last), O = grad_output.size(last);
  StatsTensors weight(input, {O, I}, N, weight_want), bias(grad_output, {O}, N, bias_want);
  if (zero_if_empty(input, grad_output, weight, bias, weight_want)) return as_tuple(weight, bias);
  if (weight_want) weight_stats(input, grad_output, weight, weight_want, tf32, call);
  if (bias_want) bias_stats(grad_output, last, outputs_of(bias, bias_want), call);
  return as_tuple(weight, bias);
}

Tensor linear_weighted_grad(const Tensor& input, const Tensor& grad_output, const Tensor& sample_weights,
                            bool tf32) {
  check_linear_operands(input, grad_output);
  check_sample_weights(sample_weights, input);
  const CudaCall call(input);
  const int64_t last = input.dim() - 1, N = input.size(0), I = input.size(last), O = grad_output.size(last);
  int64_t want = kGrad;
  StatsTensors weight(input, {O, I}, N, want), bias(grad_output, {O}, N, 0);
  if (zero_if_empty(input, grad_output, weight, bias, want) || !want) return weight.grad;
  const LinearProblem problem(input, grad_output, tf32);
  const Tensor weights = torch::stable::contiguous(sample_weights);
  StatsOutputs out = outputs_of(weight, want);
  out.weights = static_cast<const float*>(weights.const_data_ptr());
  if (choose_way(problem.p, out, true, options()) == Way::kSeparate) {  // T = 1: rows of grad_output are few
    const Tensor scaled = aten::mul(rows(grad_output), torch::stable::unsqueeze(aten::detach(weights), 1));
    multiply(torch::stable::to(scaled, input.scalar_type()), rows(input), weight.grad);
  } else {
    contract_stats(problem.p, out, call);
  }
  return weight.grad;
}

}  // namespace
}  // namespace backpack_cuda::cuda

CUDA_IMPLEMENTATIONS(m) {
  m.impl("linear_grad_stats", TORCH_BOX(&backpack_cuda::cuda::linear_grad_stats));
  m.impl("linear_weighted_grad", TORCH_BOX(&backpack_cuda::cuda::linear_weighted_grad));
}
