// Convolutions and transposed convolutions: checks, then cpu/conv.h with the roles of the operands.
#include <torch/csrc/stable/library.h>

#include "common/check.h"
#include "cpu/bias.h"
#include "cpu/conv.h"
#include "ops/convolution.h"
#include "ops/sample_weights.h"

namespace backpack_cuda::cpu {
namespace {

template <class Acc>
void compute(const Convolution& conv, int64_t weight_want, int64_t bias_want, const StatsTensors& weight,
             const StatsTensors& bias) {
  Workspace workspace;
  BiasStats<Acc> bias_stats(conv.grad_output, 1, bias_want, bias, workspace);
  const auto add_bias = [&](int64_t begin, int64_t end) { bias_stats.add(begin, end); };
  if (weight_want)
    conv_contract<Acc>(conv.image(), conv.pixels(), conv.geometry, weight_want, weight, add_bias);
  else
    add_bias(0, conv.grad_output.size(0));
  bias_stats.finish();
}

TenStats conv_stats(const Convolution& conv, int64_t weight_want, int64_t bias_want) {
  check_want(weight_want, "weight_want");
  check_want(bias_want, "bias_want");
  const Tensor &input = conv.input, &grad_output = conv.grad_output;
  StatsTensors weight(input, conv.weight_shape, input.size(0), weight_want),
      bias(grad_output, {grad_output.size(1)}, input.size(0), bias_want);
  if (zero_if_empty(input, grad_output, weight, bias, weight_want)) return as_tuple(weight, bias);
  if (input.scalar_type() == ScalarType::Double)
    compute<double>(conv, weight_want, bias_want, weight, bias);
  else
    compute<float>(conv, weight_want, bias_want, weight, bias);
  return as_tuple(weight, bias);
}

Tensor conv_weighted(const Convolution& conv, const Tensor& sample_weights) {
  check_sample_weights(sample_weights, conv.input);
  int64_t want = kGrad;
  StatsTensors weight(conv.input, conv.weight_shape, conv.input.size(0), want),
      bias(conv.grad_output, {conv.grad_output.size(1)}, conv.input.size(0), 0);
  zero_if_empty(conv.input, conv.grad_output, weight, bias, want);
  const auto compute = [&]<class Acc>(Acc) {
    const std::vector<Acc> weights = values<Acc>(sample_weights);
    const auto nothing = [](int64_t, int64_t) {};
    conv_contract<Acc>(conv.image(), conv.pixels(), conv.geometry, want, weight, nothing, weights.data());
  };
  if (want) conv.input.scalar_type() == ScalarType::Double ? compute(double()) : compute(float());
  return weight.grad;
}

TenStats conv_grad_stats(const Tensor& input, const Tensor& grad_output, Ints kernel_size, Ints stride,
                         Ints padding, Ints dilation, int64_t groups, int64_t weight_want, int64_t bias_want,
                         bool /*tf32: of CUDA*/) {
  const Convolution conv(input, grad_output, kernel_size, stride, padding, nullptr, dilation, groups);
  return conv_stats(conv, weight_want, bias_want);
}

TenStats conv_transpose_grad_stats(const Tensor& input, const Tensor& grad_output, Ints kernel_size,
                                   Ints stride, Ints padding, Ints output_padding, Ints dilation,
                                   int64_t groups, int64_t weight_want, int64_t bias_want,
                                   bool /*tf32: of CUDA*/) {
  const Convolution conv(input, grad_output, kernel_size, stride, padding, &output_padding, dilation, groups);
  return conv_stats(conv, weight_want, bias_want);
}

Tensor conv_weighted_grad(const Tensor& input, const Tensor& grad_output, const Tensor& sample_weights,
                          Ints kernel_size, Ints stride, Ints padding, Ints dilation, int64_t groups,
                          bool /*tf32: of CUDA*/) {
  const Convolution conv(input, grad_output, kernel_size, stride, padding, nullptr, dilation, groups);
  return conv_weighted(conv, sample_weights);
}

Tensor conv_transpose_weighted_grad(const Tensor& input, const Tensor& grad_output,
                                    const Tensor& sample_weights, Ints kernel_size, Ints stride, Ints padding,
                                    Ints output_padding, Ints dilation, int64_t groups,
                                    bool /*tf32: of CUDA*/) {
  const Convolution conv(input, grad_output, kernel_size, stride, padding, &output_padding, dilation, groups);
  return conv_weighted(conv, sample_weights);
}

}  // namespace
}  // namespace backpack_cuda::cpu

STABLE_TORCH_LIBRARY_IMPL(backpack_cuda, CPU, m) {
  m.impl("conv_grad_stats", TORCH_BOX(&backpack_cuda::cpu::conv_grad_stats));
  m.impl("conv_transpose_grad_stats", TORCH_BOX(&backpack_cuda::cpu::conv_transpose_grad_stats));
  m.impl("conv_weighted_grad", TORCH_BOX(&backpack_cuda::cpu::conv_weighted_grad));
  m.impl("conv_transpose_weighted_grad", TORCH_BOX(&backpack_cuda::cpu::conv_transpose_weighted_grad));
}
