// The checks of outer_norm and its Params, shared by the CPU and the CUDA binding.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "common/check.h"
#include "ops/outer_norm.h"

namespace backpack_cuda {

struct OuterNormTensors {
  Tensor out;  // [N]
  OuterNormParams params;
};

inline OuterNormTensors prepare_outer_norm(const Tensor& input,          // [N, I]
                                           const Tensor& grad_output) {  // [N, O]
  check_operands(input, grad_output);
  STD_TORCH_CHECK(input.dim() == 2, "input and grad_output must be matrices, got ", shape_text(input),
                  " and ", shape_text(grad_output));
  OuterNormTensors result;
  result.out = torch::stable::new_empty(input, {input.size(0)}, statistics_dtype(input));
  result.params = {input.const_data_ptr(),
                   grad_output.const_data_ptr(),
                   result.out.mutable_data_ptr(),
                   input.size(0),
                   input.size(1),
                   grad_output.size(1),
                   {input.stride(0), input.stride(1)},
                   {grad_output.stride(0), grad_output.stride(1)}};
  return result;
}

}  // namespace backpack_cuda
