// Convolutions and transposed convolutions: checks, then cpu/conv.h with the roles of the operands.
#include <torch/csrc/stable/library.h>

#include "common/check.h"
#include "cpu/bias.h"
#include "cpu/conv.h"

namespace backpack_cuda::cpu {
namespace {

// The entries of one argument, in three dims.
ConvGeometry::Dims three(const std::vector<int64_t>& values, int64_t dims, int64_t least, int64_t missing,
                         const char* name) {
  STD_TORCH_CHECK(int64_t(values.size()) == dims, name, " must have ", dims, " entries, got ", values.size());
  ConvGeometry::Dims result{missing, missing, missing};
  for (int64_t d = 0; d < dims; ++d) {
    STD_TORCH_CHECK(values[d] >= least, name, " must be at least ", least, ", got ", values[d]);
    result[3 - dims + d] = values[d];
  }
  return result;
}

template <class Acc>
void compute(const Tensor& image, const Tensor& pixels, const Tensor& grad_output,
             const ConvGeometry& geometry, int64_t weight_want, int64_t bias_want, const StatsTensors& weight,
             const StatsTensors& bias) {
  Workspace workspace;
  BiasStats<Acc> bias_stats(grad_output, 1, bias_want, bias, workspace);
  const auto add_bias = [&](int64_t begin, int64_t end) { bias_stats.add(begin, end); };
  if (weight_want)
    conv_contract<Acc>(image, pixels, geometry, weight_want, weight, add_bias);
  else
    add_bias(0, grad_output.size(0));
  bias_stats.finish();
}

TenStats conv_stats(const Tensor& input, const Tensor& grad_output, const std::vector<int64_t>& kernel_size,
                    const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                    const std::vector<int64_t>* output_padding, const std::vector<int64_t>& dilation,
                    int64_t groups, int64_t weight_want, int64_t bias_want) {
  check_operands(input, grad_output);
  check_want(weight_want, "weight_want");
  check_want(bias_want, "bias_want");
  const int64_t dims = input.dim() - 2, N = input.size(0), C = input.size(1), O = grad_output.size(1);
  STD_TORCH_CHECK(dims >= 1 && dims <= 3, "input must have 1, 2 or 3 spatial dims, got shape ",
                  shape_text(input));
  STD_TORCH_CHECK(groups >= 1 && C % groups == 0 && O % groups == 0, "groups ", groups,
                  " must divide the channels of input ", shape_text(input), " and of grad_output ",
                  shape_text(grad_output));
  const ConvGeometry geometry{three(kernel_size, dims, 1, 1, "kernel_size"),
                              three(stride, dims, 1, 1, "stride"), three(padding, dims, 0, 0, "padding"),
                              three(dilation, dims, 1, 1, "dilation"), groups};
  if (output_padding) three(*output_padding, dims, 0, 0, "output_padding");
  for (int64_t d = 0; d < dims; ++d) {
    const int64_t reach = dilation[d] * (kernel_size[d] - 1) + 1, in = input.size(2 + d);
    const int64_t room = in + 2 * padding[d] - reach;
    const int64_t out = output_padding ? (in - 1) * stride[d] - 2 * padding[d] + reach + (*output_padding)[d]
                        : room < 0     ? (room >= -stride[d] ? 0 : -1)
                                       : room / stride[d] + 1;
    STD_TORCH_CHECK(grad_output.size(2 + d) == out, "grad_output ", shape_text(grad_output),
                    " must have size ", out, " in spatial dim ", d, " for input ", shape_text(input));
  }

  const bool transposed = output_padding != nullptr;
  const Tensor &image = transposed ? grad_output : input, &pixels = transposed ? input : grad_output;
  std::vector<int64_t> shape{pixels.size(1), image.size(1) / groups};
  shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
  StatsTensors weight(input, shape, N, weight_want), bias(grad_output, {O}, N, bias_want);
  if (zero_if_empty(input, grad_output, weight, bias, weight_want)) return as_tuple(weight, bias);
  if (input.scalar_type() == ScalarType::Double)
    compute<double>(image, pixels, grad_output, geometry, weight_want, bias_want, weight, bias);
  else
    compute<float>(image, pixels, grad_output, geometry, weight_want, bias_want, weight, bias);
  return as_tuple(weight, bias);
}

TenStats conv_grad_stats(const Tensor& input, const Tensor& grad_output, std::vector<int64_t> kernel_size,
                         std::vector<int64_t> stride, std::vector<int64_t> padding,
                         std::vector<int64_t> dilation, int64_t groups, int64_t weight_want,
                         int64_t bias_want) {
  return conv_stats(input, grad_output, kernel_size, stride, padding, nullptr, dilation, groups, weight_want,
                    bias_want);
}

TenStats conv_transpose_grad_stats(const Tensor& input, const Tensor& grad_output,
                                   std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                                   std::vector<int64_t> padding, std::vector<int64_t> output_padding,
                                   std::vector<int64_t> dilation, int64_t groups, int64_t weight_want,
                                   int64_t bias_want) {
  return conv_stats(input, grad_output, kernel_size, stride, padding, &output_padding, dilation, groups,
                    weight_want, bias_want);
}

}  // namespace
}  // namespace backpack_cuda::cpu

STABLE_TORCH_LIBRARY_IMPL(backpack_cuda, CPU, m) {
  m.impl("conv_grad_stats", TORCH_BOX(&backpack_cuda::cpu::conv_grad_stats));
  m.impl("conv_transpose_grad_stats", TORCH_BOX(&backpack_cuda::cpu::conv_transpose_grad_stats));
}
