// The second pass after splits of the positions: what the contract kernel's epilogue would have done.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/common/cuda_check.h"
#include "cuda/common/moments.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/contract/contract_params.h"

namespace backpack_cuda::cuda {
namespace {

constexpr int kThreads = 128;

}  // namespace

// One thread per element of the weight, all samples of it in turn.
template <class T>
__global__ void __launch_bounds__(kThreads)
    contract_join_parts_kernel(const __grid_constant__ ContractParams params, int64_t count) {
  const int64_t element = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t columns = (count + 31) / 32;  // of norms: one per warp
  const bool exists = element < count;
  float sum = 0, square = 0;
  for (int n = 0; n < params.N; ++n) {
    float g = 0;
    if (exists) {
      const float* const parts = params.partial_sums + int64_t{n} * params.t_splits * count + element;
#pragma unroll 8
      for (int s = 0; s < params.t_splits; ++s) g += parts[s * count];
      if (params.batch_grad) static_cast<T*>(params.batch_grad)[n * count + element] = static_cast<T>(g);
    }
    if (params.norms) {
      const float norm = sum_over_warp(g * g);
      if (threadIdx.x % 32 == 0 && exists) params.norms[n * columns + element / 32] = norm;
    }
    if (params.centered) {
      add_centered(g, SampleWeights(n), sum, square);
    } else {
      square = fmaf(g, g, square);
      sum = fmaf(params.weights ? params.weights[n] : 1.f, g, sum);
    }
  }
  if (!exists) return;
  if (params.grad) static_cast<T*>(params.grad)[element] = static_cast<T>(sum);
  if (params.sum_grad_centered_squared) params.sum_grad_centered_squared[element] = square;
  if (params.sum_grad_squared) {
    const float inverse_N = 1.f / static_cast<float>(params.N);
    params.sum_grad_squared[element] = params.centered ? uncentered(square, sum, inverse_N) : square;
  }
}

void contract_join_parts(const ContractParams& params, Element element, cudaStream_t stream) {
  const int64_t count = int64_t{params.groups} * params.O * params.I;
  auto* const kernel = element == Element::kFloat32    ? &contract_join_parts_kernel<float>
                       : element == Element::kBFloat16 ? &contract_join_parts_kernel<__nv_bfloat16>
                                                       : &contract_join_parts_kernel<__half>;
  const dim3 blocks(static_cast<unsigned>((count + kThreads - 1) / kThreads));
  KERNEL_LAUNCH(blocks, dim3(kThreads), 0, stream, kernel, params, count);
  check(cudaGetLastError(), "contract_join_parts");
}

}  // namespace backpack_cuda::cuda
