// The arguments of the convolution operators, checked.
#pragma once
#include <array>
#include <vector>

#include "common/dtype.h"

namespace backpack_cuda {

using Ints = std::vector<int64_t>;

// A convolution in three spatial dims; those that the layer lacks come first, with kernel 1.
struct ConvGeometry {
  using Dims = std::array<int64_t, 3>;
  Dims kernel, stride, padding, dilation;
  int64_t groups;
};

// The checked arguments of a convolution, or with output_padding of a transposed one.
struct Convolution {
  const Tensor &input, &grad_output;
  ConvGeometry geometry;
  bool transposed;
  Ints weight_shape;

  Convolution(const Tensor& input, const Tensor& grad_output, const Ints& kernel_size, const Ints& stride,
              const Ints& padding, const Ints* output_padding, const Ints& dilation, int64_t groups);
  const Tensor& image() const { return transposed ? grad_output : input; }
  const Tensor& pixels() const { return transposed ? input : grad_output; }
};

// The checked arguments of a convolution's patches alone: the entries x[n, c, o * stride + k * dilation -
// padding] of x = input [N, C, *], in the order (c, *k), and zeros outside, for all o < positions. Any number
// of positions per dim, 0 too, and any padding, negative too.
struct Patches {
  const Tensor& input;
  ConvGeometry geometry;
  ConvGeometry::Dims positions;

  Patches(const Tensor& input, const Ints& kernel_size, const Ints& stride, const Ints& padding,
          const Ints& dilation, const Ints& positions, int64_t groups);
  // Entries of one patch of one group.
  int64_t size() const {
    return input.size(1) / geometry.groups * geometry.kernel[0] * geometry.kernel[1] * geometry.kernel[2];
  }
};

}  // namespace backpack_cuda
