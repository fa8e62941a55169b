#include "cuda/columns/column_sums.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/integers.h"
#include "cuda/common/cuda_check.h"
#include "cuda/common/kernel.h"
#include "cuda/merge/merge.h"

namespace backpack_cuda::cuda {
namespace {

constexpr int kMaxWarps = 8;

}  // namespace

// A lane owns an element of the parameter, and warp w takes its columns w, w + warps, ...: the order of all
// sums is fixed.
template <class T, class Factor>
__global__ void __launch_bounds__(32 * kMaxWarps, 4)
    column_sums_kernel(const GradientsInMemory gradients, const ColumnOutputs columns, float* partial,
                       int splits) {
  KERNEL_SHARED(squares, float[2][kMaxWarps][32]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t element = int64_t{blockIdx.x / splits} * 32 + lane, count = gradients.count, N = gradients.N;
  const bool exists = element < count, sums = columns.batch_diag || columns.diag;
  const int split = blockIdx.x % splits;
  const int64_t begin = N * split / splits, end = N * (split + 1) / splits;
  const T* const values =
      static_cast<const T*>(gradients.data) + (exists ? element * gradients.stride_element : 0);
  float diag = 0;
  for (int64_t n = begin; n < end; ++n) {
    float square = 0;
#pragma unroll 4
    for (int v = exists ? warp : columns.V; v < columns.V; v += warps) {
      const T* const parts = values + v * gradients.stride_v + n * gradients.stride_n;
      float g = 0;
      for (int part = 0; part < gradients.parts; ++part) {
        g += static_cast<float>(parts[part * gradients.stride_part]);
      }
      const int64_t row = v * N + n;
      if (columns.factor)
        static_cast<Factor*>(columns.factor)[row * count + element] = static_cast<Factor>(g);
      square = fmaf((columns.signs ? columns.signs[row] : 1.f) * g, g, square);
    }
    if (!sums) continue;
    // Two buffers in turn: who still reads those of the last n is not disturbed.
    squares[n % 2][warp][lane] = square;
    __syncthreads();  // the shares of all warps are there
    if (warp != 0 || !exists) continue;
    for (int w = 1; w < warps; ++w) square += squares[n % 2][w][lane];
    if (columns.batch_diag) columns.batch_diag[n * count + element] = square;
    diag += square;
  }
  if (warp == 0 && exists && columns.diag) (partial ? partial + split * count : columns.diag)[element] = diag;
}

ColumnSumsPlan plan_column_sums(int64_t N, const ColumnOutputs& columns, int64_t count, int sm_count) {
  ColumnSumsPlan plan{};
  plan.warps = power_of_two_from(columns.V) < kMaxWarps ? power_of_two_from(columns.V) : kMaxWarps;
  const int64_t blocks = ceil_div(count, 32), wanted = int64_t{sm_count} * 64 / plan.warps;
  int64_t splits = blocks < wanted ? wanted / blocks : 1;
  if (splits > N) splits = N;
  plan.splits = static_cast<int>(splits);
  plan.workspace_floats = columns.diag && splits > 1 ? splits * count : 0;
  return plan;
}

namespace {

template <class T, class Factor>
void launch(const GradientsInMemory& gradients, const ColumnOutputs& columns, const ColumnSumsPlan& plan,
            float* partial, cudaStream_t stream) {
  auto* const kernel = &column_sums_kernel<T, Factor>;
  const dim3 blocks(static_cast<unsigned>(ceil_div(gradients.count, 32) * plan.splits));
  KERNEL_LAUNCH(blocks, dim3(32 * plan.warps), 0, stream, kernel, gradients, columns, partial, plan.splits);
  check(cudaGetLastError(), "column_sums");
}

}  // namespace

void launch_column_sums(const GradientsInMemory& gradients, const ColumnOutputs& columns, Element output,
                        const ColumnSumsPlan& plan, float* workspace, cudaStream_t stream) {
  float* const partial = plan.workspace_floats ? workspace : nullptr;
  auto* launch_typed = &launch<float, float>;
  if (gradients.element == Element::kFloat32) {
    if (output == Element::kBFloat16) launch_typed = &launch<float, __nv_bfloat16>;
    if (output == Element::kFloat16) launch_typed = &launch<float, __half>;
  } else {  // of the operands' type
    launch_typed = gradients.element == Element::kBFloat16 ? &launch<__nv_bfloat16, __nv_bfloat16>
                                                           : &launch<__half, __half>;
  }
  launch_typed(gradients, columns, plan, partial, stream);
  if (partial) {
    StatsOutputs out{};
    out.grad = columns.diag;
    merge_splits({plan.splits, gradients.N, gradients.count, partial, nullptr, false}, Element::kFloat32, out,
                 stream);
  }
}

}  // namespace backpack_cuda::cuda
