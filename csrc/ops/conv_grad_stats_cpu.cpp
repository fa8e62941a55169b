// Convolutions and transposed convolutions: cpu/conv.h with the roles of the operands.
#include <torch/csrc/stable/library.h>

#include "cpu/bias.h"
#include "cpu/conv.h"
#include "ops/operators.h"

namespace backpack_cuda::cpu {
namespace {

template <class Acc>
void compute(const Convolution& conv, int64_t weight_want, int64_t bias_want, const StatsTensors& weight,
             const StatsTensors& bias) {
  Workspace workspace;
  BiasStats<Acc> bias_stats(conv.grad_output, 1, bias_want, bias, workspace);
  const auto add_bias = [&](int64_t begin, int64_t end) { bias_stats.add(begin, end); };
  if (weight_want)
    conv_contract<Acc>(conv, {weight, weight_want}, add_bias);
  else
    add_bias(0, conv.grad_output.size(0));
  bias_stats.finish();
}

void statistics(const Convolution& conv, int64_t weight_want, int64_t bias_want, bool /*tf32: of CUDA*/,
                const StatsTensors& weight, const StatsTensors& bias) {
  if (conv.input.scalar_type() == ScalarType::Double)
    compute<double>(conv, weight_want, bias_want, weight, bias);
  else
    compute<float>(conv, weight_want, bias_want, weight, bias);
}

void weighted_sum(const Convolution& conv, const Tensor& sample_weights, bool /*tf32: of CUDA*/,
                  const StatsTensors& weight) {
  const auto compute = [&]<class Acc>(Acc) {
    const std::vector<Acc> weights = values<Acc>(sample_weights);
    const auto nothing = [](int64_t, int64_t) {};
    conv_contract<Acc>(conv, {weight, kGrad}, nothing, weights.data());
  };
  conv.input.scalar_type() == ScalarType::Double ? compute(double()) : compute(float());
}

}  // namespace
}  // namespace backpack_cuda::cpu

STABLE_TORCH_LIBRARY_IMPL(backpack_cuda, CPU, m) {
  m.impl("conv_grad_stats", TORCH_BOX(&backpack_cuda::conv_grad_stats<backpack_cuda::cpu::statistics>));
  m.impl("conv_transpose_grad_stats",
         TORCH_BOX(&backpack_cuda::conv_transpose_grad_stats<backpack_cuda::cpu::statistics>));
  m.impl("conv_weighted_grad",
         TORCH_BOX(&backpack_cuda::conv_weighted_grad<backpack_cuda::cpu::weighted_sum>));
  m.impl("conv_transpose_weighted_grad",
         TORCH_BOX(&backpack_cuda::conv_transpose_weighted_grad<backpack_cuda::cpu::weighted_sum>));
}
