// Convolutions and transposed convolutions on CUDA: checks, then the way that the cost model chooses.
#include "common/check.h"
#include "common/operator_library.h"
#include "common/stats_tensors.h"
#include "cuda/cost_model.h"
#include "ops/outer_problem_of.h"
#include "ops/outer_stats_cuda.h"
#include "ops/sample_weights.h"

namespace backpack_cuda::cuda {
namespace {

void weight_stats(const Convolution& conv, const StatsOutputs& out, bool tf32, const CudaCall& call) {
  const OuterProblem problem = problem_of(conv, tf32);
  if (choose_way(problem, out, false, options()) == Way::kDepthwise) {
    depthwise_stats(problem, out, call);
  } else {
    contract_stats(problem, out, call);
  }
}

TenStats conv_stats(const Convolution& conv, int64_t weight_want, int64_t bias_want, bool tf32) {
  check_want(weight_want, "weight_want");
  check_want(bias_want, "bias_want");
  const Tensor &input = conv.input, &grad_output = conv.grad_output;
  const CudaCall call(input);
  StatsTensors weight(input, conv.weight_shape, input.size(0), weight_want),
      bias(grad_output, {grad_output.size(1)}, input.size(0), bias_want);
  if (zero_if_empty(input, grad_output, weight, bias, weight_want)) return as_tuple(weight, bias);
  if (weight_want) weight_stats(conv, outputs_of(weight, weight_want), tf32, call);
  if (bias_want) bias_stats(grad_output, 1, outputs_of(bias, bias_want), call);
  return as_tuple(weight, bias);
}

Tensor conv_weighted(const Convolution& conv, const Tensor& sample_weights, bool tf32) {
  check_sample_weights(sample_weights, conv.input);
  const CudaCall call(conv.input);
  int64_t want = kGrad;
  StatsTensors weight(conv.input, conv.weight_shape, conv.input.size(0), want),
      bias(conv.grad_output, {conv.grad_output.size(1)}, conv.input.size(0), 0);
  if (zero_if_empty(conv.input, conv.grad_output, weight, bias, want) || !want) return weight.grad;
  const Tensor weights = torch::stable::contiguous(sample_weights);
  StatsOutputs out = outputs_of(weight, want);
  out.weights = static_cast<const float*>(weights.const_data_ptr());
  weight_stats(conv, out, tf32, call);
  return weight.grad;
}

TenStats conv_grad_stats(const Tensor& input, const Tensor& grad_output, Ints kernel_size, Ints stride,
                         Ints padding, Ints dilation, int64_t groups, int64_t weight_want, int64_t bias_want,
                         bool tf32) {
  const Convolution conv(input, grad_output, kernel_size, stride, padding, nullptr, dilation, groups);
  return conv_stats(conv, weight_want, bias_want, tf32);
}

TenStats conv_transpose_grad_stats(const Tensor& input, const Tensor& grad_output, Ints kernel_size,
                                   Ints stride, Ints padding, Ints output_padding, Ints dilation,
                                   int64_t groups, int64_t weight_want, int64_t bias_want, bool tf32) {
  const Convolution conv(input, grad_output, kernel_size, stride, padding, &output_padding, dilation, groups);
  return conv_stats(conv, weight_want, bias_want, tf32);
}

Tensor conv_weighted_grad(const Tensor& input, const Tensor& grad_output, const Tensor& sample_weights,
                          Ints kernel_size, Ints stride, Ints padding, Ints dilation, int64_t groups,
                          bool tf32) {
  const Convolution conv(input, grad_output, kernel_size, stride, padding, nullptr, dilation, groups);
  return conv_weighted(conv, sample_weights, tf32);
}

Tensor conv_transpose_weighted_grad(const Tensor& input, const Tensor& grad_output,
                                    const Tensor& sample_weights, Ints kernel_size, Ints stride, Ints padding,
                                    Ints output_padding, Ints dilation, int64_t groups, bool tf32) {
  const Convolution conv(input, grad_output, kernel_size, stride, padding, &output_padding, dilation, groups);
  return conv_weighted(conv, sample_weights, tf32);
}

}  // namespace
}  // namespace backpack_cuda::cuda

CUDA_IMPLEMENTATIONS(m) {
  m.impl("conv_grad_stats", TORCH_BOX(&backpack_cuda::cuda::conv_grad_stats));
  m.impl("conv_transpose_grad_stats", TORCH_BOX(&backpack_cuda::cuda::conv_transpose_grad_stats));
  m.impl("conv_weighted_grad", TORCH_BOX(&backpack_cuda::cuda::conv_weighted_grad));
  m.impl("conv_transpose_weighted_grad", TORCH_BOX(&backpack_cuda::cuda::conv_transpose_weighted_grad));
}
