#include "ops/convolution.h"

#include "common/check.h"

namespace backpack_cuda {
namespace {

// The entries of one argument, in three dims.
ConvGeometry::Dims three(const Ints& values, int64_t dims, int64_t least, int64_t missing, const char* name) {
  STD_TORCH_CHECK(int64_t(values.size()) == dims, name, " must have ", dims, " entries, got ", values.size());
  ConvGeometry::Dims result{missing, missing, missing};
  for (int64_t d = 0; d < dims; ++d) {
    STD_TORCH_CHECK(values[d] >= least, name, " must be at least ", least, ", got ", values[d]);
    result[3 - dims + d] = values[d];
  }
  return result;
}

void check_image(const Tensor& input) {
  STD_TORCH_CHECK(input.dim() >= 3 && input.dim() <= 5, "input must have 1, 2 or 3 spatial dims, got shape ",
                  shape_text(input));
}

}  // namespace

Convolution::Convolution(const Tensor& input, const Tensor& grad_output, const Ints& kernel_size,
                         const Ints& stride, const Ints& padding, const Ints* output_padding,
                         const Ints& dilation, int64_t groups)
    : input(input), grad_output(grad_output), transposed(output_padding != nullptr) {
  check_operands(input, grad_output);
  const int64_t dims = input.dim() - 2, C = input.size(1), O = grad_output.size(1);
  check_image(input);
  STD_TORCH_CHECK(groups >= 1 && C % groups == 0 && O % groups == 0, "groups ", groups,
                  " must divide the channels of input ", shape_text(input), " and of grad_output ",
                  shape_text(grad_output));
  geometry = {three(kernel_size, dims, 1, 1, "kernel_size"), three(stride, dims, 1, 1, "stride"),
              three(padding, dims, 0, 0, "padding"), three(dilation, dims, 1, 1, "dilation"), groups};
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
  weight_shape = {pixels().size(1), image().size(1) / groups};
  weight_shape.insert(weight_shape.end(), kernel_size.begin(), kernel_size.end());
}

Patches::Patches(const Tensor& input, const Ints& kernel_size, const Ints& stride, const Ints& padding,
                 const Ints& dilation, const Ints& positions, int64_t groups)
    : input(input) {
  check_floating(input, "input");
  check_image(input);
  constexpr int64_t kAny = -(int64_t{1} << 31);
  const int64_t dims = input.dim() - 2;
  STD_TORCH_CHECK(groups >= 1 && input.size(1) % groups == 0, "groups ", groups,
                  " must divide the channels of input ", shape_text(input));
  geometry = {three(kernel_size, dims, 1, 1, "kernel_size"), three(stride, dims, 1, 1, "stride"),
              three(padding, dims, kAny, 0, "padding"), three(dilation, dims, 1, 1, "dilation"), groups};
  this->positions = three(positions, dims, 0, 1, "positions");
}

}  // namespace backpack_cuda
