// What the operators do on every device: checks, results, operands without elements. A device supplies the
// computation as a template argument, a function of
//   statistics       (operands, weight_want, bias_want, tf32, weight, bias), something being wanted
//   weighted sums    (operands, sample_weights, tf32, grad)
// where the operands are (input, grad_output) of a Linear layer or one Convolution.
#pragma once

#include "common/check.h"
#include "common/stats_tensors.h"
#include "ops/convolution.h"
#include "ops/sample_weights.h"

namespace backpack_cuda {

// input [N, *, I], grad_output [N, *, O]
template <auto kCompute>
TenStats linear_grad_stats(const Tensor& input, const Tensor& grad_output, int64_t weight_want,
                           int64_t bias_want, bool tf32) {
  check_linear_operands(input, grad_output);
  check_want(weight_want, "weight_want");
  check_want(bias_want, "bias_want");
  const int64_t last = input.dim() - 1, N = input.size(0), I = input.size(last), O = grad_output.size(last);
  StatsTensors weight(input, {O, I}, N, weight_want), bias(grad_output, {O}, N, bias_want);
  if (!zero_if_empty(input, grad_output, weight, bias, weight_want)) {
    kCompute(input, grad_output, weight_want, bias_want, tf32, weight, bias);
  }
  return as_tuple(weight, bias);
}

template <auto kCompute>
Tensor linear_weighted_grad(const Tensor& input, const Tensor& grad_output, const Tensor& sample_weights,
                            bool tf32) {
  check_linear_operands(input, grad_output);
  check_sample_weights(sample_weights, input);
  const int64_t last = input.dim() - 1, N = input.size(0), I = input.size(last), O = grad_output.size(last);
  StatsTensors weight(input, {O, I}, N, kGrad);
  if (input.numel() == 0 || grad_output.numel() == 0) {
    weight.fill_zero();
  } else {
    kCompute(input, grad_output, sample_weights, tf32, weight);
  }
  return weight.grad;
}

template <auto kCompute>
TenStats conv_stats(const Convolution& conv, int64_t weight_want, int64_t bias_want, bool tf32) {
  check_want(weight_want, "weight_want");
  check_want(bias_want, "bias_want");
  const Tensor &input = conv.input, &grad_output = conv.grad_output;
  StatsTensors weight(input, conv.weight_shape, input.size(0), weight_want),
      bias(grad_output, {grad_output.size(1)}, input.size(0), bias_want);
  if (!zero_if_empty(input, grad_output, weight, bias, weight_want)) {
    kCompute(conv, weight_want, bias_want, tf32, weight, bias);
  }
  return as_tuple(weight, bias);
}

template <auto kCompute>
Tensor conv_weighted(const Convolution& conv, const Tensor& sample_weights, bool tf32) {
  check_sample_weights(sample_weights, conv.input);
  StatsTensors weight(conv.input, conv.weight_shape, conv.input.size(0), kGrad);
  if (conv.input.numel() == 0 || conv.grad_output.numel() == 0) {
    weight.fill_zero();
  } else {
    kCompute(conv, sample_weights, tf32, weight);
  }
  return weight.grad;
}

// input [N, C, *], grad_output [N, O, *out]
template <auto kCompute>
TenStats conv_grad_stats(const Tensor& input, const Tensor& grad_output, Ints kernel_size, Ints stride,
                         Ints padding, Ints dilation, int64_t groups, int64_t weight_want, int64_t bias_want,
                         bool tf32) {
  const Convolution conv(input, grad_output, kernel_size, stride, padding, nullptr, dilation, groups);
  return conv_stats<kCompute>(conv, weight_want, bias_want, tf32);
}

template <auto kCompute>
TenStats conv_transpose_grad_stats(const Tensor& input, const Tensor& grad_output, Ints kernel_size,
                                   Ints stride, Ints padding, Ints output_padding, Ints dilation,
                                   int64_t groups, int64_t weight_want, int64_t bias_want, bool tf32) {
  const Convolution conv(input, grad_output, kernel_size, stride, padding, &output_padding, dilation, groups);
  return conv_stats<kCompute>(conv, weight_want, bias_want, tf32);
}

template <auto kCompute>
Tensor conv_weighted_grad(const Tensor& input, const Tensor& grad_output, const Tensor& sample_weights,
                          Ints kernel_size, Ints stride, Ints padding, Ints dilation, int64_t groups,
                          bool tf32) {
  const Convolution conv(input, grad_output, kernel_size, stride, padding, nullptr, dilation, groups);
  return conv_weighted<kCompute>(conv, sample_weights, tf32);
}

template <auto kCompute>
Tensor conv_transpose_weighted_grad(const Tensor& input, const Tensor& grad_output,
                                    const Tensor& sample_weights, Ints kernel_size, Ints stride, Ints padding,
                                    Ints output_padding, Ints dilation, int64_t groups, bool tf32) {
  const Convolution conv(input, grad_output, kernel_size, stride, padding, &output_padding, dilation, groups);
  return conv_weighted<kCompute>(conv, sample_weights, tf32);
}

// Per-sample sums of grad_output [N, *] over every dim but 0 and channel_dim. kCompute(grad_output,
// channel_dim, want, bias), with channel_dim counted from the front.
template <auto kCompute>
FiveStats bias_grad_stats(const Tensor& grad_output, int64_t channel_dim, int64_t want) {
  channel_dim = check_bias_operand(grad_output, channel_dim, want);
  StatsTensors bias(grad_output, {grad_output.size(channel_dim)}, grad_output.size(0), want);
  if (grad_output.numel() == 0) {
    bias.fill_zero();
  } else if (want) {
    kCompute(grad_output, channel_dim, want, bias);
  }
  return as_tuple(bias);
}

}  // namespace backpack_cuda
