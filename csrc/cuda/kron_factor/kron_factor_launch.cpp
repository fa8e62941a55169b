// From the problem and the plan to the kernels' arguments.
#include <algorithm>
#include <iterator>

#include "cuda/kron_factor/kron_factor_job.h"

namespace backpack_cuda::cuda {
namespace {

// By ContractPrecision, and by ContractLoader from kChannelsLast on.
constexpr KronLauncher kLaunchers[4][3] = {
    {kron_factor_tf32_channels, kron_factor_tf32_positions, kron_factor_tf32_elements},
    {kron_factor_tf32x3_channels, kron_factor_tf32x3_positions, kron_factor_tf32x3_elements},
    {kron_factor_bfloat16_channels, kron_factor_bfloat16_positions, kron_factor_bfloat16_elements},
    {kron_factor_float16_channels, kron_factor_float16_positions, kron_factor_float16_elements},
};

}  // namespace

void launch_kron_factor(const KronProblem& p, const KronPlan& plan, void* workspace, cudaStream_t stream) {
  KronJob job{};
  job.data = p.x.data;
  job.stride_n = p.x.stride_n;
  job.stride_c = p.x.stride_c;
  job.N = p.N;
  for (int d = 0; d < 3; ++d) {
    job.stride[d] = p.x.stride[d];
    job.size[d] = p.size[d];
    job.step[d] = p.step[d];
    job.dilation[d] = p.dilation[d];
    job.kernel[d] = plan.lags ? 1 : p.kernel[d];
    job.layer_kernel[d] = p.kernel[d];
  }
  job.lags = plan.lags;
  job.channels_inner = plan.loader == ContractLoader::kChannelsLast;
  job.whole_copies = plan.whole_copies;
  job.groups = plan.groups;
  job.columns = plan.columns;
  job.channels = p.channels * plan.groups_per_tile;
  job.total_channels = p.channels * p.groups;
  std::copy(std::begin(plan.axes), std::end(plan.axes), job.axes);
  job.edge = plan.tile == ContractTile::k64 ? 64 : 128;
  job.partial = plan.final ? nullptr : static_cast<float*>(workspace);
  job.ways = plan.ways;
  job.out = p.out;
  job.layer_groups = p.groups;
  job.groups_per_tile = plan.groups_per_tile;
  job.layer_channels = p.channels;
  job.homogeneous = p.homogeneous;
  job.scale = p.scale;
  job.decay = p.decay;
  job.count = static_cast<float>(p.N * p.T());
  job.products = plan.products;
  std::copy(std::begin(plan.first_item), std::end(plan.first_item), job.first_item);

  if (job.first_item[job.products] > 0) {
    kLaunchers[static_cast<int>(plan.precision)][static_cast<int>(plan.loader) - 2](job, plan.tile, stream);
  }
  if (!plan.final) kron_factor_finish(job, stream);
}

}  // namespace backpack_cuda::cuda
