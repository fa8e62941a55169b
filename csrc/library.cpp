// The schema of every operator; the implementations register themselves in ops/<op>_<device>.cpp.
//
// tf32: whether float32 operands may be rounded to TF32 for the tensor cores of a GPU; the CPU ignores it.
//
// The three *_grad_stats operators return ten tensors: grad, batch_grad, batch_l2, sum_grad_squared and
// sum_grad_centered_squared of the weight, then of the bias; bias_grad_stats returns five. A result that is
// not wanted is an empty tensor of shape [0]. The want arguments are bit sets: 1 grad, 2 batch_grad, 4
// batch_l2, 8 sum_grad_squared, 16 sum_grad_centered_squared.
#include "common/operator_library.h"

#define FIVE_STATS "Tensor, Tensor, Tensor, Tensor, Tensor"

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
  // [N, I], [N, O] -> [N]: |input_n|^2 * |grad_output_n|^2, the squared norms of the outer products.
  m.def("outer_norm(Tensor input, Tensor grad_output) -> Tensor");
  // Sets a switch of the CPU kernels, for tests, and returns its former value.
  m.def("_cpu_option(str name, int value) -> int");
  // The same for the CUDA kernels; implemented where these are built.
  m.def("_cuda_option(str name, int value) -> int");
}
