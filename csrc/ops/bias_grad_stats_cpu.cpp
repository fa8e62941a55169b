#include <torch/csrc/stable/library.h>

#include "common/check.h"
#include "cpu/bias.h"

namespace backpack_cuda::cpu {
namespace {

template <class Acc>
void compute(const Tensor& grad_output, int64_t channel_dim, int64_t want, const StatsTensors& bias) {
  Workspace workspace;
  BiasStats<Acc> stats(grad_output, channel_dim, want, bias, workspace);
  stats.add(0, grad_output.size(0));
  stats.finish();
}

FiveStats bias_grad_stats(const Tensor& grad_output, int64_t channel_dim, int64_t want) {
  channel_dim = check_bias_operand(grad_output, channel_dim, want);
  StatsTensors bias(grad_output, {grad_output.size(channel_dim)}, grad_output.size(0), want);
  if (grad_output.numel() == 0)
    bias.fill_zero();
  else if (grad_output.scalar_type() == ScalarType::Double)
    compute<double>(grad_output, channel_dim, want, bias);
  else
    compute<float>(grad_output, channel_dim, want, bias);
  return as_tuple(bias);
}

}  // namespace
}  // namespace backpack_cuda::cpu

STABLE_TORCH_LIBRARY_IMPL(backpack_cuda, CPU, m) {
  m.impl("bias_grad_stats", TORCH_BOX(&backpack_cuda::cpu::bias_grad_stats));
}
