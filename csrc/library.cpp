// The schema of every operator; the implementations register themselves in ops/<op>_<device>.cpp.
//
// tf32: whether float32 operands may be rounded to TF32 for the tensor cores of a GPU; the CPU ignores it.
//
// The three *_grad_stats operators return ten tensors: grad, batch_grad, batch_l2, sum_grad_squared and
// sum_grad_centered_squared of the weight, then of the bias; bias_grad_stats returns five. A result that is
// not wanted is an empty tensor of shape [0]. The want arguments are bit sets: 1 grad, 2 batch_grad, 4
// batch_l2, 8 sum_grad_squared, 16 sum_grad_centered_squared.
//
// The *_column_stats operators take `columns` [V, N, ...] in the place of grad_output: V output gradients of
// every sample, columns of a square root of a curvature matrix. With G_vn the per-sample gradient of column v
// they return six tensors, of the weight and then of the bias: factor [V, N, *P] = G_vn in the operands'
// type, batch_diag [N, *P] = sum_v signs[v, n] G_vn^2 and diag [*P] = sum_vn signs[v, n] G_vn^2 in float32
// (float64 for float64); bias_column_stats returns three. signs [V, N] has the latter type; without it they
// are 1. The want arguments are bit sets: 1 factor, 2 batch_diag, 4 diag.
#include "common/operator_library.h"

#define FIVE_STATS "Tensor, Tensor, Tensor, Tensor, Tensor"
#define THREE_STATS "Tensor, Tensor, Tensor"

OPERATOR_LIBRARY(m) {
  // input [N, *, I], grad_output [N, *, O]; weight [O, I], bias [O].
  m.def(
      "linear_grad_stats(Tensor input, Tensor grad_output, int weight_want, int bias_want, bool tf32=False)"
      " -> (" FIVE_STATS ", " FIVE_STATS ")");
  // input [N, C, *], grad_output [N, O, *out], 1 to 3 spatial dims; weight [O, C/groups, *kernel], bias [O].
  m.def(
      "conv_grad_stats(Tensor input, Tensor grad_output, int[] kernel_size, int[] stride, int[] padding,"
      " int[] dilation, int groups, int weight_want, int bias_want, bool tf32=False)"
      " -> (" FIVE_STATS ", " FIVE_STATS ")");
  // input [N, C, *], grad_output [N, O, *out], 1 to 3 spatial dims; weight [C, O/groups, *kernel], bias [O].
  m.def(
      "conv_transpose_grad_stats(Tensor input, Tensor grad_output, int[] kernel_size, int[] stride,"
      " int[] padding, int[] output_padding, int[] dilation, int groups, int weight_want, int bias_want, "
      "bool tf32=False)"
      " -> (" FIVE_STATS ", " FIVE_STATS ")");
  // The *_weighted_grad operators: sum_n sample_weights[n] G_n of the same operands, in their type.
  // sample_weights [N], float64 for float64 operands and float32 for others.
  m.def(
      "linear_weighted_grad(Tensor input, Tensor grad_output, Tensor sample_weights, bool tf32=False)"
      " -> Tensor");
  m.def(
      "conv_weighted_grad(Tensor input, Tensor grad_output, Tensor sample_weights, int[] kernel_size,"
      " int[] stride, int[] padding, int[] dilation, int groups, bool tf32=False) -> Tensor");
  m.def(
      "conv_transpose_weighted_grad(Tensor input, Tensor grad_output, Tensor sample_weights,"
      " int[] kernel_size, int[] stride, int[] padding, int[] output_padding, int[] dilation, int groups,"
      " bool tf32=False) -> Tensor");
  // Per-sample sums of grad_output [N, *] over every dim but 0 and channel_dim; bias [size of channel_dim].
  m.def("bias_grad_stats(Tensor grad_output, int channel_dim, int want) -> (" FIVE_STATS ")");
  // input [N, *, I], columns [V, N, *, O].
  m.def(
      "linear_column_stats(Tensor input, Tensor columns, Tensor? signs, int weight_want, int bias_want,"
      " bool tf32=False) -> (" THREE_STATS ", " THREE_STATS ")");
  // input [N, C, *], columns [V, N, O, *out].
  m.def(
      "conv_column_stats(Tensor input, Tensor columns, Tensor? signs, int[] kernel_size, int[] stride,"
      " int[] padding, int[] dilation, int groups, int weight_want, int bias_want, bool tf32=False)"
      " -> (" THREE_STATS ", " THREE_STATS ")");
  m.def(
      "conv_transpose_column_stats(Tensor input, Tensor columns, Tensor? signs, int[] kernel_size,"
      " int[] stride, int[] padding, int[] output_padding, int[] dilation, int groups, int weight_want,"
      " int bias_want, bool tf32=False) -> (" THREE_STATS ", " THREE_STATS ")");
  // columns [V, N, ...]; channel_dim is one of its dims, neither 0 nor 1.
  m.def("bias_column_stats(Tensor columns, Tensor? signs, int channel_dim, int want) -> (" THREE_STATS ")");
  // out = decay * out + scale * sum over the rows x of input [*, D] of x x^T, exactly symmetric; homogeneous
  // appends a 1 to every row. out [D', D'] is float32 (float64 for float64) and not read where decay is 0.
  m.def(
      "linear_kron_factor(Tensor(a!) out, Tensor input, float scale, float decay, bool homogeneous,"
      " bool tf32=False) -> ()");
  // The same for the patches of input [N, C, *size]: the row of position o has the entries
  // input[n, c, o * stride + k * dilation - padding], zero outside of the input, in the order (c, *k), for
  // all o below `positions` in each spatial dim; padding may be negative. out [groups, D', D'].
  m.def(
      "conv_kron_factor(Tensor(a!) out, Tensor input, int[] kernel_size, int[] stride, int[] padding,"
      " int[] dilation, int[] positions, int groups, float scale, float decay, bool homogeneous,"
      " bool tf32=False) -> ()");
  // [N, I], [N, O] -> [N]: |input_n|^2 * |grad_output_n|^2, the squared norms of the outer products.
  m.def("outer_norm(Tensor input, Tensor grad_output) -> Tensor");
  // An uninitialised tensor for a result, float64 for a float64 `like` and float32 for others, in memory that
  // earlier results have left; on the CPU.
  m.def("_empty_result(Tensor like, int[] size) -> Tensor");
  // Sets a switch of the CPU kernels, for tests, and returns its former value.
  m.def("_cpu_option(str name, int value) -> int");
  // The same for the CUDA kernels; implemented where these are built.
  m.def("_cuda_option(str name, int value) -> int");
}
