#include <torch/csrc/stable/library.h>

#include "cpu/bias.h"
#include "ops/operators.h"

namespace backpack_cuda::cpu {
namespace {

template <class Acc>
void compute(const Tensor& grad_output, int64_t channel_dim, int64_t want, const StatsTensors& bias) {
  Workspace workspace;
  BiasStats<Acc> stats(grad_output, channel_dim, want, bias, workspace);
  stats.add(0, grad_output.size(0));
  stats.finish();
}

void statistics(const Tensor& grad_output, int64_t channel_dim, int64_t want, const StatsTensors& bias) {
  if (grad_output.scalar_type() == ScalarType::Double)
    compute<double>(grad_output, channel_dim, want, bias);
  else
    compute<float>(grad_output, channel_dim, want, bias);
}

}  // namespace
}  // namespace backpack_cuda::cpu

STABLE_TORCH_LIBRARY_IMPL(backpack_cuda, CPU, m) {
  m.impl("bias_grad_stats", TORCH_BOX(&backpack_cuda::bias_grad_stats<backpack_cuda::cpu::statistics>));
}
