// Columns on CUDA: linear layers, convolutions and transposed convolutions by the contraction, biases by sums
// over the positions and then over the columns.
#include "ops/column_stats.h"

#include <torch/csrc/stable/ops.h>

#include "common/aten.h"
#include "common/operator_library.h"
#include "cuda/columns/column_sums.h"
#include "cuda/cost_model.h"
#include "ops/outer_problem_of.h"
#include "ops/outer_stats_cuda.h"

namespace backpack_cuda::cuda {
namespace {

// What is wanted of a parameter's columns; keeps the signs' memory alive.
class WantedColumns {
 public:
  WantedColumns(const Columns& columns, const ColumnTensors& results, int64_t want) {
    outputs.V = as_int(columns.V(), "the number of columns");
    outputs.factor = data_or_null(results.factor, want & kFactor);
    outputs.batch_diag = data_or_null<float>(results.batch_diag, want & kBatchDiag);
    outputs.diag = data_or_null<float>(results.diag, want & kDiag);
    if (columns.signs) {
      signs_ = torch::stable::contiguous(aten::detach(*columns.signs));
      outputs.signs = static_cast<const float*>(signs_.const_data_ptr());
    }
  }

  ColumnOutputs outputs{};

 private:
  Tensor signs_;
};

Tensor float_empty(const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

void bias_columns(const Columns& columns, int64_t channel_dim, const ColumnOutputs& out,
                  const CudaCall& call) {
  const int64_t V = columns.V(), N = columns.N();
  Tensor operand = torch::stable::flatten(aten::detach(columns.all), 0, 1);  // [V N, ...]
  const BiasProblem problem = bias_problem_of(operand, channel_dim);
  GradientsInMemory gradients{problem.element,  problem.data,     N, problem.O, 1, N * problem.stride_n,
                              problem.stride_n, problem.stride_o, 0};
  Tensor sums;  // [V N, O]
  ColumnOutputs rest = out;
  if (problem.T() > 1) {
    const bool in_place = out.factor && problem.element == Element::kFloat32;
    if (!in_place) sums = float_empty(operand, {V * N, problem.O});
    float* const data = static_cast<float*>(in_place ? out.factor : sums.mutable_data_ptr());
    StatsOutputs outputs{};
    outputs.batch_grad = data;
    const BiasPlan plan = plan_bias(problem, outputs, call.sm_count(), options());
    const Tensor workspace = call.workspace(plan.workspace_bytes);
    launch_bias_sums(problem, data, plan, workspace.mutable_data_ptr(), call.stream);
    gradients = {Element::kFloat32, data, N, problem.O, 1, N * problem.O, problem.O, 1, 0};
    if (in_place) rest.factor = nullptr;
  }
  if (!rest.factor && !rest.batch_diag && !rest.diag) return;
  const ColumnSumsPlan plan = plan_column_sums(N, rest, problem.O, call.sm_count());
  const Tensor workspace = call.workspace(4 * plan.workspace_floats);
  launch_column_sums(gradients, rest, problem.element, plan,
                     static_cast<float*>(workspace.mutable_data_ptr()), call.stream);
}

// Linear layers with one row per sample: G_vn is a single outer product, and so is what its squares add up
// to.
void outer_columns(const Tensor& input, const Columns& columns, int64_t want, const ColumnTensors& weight,
                   const CudaCall& call) {
  const Tensor a = torch::stable::flatten(aten::detach(input), 0, input.dim() - 2);              // [N, I]
  const Tensor b = torch::stable::flatten(aten::detach(columns.all), 1, columns.all.dim() - 2);  // [V, N, O]
  if (want & kFactor) {
    aten::mul_out(torch::stable::unsqueeze(b, 3), torch::stable::unsqueeze(a, 1), weight.factor);
  }
  if (!(want & (kBatchDiag | kDiag))) return;
  const Tensor wide = torch::stable::to(a, ScalarType::Float), squares = aten::mul(wide, wide);
  const Tensor sums = float_empty(a, {columns.N(), columns.first.size(-1)});  // [N, O]  sum_v signs b^2
  WantedColumns wanted(columns, weight, 0);
  wanted.outputs.batch_diag = static_cast<float*>(sums.mutable_data_ptr());
  bias_columns(columns, columns.first.dim() - 1, wanted.outputs, call);
  if (want & kBatchDiag) {
    aten::mul_out(torch::stable::unsqueeze(sums, 2), torch::stable::unsqueeze(squares, 1), weight.batch_diag);
  }
  if (want & kDiag) aten::transposed_product(sums, squares, weight.diag);
}

void linear(const Tensor& input, const Columns& columns, int64_t weight_want, int64_t bias_want, bool tf32,
            const ColumnTensors& weight, const ColumnTensors& bias) {
  const CudaCall call(input);
  if (weight_want) {
    if (input.numel() == input.size(0) * input.size(-1)) {
      outer_columns(input, columns, weight_want, weight, call);
    } else {
      // Copies where LinearProblem would make one, of the first column alone.
      const bool copies = !LinearProblem::merges(input, columns.first);
      const Tensor all = copies ? torch::stable::contiguous(aten::detach(columns.all)) : columns.all;
      const Tensor a = copies ? torch::stable::contiguous(aten::detach(input)) : input;
      const LinearProblem problem(a, torch::stable::select(aten::detach(all), 0, 0), tf32);
      WantedColumns wanted(columns, weight, weight_want);
      wanted.outputs.b_stride_v = all.stride(0);
      contract_columns(problem.p, wanted.outputs, call);
    }
  }
  if (bias_want)
    bias_columns(columns, input.dim() - 1, WantedColumns(columns, bias, bias_want).outputs, call);
}

void convolution(const Convolution& conv, const Columns& columns, int64_t weight_want, int64_t bias_want,
                 bool tf32, const ColumnTensors& weight, const ColumnTensors& bias) {
  const CudaCall call(conv.input);
  if (weight_want) {
    WantedColumns wanted(columns, weight, weight_want);
    (conv.transposed ? wanted.outputs.a_stride_v : wanted.outputs.b_stride_v) = columns.stride();
    const OuterProblem problem = problem_of(conv, tf32);
    if (choose_way(problem, wanted.outputs, options()) == Way::kDepthwise) {
      depthwise_columns(problem, wanted.outputs, call);
    } else {
      contract_columns(problem, wanted.outputs, call);
    }
  }
  if (bias_want) bias_columns(columns, 1, WantedColumns(columns, bias, bias_want).outputs, call);
}

void additive_bias(const Columns& columns, int64_t channel_dim, int64_t want, const ColumnTensors& bias) {
  const CudaCall call(columns.all);
  bias_columns(columns, channel_dim, WantedColumns(columns, bias, want).outputs, call);
}

}  // namespace
}  // namespace backpack_cuda::cuda

CUDA_IMPLEMENTATIONS(m) {
  m.impl("linear_column_stats", TORCH_BOX(&backpack_cuda::linear_column_stats<backpack_cuda::cuda::linear>));
  m.impl("conv_column_stats", TORCH_BOX(&backpack_cuda::conv_column_stats<backpack_cuda::cuda::convolution>));
  m.impl("conv_transpose_column_stats",
         TORCH_BOX(&backpack_cuda::conv_transpose_column_stats<backpack_cuda::cuda::convolution>));
  m.impl("bias_column_stats",
         TORCH_BOX(&backpack_cuda::bias_column_stats<backpack_cuda::cuda::additive_bias>));
}
