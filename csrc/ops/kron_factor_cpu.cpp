// Kronecker factors on the CPU: cpu/kron.h on rows or patches.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/kron.h"

namespace backpack_cuda::cpu {
namespace {

void compute(const KronSource& source, const KronUpdate& update, Tensor& out) {
  if (out.scalar_type() == ScalarType::Double)
    kron_factor(source, update, static_cast<double*>(out.mutable_data_ptr()));
  else
    kron_factor(source, update, static_cast<float*>(out.mutable_data_ptr()));
}

void linear(const Tensor& input, const KronUpdate& update, bool /*tf32: of CUDA*/, Tensor& out) {
  // Five dims of rows that do not merge are too rare for more than a copy.
  const Tensor rows = KronSource::row_dims(input) <= 4 ? input : torch::stable::contiguous(input);
  compute(KronSource(rows), update, out);
}

void conv(const Patches& patches, const KronUpdate& update, bool /*tf32: of CUDA*/, Tensor& out) {
  compute(KronSource(patches), update, out);
}

}  // namespace
}  // namespace backpack_cuda::cpu

STABLE_TORCH_LIBRARY_IMPL(backpack_cuda, CPU, m) {
  m.impl("linear_kron_factor", TORCH_BOX(&backpack_cuda::linear_kron_factor<backpack_cuda::cpu::linear>));
  m.impl("conv_kron_factor", TORCH_BOX(&backpack_cuda::conv_kron_factor<backpack_cuda::cpu::conv>));
}
