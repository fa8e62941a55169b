// Kronecker factors on CUDA.
#include "ops/kron_factor.h"

#include "common/operator_library.h"
#include "cuda/kron_factor/kron_factor.h"
#include "ops/outer_problem_of.h"

namespace backpack_cuda::cuda {
namespace {

void update(KronProblem& problem, const KronUpdate& update, bool tf32, const Tensor& out,
            const CudaCall& call) {
  problem.tf32 = tf32;
  problem.homogeneous = update.homogeneous;
  problem.scale = static_cast<float>(update.scale), problem.decay = static_cast<float>(update.decay);
  problem.out = static_cast<float*>(out.mutable_data_ptr());
  const KronPlan plan = plan_kron_factor(problem, call.sm_count(), options());
  const Tensor workspace = call.workspace(plan.workspace_bytes);
  launch_kron_factor(problem, plan, workspace.mutable_data_ptr(), call.stream);
}

// The leading dims of input [*, D] as positions of one sample, and as samples what does not fit there.
void linear(const Tensor& input, const KronUpdate& terms, bool tf32, const Tensor& out) {
  const CudaCall call(input);
  const int64_t last = input.dim() - 1;
  std::vector<int64_t> leading;
  for (int64_t d = 0; d < last; ++d) leading.push_back(d);
  Tensor operand = input;
  MergedDims dims(operand, operand, leading);
  if (dims.sizes.size() > 4) {
    operand = torch::stable::contiguous(operand);
    dims = MergedDims(operand, operand, leading);
  }
  int64_t rows = 1;
  for (const int64_t size : dims.sizes) rows *= size;
  const bool samples = dims.sizes.size() > 3 || rows > INT32_MAX;
  KronProblem problem{};
  problem.element = element_of(operand);
  problem.N = samples ? dims.sizes[0] : 1;
  problem.groups = 1;
  problem.channels = as_int(operand.size(last), "the features of input");
  problem.x = {operand.const_data_ptr(), samples ? dims.strides[0][0] : 0, operand.stride(last), {0, 0, 0}};
  const int missing = 3 - (int(dims.sizes.size()) - samples);
  for (int d = 0; d < 3; ++d) {
    const int from = d - missing + samples;
    problem.positions[d] = d < missing ? 1 : as_int(dims.sizes[from], "a dim of input");
    problem.x.stride[d] = d < missing ? 0 : dims.strides[from][0];
    problem.size[d] = problem.positions[d];
    problem.kernel[d] = problem.step[d] = problem.dilation[d] = 1;
  }
  as_int(problem.T(), "the number of positions");
  update(problem, terms, tf32, out, call);
}

void convolution(const Patches& patches, const KronUpdate& terms, bool tf32, const Tensor& out) {
  const CudaCall call(patches.input);
  const Tensor& input = patches.input;
  const ConvGeometry& geometry = patches.geometry;
  KronProblem problem{};
  problem.element = element_of(input);
  problem.N = input.size(0);
  problem.groups = as_int(geometry.groups, "groups");
  problem.channels = as_int(input.size(1) / geometry.groups, "the channels");
  problem.x = {input.const_data_ptr(), input.stride(0), input.stride(1), {0, 0, 0}};
  const int missing = 5 - int(input.dim());
  double volume = 1, T = 1;
  for (int d = 0; d < 3; ++d) {
    const int from = d < missing ? -1 : 2 + d - missing;
    problem.size[d] = from < 0 ? 1 : as_int(input.size(from), "a spatial dim");
    problem.x.stride[d] = from < 0 ? 0 : input.stride(from);
    problem.positions[d] = as_int(patches.positions[d], "positions");
    problem.kernel[d] = as_int(geometry.kernel[d], "kernel_size");
    problem.step[d] = as_int(geometry.stride[d], "stride");
    problem.padding[d] = as_int(geometry.padding[d], "padding");
    problem.dilation[d] = as_int(geometry.dilation[d], "dilation");
    // Coordinates of the input that a patch reaches, and lags, in half of what 32 bits hold.
    const int64_t reach = patches.positions[d] * geometry.stride[d] +
                          geometry.kernel[d] * geometry.dilation[d] + std::abs(geometry.padding[d]);
    STD_TORCH_CHECK(reach + problem.size[d] < int64_t{1} << 30,
                    "the padded input must be below 2^30 for the CUDA kernels in each spatial dim, got ",
                    reach);
    volume *= problem.kernel[d], T *= problem.positions[d];
  }
  STD_TORCH_CHECK(T <= INT32_MAX, "the number of positions must be below 2^31 for the CUDA kernels, got ", T);
  STD_TORCH_CHECK(volume * problem.channels <= INT32_MAX,
                  "the entries of a patch must be below 2^31 for the CUDA kernels, got ",
                  volume * problem.channels);
  update(problem, terms, tf32, out, call);
}

}  // namespace
}  // namespace backpack_cuda::cuda

CUDA_IMPLEMENTATIONS(m) {
  m.impl("linear_kron_factor", TORCH_BOX(&backpack_cuda::linear_kron_factor<backpack_cuda::cuda::linear>));
  m.impl("conv_kron_factor", TORCH_BOX(&backpack_cuda::conv_kron_factor<backpack_cuda::cuda::convolution>));
}
