// From tensors to the plain problem that the CUDA kernels take. For the host compiler.
#pragma once

#include <array>
#include <vector>

#include "common/check.h"
#include "common/stats_tensors.h"
#include "ops/convolution.h"
#include "ops/cuda_call.h"

namespace backpack_cuda::cuda {

// Some dims of one or two tensors of the same sizes there, merged where one stride serves both; dims of size
// 1 are dropped. Index 1 of the strides is the second tensor's.
struct MergedDims {
  std::vector<int64_t> sizes;
  std::vector<std::array<int64_t, 2>> strides;

  MergedDims(const Tensor& first, const Tensor& second, const std::vector<int64_t>& dims) {
    for (const int64_t d : dims) {
      const int64_t size = first.size(d);
      const std::array<int64_t, 2> stride{first.stride(d), second.stride(d)};
      if (size == 1) continue;
      if (!sizes.empty() && strides.back()[0] == size * stride[0] && strides.back()[1] == size * stride[1]) {
        sizes.back() *= size, strides.back() = stride;
      } else {
        sizes.push_back(size), strides.push_back(stride);
      }
    }
  }
};

inline int as_int(int64_t value, const char* what) {
  STD_TORCH_CHECK(value < int64_t{1} << 31, what, " must be below 2^31 for the CUDA kernels, got ", value);
  return int(value);
}

// The results' memory; null where they are not wanted. weights: contiguous [N], of a weighted sum.
inline StatsOutputs outputs_of(const StatsTensors& p, int64_t want, const Tensor* weights = nullptr) {
  return {data_or_null(p.grad, want & kGrad),
          data_or_null(p.batch_grad, want & kBatchGrad),
          data_or_null<float>(p.batch_l2, want & kBatchL2),
          data_or_null<float>(p.sum_grad_squared, want & kSumGradSquared),
          data_or_null<float>(p.sum_grad_centered_squared, want & kSumGradCenteredSquared),
          weights ? static_cast<const float*>(weights->const_data_ptr()) : nullptr};
}

// A Linear layer as a convolution with kernel 1 over its middle dims. Where these do not merge to three, the
// operands are copied.
class LinearProblem {
 public:
  LinearProblem(const Tensor& input,        // [N, *, I]
                const Tensor& grad_output,  // [N, *, O]
                bool tf32)
      : input_(input), grad_output_(grad_output) {
    const int64_t last = input.dim() - 1;
    if (!merges(input_, grad_output_)) {
      input_ = torch::stable::contiguous(input_), grad_output_ = torch::stable::contiguous(grad_output_);
    }
    const MergedDims dims = middle(input_, grad_output_);
    p.element = element_of(input), p.tf32 = tf32;
    p.N = as_int(input.size(0), "the batch size"), p.groups = 1;
    p.O = as_int(grad_output.size(last), "the features of grad_output");
    p.channels = as_int(input.size(last), "the features of input");
    p.a = {input_.const_data_ptr(), input_.stride(0), input_.stride(last), {0, 0, 0}};
    p.b = {grad_output_.const_data_ptr(), grad_output_.stride(0), grad_output_.stride(last), {0, 0, 0}};
    int64_t T = 1;
    for (int d = 0; d < 3; ++d) {
      const int from = d - (3 - int(dims.sizes.size()));
      p.positions[d] = p.size[d] = from < 0 ? 1 : as_int(dims.sizes[from], "a dim of input");
      p.a.stride[d] = from < 0 ? 0 : dims.strides[from][0];
      p.b.stride[d] = from < 0 ? 0 : dims.strides[from][1];
      p.kernel[d] = p.step[d] = p.dilation[d] = 1, p.padding[d] = 0;
      T *= p.positions[d];
    }
    as_int(T, "the number of positions");
  }

  // Whether the operands are read where they are.
  static bool merges(const Tensor& input, const Tensor& grad_output) {
    return middle(input, grad_output).sizes.size() <= 3;
  }

  OuterProblem p;

 private:
  static MergedDims middle(const Tensor& input, const Tensor& grad_output) {
    std::vector<int64_t> dims;
    for (int64_t d = 1; d < input.dim() - 1; ++d) dims.push_back(d);
    return MergedDims(input, grad_output, dims);
  }

  Tensor input_, grad_output_;  // keep copies alive
};

// One spatial dim in front for each that the layer lacks.
inline OuterProblem problem_of(const Convolution& conv, bool tf32) {
  const Tensor &image = conv.image(), &pixels = conv.pixels();
  OuterProblem p;
  p.element = element_of(image), p.tf32 = tf32;
  p.N = as_int(image.size(0), "the batch size");
  p.groups = as_int(conv.geometry.groups, "groups");
  p.O = as_int(pixels.size(1) / conv.geometry.groups, "the channels");
  p.channels = as_int(image.size(1) / conv.geometry.groups, "the channels");
  p.a = {image.const_data_ptr(), image.stride(0), image.stride(1), {0, 0, 0}};
  p.b = {pixels.const_data_ptr(), pixels.stride(0), pixels.stride(1), {0, 0, 0}};
  const int missing = 5 - int(image.dim());
  int64_t T = 1, volume = 1;
  for (int d = 0; d < 3; ++d) {
    const int from = d < missing ? -1 : 2 + d - missing;
    p.size[d] = from < 0 ? 1 : as_int(image.size(from), "a spatial dim");
    p.positions[d] = from < 0 ? 1 : as_int(pixels.size(from), "a spatial dim");
    p.a.stride[d] = from < 0 ? 0 : image.stride(from);
    p.b.stride[d] = from < 0 ? 0 : pixels.stride(from);
    p.kernel[d] = as_int(conv.geometry.kernel[d], "kernel_size");
    p.step[d] = as_int(conv.geometry.stride[d], "stride");
    p.padding[d] = as_int(conv.geometry.padding[d], "padding");
    p.dilation[d] = as_int(conv.geometry.dilation[d], "dilation");
    // Coordinates of the image that a kernel position reaches.
    as_int(p.positions[d] * int64_t{p.step[d]} + p.kernel[d] * int64_t{p.dilation[d]} + p.padding[d],
           "the padded image");
    T *= p.positions[d], volume *= p.kernel[d];
  }
  as_int(T, "the number of positions");
  as_int(volume * p.channels, "the weights of one output channel");
  return p;
}

}  // namespace backpack_cuda::cuda
