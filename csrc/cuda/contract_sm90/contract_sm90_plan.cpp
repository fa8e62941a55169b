// What the path for Hopper can do, and how its work is cut.
#include <algorithm>

#include "common/integers.h"
#include "cuda/contract_sm90/contract_sm90.h"
#include "cuda/contract_sm90/contract_sm90_params.h"
#include "cuda/contract_sm90/dense_rows.h"

namespace backpack_cuda::cuda {
namespace {

constexpr int kDims = 3;
// Coordinates are 32-bit and step past the end, strides have 40 bits of bytes.
constexpr int64_t kMaxExtent = int64_t{1} << 30, kMaxStrideBytes = int64_t{1} << 40;
constexpr int64_t kMinSlabsPerSplit = 4;  // the ring should fill at least once

// One stride for all positions, or -1.
int64_t stride_of_positions(const int (&positions)[kDims], const int64_t (&strides)[kDims]) {
  int64_t stride = 0, extent = 1;  // of the dims seen so far, from the last
  for (int d = kDims - 1; d >= 0; --d) {
    if (positions[d] == 1) continue;
    if (extent == 1) {
      stride = strides[d];
    } else if (strides[d] != stride * extent) {
      return -1;
    }
    extent *= positions[d];
  }
  return stride;
}

// The strides that TMA is documented to take: of whole rows within rows of samples. Those of dims with one
// element are free, and set to what they would be.
bool make_dense_rows(const Operand& operand, int channels, int64_t T, int64_t stride_t, int64_t N,
                     DenseRows* rows) {
  constexpr int64_t kElements = 16 / 2;  // of 16 bytes
  const int64_t row = round_up(channels, kElements);
  *rows = {operand.data, N, T, channels, N > 1 ? operand.stride_n : 0, T > 1 ? stride_t : row};
  if (N == 1) rows->stride_n = T * rows->stride_t;
  return reinterpret_cast<uintptr_t>(operand.data) % 16 == 0 && (channels == 1 || operand.stride_c == 1) &&
         rows->stride_t >= channels && rows->stride_t % kElements == 0 &&
         rows->stride_n >= T * rows->stride_t && rows->stride_n % rows->stride_t == 0 && T < kMaxExtent &&
         N < kMaxExtent && 2 * rows->stride_n < kMaxStrideBytes;
}

}  // namespace

bool find_dense_rows(const OuterProblem& p, DenseRows* a, DenseRows* b) {
  if (p.element == Element::kFloat32 || p.groups != 1) return false;
  int64_t strides[kDims];
  for (int d = 0; d < kDims; ++d) {
    if (p.kernel[d] != 1 || p.padding[d] != 0) return false;
    if (int64_t{p.positions[d] - 1} * p.step[d] >= p.size[d]) return false;
    strides[d] = p.a.stride[d] * p.step[d];
  }
  const int64_t a_stride = stride_of_positions(p.positions, strides);
  const int64_t b_stride = stride_of_positions(p.positions, p.b.stride);
  return a_stride >= 0 && b_stride >= 0 && make_dense_rows(p.a, p.channels, p.T(), a_stride, p.N, a) &&
         make_dense_rows(p.b, p.O, p.T(), b_stride, p.N, b) && ceil_div(p.O, kSm90Tile) <= 65535;
}

ContractSm90Plan plan_contract_sm90(const OuterProblem& p, const StatsOutputs& outputs, int sm_count,
                                    const Options& options) {
  if (options.sm_count > 0) sm_count = static_cast<int>(options.sm_count);
  ContractSm90Plan plan{};
  plan.tiles_o = static_cast<int>(ceil_div(p.O, kSm90Tile));
  plan.tiles_i = static_cast<int>(ceil_div(p.I(), kSm90Tile));
  const int64_t tiles = int64_t{plan.tiles_o} * plan.tiles_i, count = int64_t{p.O} * p.I();
  // One block per multiprocessor. All of them have work in the first round if that many splits are possible,
  // which also bounds the workspace.
  const int64_t slabs = p.N * ceil_div(p.T(), kSm90SlabRows);
  int64_t splits = std::min(sm_count / tiles, slabs / kMinSlabsPerSplit);
  if (options.splits > 0) splits = options.splits;
  plan.splits = static_cast<int>(std::clamp<int64_t>(splits, 1, std::min<int64_t>(p.N, 65535)));

  int64_t end = 0;
  const auto reserve = [&end](int64_t floats) {
    const int64_t begin = end;
    end += round_up(floats * 4, 256);
    return begin;
  };
  const bool partial = plan.splits > 1;
  plan.norms_at = reserve(outputs.batch_l2 && tiles > 1 ? p.N * tiles : 0);
  plan.sums_at = reserve(partial && (outputs.grad || outputs.squares()) ? plan.splits * count : 0);
  plan.squares_at = reserve(partial && outputs.squares() ? plan.splits * count : 0);
  plan.workspace_bytes = end;
  return plan;
}

}  // namespace backpack_cuda::cuda
