// From the problem and the plan to the kernel's arguments and the passes after it.
#include "common/integers.h"
#include "cuda/contract/contract_params.h"
#include "cuda/merge/merge.h"

namespace backpack_cuda::cuda {
namespace {

constexpr int kDims = 3;

// A distance that is walked only between the positions of one dim: rows and positions have a single stride.
int64_t last_walked_stride(const int (&positions)[kDims], const int64_t (&stride)[kDims],
                           const int (&step)[kDims]) {
  for (int d = kDims - 1; d >= 0; --d) {
    if (positions[d] > 1) return stride[d] * step[d];
  }
  return 0;
}

ContractOperand operand_a(const OuterProblem& p) {
  ContractOperand x{};
  x.data = p.a.data;
  x.stride_n = p.a.stride_n;
  x.stride_c = p.a.stride_c;
  x.stride_group = p.a.stride_c * p.channels;
  x.channels = p.channels;
  x.columns = p.I();
  for (int d = 0; d < kDims; ++d) {
    x.stride[d] = p.a.stride[d];
    x.size[d] = p.size[d];
    x.kernel[d] = p.kernel[d];
    x.step[d] = p.step[d];
    x.padding[d] = p.padding[d];
    x.dilation[d] = p.dilation[d];
  }
  x.stride_t = last_walked_stride(p.positions, x.stride, x.step);
  return x;
}

ContractOperand operand_b(const OuterProblem& p) {
  ContractOperand x{};
  x.data = p.b.data;
  x.stride_n = p.b.stride_n;
  x.stride_c = p.b.stride_c;
  x.stride_group = p.b.stride_c * p.O;
  x.columns = x.channels = p.O;
  for (int d = 0; d < kDims; ++d) {
    x.stride[d] = p.b.stride[d];
    x.size[d] = p.positions[d];
    x.kernel[d] = x.step[d] = x.dilation[d] = 1;
  }
  x.stride_t = last_walked_stride(p.positions, x.stride, x.step);
  return x;
}

// By ContractPrecision and ContractLoader.
constexpr ContractLauncher kLaunchers[4][4] = {
    {contract_tf32_rows, contract_tf32_channels_last, contract_tf32_positions, contract_tf32_elements},
    {contract_tf32x3_rows, contract_tf32x3_channels_last, contract_tf32x3_positions,
     contract_tf32x3_elements},
    {contract_bfloat16_rows, contract_bfloat16_channels_last, contract_bfloat16_positions,
     contract_bfloat16_elements},
    {contract_float16_rows, contract_float16_channels_last, contract_float16_positions,
     contract_float16_elements},
};

constexpr void (*kColumnLaunchers[4])(const ContractParams&, ContractLoader, ContractTile, cudaStream_t) = {
    contract_tf32_columns, contract_tf32x3_columns, contract_bfloat16_columns, contract_float16_columns};

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

float* part_of(void* workspace, int64_t at) {
  return reinterpret_cast<float*>(static_cast<char*>(workspace) + at);
}

// All but the results.
ContractParams params_of(const OuterProblem& p, const ContractPlan& plan) {
  ContractParams params{};
  params.a = operand_a(p);
  params.b = operand_b(p);
  params.N = static_cast<int>(p.N);
  params.T = p.T();
  params.O = p.O;
  params.I = p.I();
  params.groups = p.groups;
  for (int d = 0; d < kDims; ++d) params.positions[d] = p.positions[d];
  params.tiles_o = plan.tiles_o;
  params.tiles_i = plan.tiles_i;
  params.splits = plan.splits;
  params.t_splits = plan.t_splits;
  params.t_per_split = plan.t_per_split;
  params.packed = plan.packed;
  params.copy_bytes = plan.copy_bytes;
  return params;
}

}  // namespace

void launch_contract(const OuterProblem& p, const StatsOutputs& out, const ContractPlan& plan,
                     void* workspace, cudaStream_t stream) {
  const bool parts = plan.t_splits > 1, split = !parts && plan.splits > 1;
  const bool join_norms = out.batch_l2 && plan.norm_columns > 1;
  float* const norms = join_norms ? part_of(workspace, plan.norms_at) : out.batch_l2;
  const int64_t count = int64_t{p.groups} * p.O * p.I();

  ContractParams params = params_of(p, plan);
  params.vector_stores = params.I % 4 == 0 && aligned(out.grad) && aligned(out.batch_grad) &&
                         aligned(out.sum_grad_squared) && aligned(out.sum_grad_centered_squared);
  const bool partial_sums = parts || (split && (out.grad || plan.squares));
  if (partial_sums) params.partial_sums = part_of(workspace, plan.sums_at);
  if (!parts) {  // else all this is the second pass's
    params.centered = out.sum_grad_centered_squared != nullptr;
    params.weights = out.weights;
    params.norms = norms;
    params.batch_grad = out.batch_grad;
    if (split && plan.squares) params.partial_squares = part_of(workspace, plan.squares_at);
    if (!split) {
      params.grad = out.grad;
      params.sum_grad_squared = out.sum_grad_squared;
      params.sum_grad_centered_squared = out.sum_grad_centered_squared;
    }
  }
  kLaunchers[static_cast<int>(plan.precision)][static_cast<int>(plan.loader) - 1](params, plan.tile,
                                                                                  plan.squares, stream);
  if (parts) {
    params.centered = out.sum_grad_centered_squared != nullptr;
    params.weights = out.weights;
    params.norms = norms;
    params.batch_grad = out.batch_grad;
    params.grad = out.grad;
    params.sum_grad_squared = out.sum_grad_squared;
    params.sum_grad_centered_squared = out.sum_grad_centered_squared;
    contract_join_parts(params, p.element, stream);
  } else if (partial_sums) {
    const SplitSums sums{plan.splits,    p.N, count, params.partial_sums, params.partial_squares,
                         params.centered};
    merge_splits(sums, p.element, out, stream);
  }
  if (join_norms) sum_rows(norms, out.batch_l2, p.N, plan.norm_columns, stream);
}

void launch_contract(const OuterProblem& p, const ColumnOutputs& columns, const ContractPlan& plan,
                     void* workspace, cudaStream_t stream) {
  const bool parts = plan.t_splits > 1;
  const int64_t count = int64_t{p.groups} * p.O * p.I();
  float* const sums = part_of(workspace, plan.sums_at);

  ContractParams params = params_of(p, plan);
  params.a.stride_v = columns.a_stride_v;
  params.b.stride_v = columns.b_stride_v;
  params.V = columns.V;
  params.split_unit = plan.split_unit;
  params.keep_a = plan.keep_a;
  params.keep_b = plan.keep_b;
  params.kept_slabs = static_cast<int>(ceil_div(p.T(), p.element == Element::kFloat32 ? 16 : 32));
  params.vector_stores =
      params.I % 4 == 0 && aligned(columns.factor) && aligned(columns.batch_diag) && aligned(columns.diag);
  params.signs = columns.signs;
  if (parts) {
    params.parts = sums;
  } else {  // else all this is the second pass's
    params.squares = columns.batch_diag || columns.diag;
    params.factor = columns.factor;
    params.batch_diag = columns.batch_diag;
    params.diag = columns.diag;
    if (plan.splits > 1 && columns.diag) params.partial_sums = sums;
  }
  kColumnLaunchers[static_cast<int>(plan.precision)](params, plan.loader, plan.tile, stream);
  if (parts) {
    const int64_t stride_v = plan.t_splits * count, stride_n = columns.V * stride_v;
    const GradientsInMemory gradients{Element::kFloat32, sums,     p.N, count, plan.t_splits,
                                      stride_v,          stride_n, 1,   count};
    launch_column_sums(gradients, columns, p.element, plan.column_sums,
                       part_of(workspace, plan.column_sums_at), stream);
  } else if (params.partial_sums) {
    StatsOutputs out{};
    out.grad = columns.diag;
    merge_splits({plan.splits, p.N, count, sums, nullptr, false}, Element::kFloat32, out, stream);
  }
}

}  // namespace backpack_cuda::cuda
