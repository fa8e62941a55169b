// The operators' own checks: a second line behind those of the Python layer.
#pragma once
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "common/dtype.h"
#include "ops/grad_stats.h"

namespace backpack_cuda {

// "[2, 3]"
inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

inline void check_want(int64_t want, const char* name) {
  STD_TORCH_CHECK(want >= 0 && want <= kEveryWant, name, " must be a set of the bits 1, 2, 4, 8, 16, got ",
                  want);
}

// Both operands of a per-sample gradient: same device, dtype and batch size.
inline void check_operands(const Tensor& input, const Tensor& grad_output) {
  STD_TORCH_CHECK(
      input.is_cpu() == grad_output.is_cpu() && input.get_device_index() == grad_output.get_device_index(),
      "input and grad_output must be on the same device");
  STD_TORCH_CHECK(input.scalar_type() == grad_output.scalar_type(),
                  "input and grad_output must have the same dtype");
  check_floating(input, "input");
  STD_TORCH_CHECK(
      input.dim() >= 2 && input.dim() == grad_output.dim() && input.size(0) == grad_output.size(0),
      "input and grad_output must have the same number of dims (at least 2) and the same batch size, got ",
      shape_text(input), " and ", shape_text(grad_output));
}

// input [N, *, I], grad_output [N, *, O]
inline void check_linear_operands(const Tensor& input, const Tensor& grad_output) {
  check_operands(input, grad_output);
  for (int64_t d = 0; d < input.dim() - 1; ++d)
    STD_TORCH_CHECK(input.size(d) == grad_output.size(d),
                    "input and grad_output must agree in all dims but the last, got ", shape_text(input),
                    " and ", shape_text(grad_output));
}

// Returns channel_dim counted from the front.
inline int64_t check_bias_operand(const Tensor& grad_output, int64_t channel_dim, int64_t want) {
  check_floating(grad_output, "grad_output");
  check_want(want, "want");
  const int64_t dims = grad_output.dim();
  if (channel_dim < 0) channel_dim += dims;
  STD_TORCH_CHECK(dims >= 2 && channel_dim >= 1 && channel_dim < dims,
                  "channel_dim must name a dim of grad_output ", shape_text(grad_output),
                  " other than the first");
  return channel_dim;
}

}  // namespace backpack_cuda
