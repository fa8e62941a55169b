#include "cuda/common/cuda_check.h"
#include "cuda/merge/merge.cuh"

namespace backpack_cuda::cuda {
namespace {

constexpr int64_t kMaxBlocks = 1 << 14;  // enough to fill any chip; blocks take several elements beyond

dim3 blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

template <class T>
void launch_merge(const SplitSums& sums, const StatsOutputs& out, cudaStream_t stream) {
  auto* const kernel = &merge_splits_kernel<T>;
  KERNEL_LAUNCH(blocks_for(sums.count, 32), dim3(kMergeThreads), 0, stream, kernel, sums,
                static_cast<T*>(out.grad), out.sum_grad_squared, out.sum_grad_centered_squared);
  check(cudaGetLastError(), "merge_splits");
}

}  // namespace

void sum_rows(const float* partial, float* out, int64_t rows, int64_t columns, cudaStream_t stream) {
  KERNEL_LAUNCH(blocks_for(rows, kSumRowsPerBlock), dim3(32 * kSumRowsPerBlock), 0, stream, sum_rows_kernel,
                partial, out, rows, columns);
  check(cudaGetLastError(), "sum_rows");
}

void merge_splits(const SplitSums& sums, Element element, const StatsOutputs& out, cudaStream_t stream) {
  switch (element) {
    case Element::kFloat32:
      return launch_merge<float>(sums, out, stream);
    case Element::kBFloat16:
      return launch_merge<__nv_bfloat16>(sums, out, stream);
    case Element::kFloat16:
      return launch_merge<__half>(sums, out, stream);
  }
}

}  // namespace backpack_cuda::cuda
