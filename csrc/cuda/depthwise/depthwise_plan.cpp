// Which thread does what. Host code: no call of CUDA.
#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>

#include "common/integers.h"
#include "cuda/depthwise/depthwise.h"

namespace backpack_cuda::cuda {
namespace {

constexpr int kFewestSlots = 4;  // so that a block's elements take at most 46 KB of shared memory
constexpr int kWarp = 32;
constexpr int64_t kMaxPartialBytes = int64_t{32} << 20;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

void choose_box(const OuterProblem& problem, DepthwisePlan& plan) {
  const int* const kernel = problem.kernel;
  const bool rolls = problem.step[1] == problem.dilation[1] && kernel[1] > 1;
  int rows = 3, columns = 3;
  // The kernel has 32 bits for an element's place in the window, which only huge strides exceed.
  const int64_t down = std::abs(problem.a.stride[1]) * problem.dilation[1];
  const int64_t right = std::abs(problem.a.stride[2]) * problem.dilation[2];
  if (std::max(down * 6, right * 4) >= (int64_t{1} << 30)) {
    plan.box = DepthwiseBox::k1x5, rows = 1, columns = 1;
  } else if (kernel[1] == 1) {
    plan.box = DepthwiseBox::k1x5, rows = 1, columns = 5;
  } else if (rolls && kernel[1] > 5) {  // tall boxes load the fewest elements per product
    plan.box = DepthwiseBox::k7x2Rolling, rows = 7, columns = 2;
  } else if (rolls && kernel[1] > 3) {
    plan.box = DepthwiseBox::k5x3Rolling, rows = 5, columns = 3;
  } else {
    plan.box = rolls ? DepthwiseBox::k3x3Rolling : DepthwiseBox::k3x3;
  }
  plan.box_rows = rows;
  plan.box_columns = columns;
  plan.chunks[0] = kernel[0];
  plan.chunks[1] = static_cast<int>(ceil_div(kernel[1], rows));
  plan.chunks[2] = static_cast<int>(ceil_div(kernel[2], columns));
  plan.chunk_count = plan.chunks[0] * plan.chunks[1] * plan.chunks[2];
}

// How many 32-byte sectors a load of a warp touches, at `stride` elements between lanes.
int64_t sectors(int64_t stride, int size) {
  return std::max<int64_t>(1, std::min<int64_t>(kWarp, std::abs(stride) * size));
}

// The positions below each other at which a slot starts are `strip` rows apart.
void arrange_slots(const OuterProblem& problem, DepthwisePlan& plan) {
  plan.slots_w = std::min(plan.slots, power_of_two_from(problem.positions[2]));
  plan.strip = static_cast<int>(ceil_div(problem.positions[1], plan.slots / plan.slots_w));
}

}  // namespace

DepthwisePlan plan_depthwise(const OuterProblem& problem, const StatsOutputs& outputs, int sm_count,
                             const Options& options) {
  DepthwisePlan plan = {};
  choose_box(problem, plan);
  if (options.sm_count) sm_count = static_cast<int>(options.sm_count);
  const int64_t rows = int64_t{problem.groups} * problem.O, units = rows * problem.channels;
  const int64_t T = problem.T();
  const int size = element_size(problem.element);

  // Lanes where memory is adjacent. A slot's next neighbour is one position to the right.
  const int64_t along_slots = sectors(problem.b.stride[2], size) + sectors(problem.a.stride[2], size);
  const int64_t along_units = sectors(problem.b.stride_c, size) + sectors(problem.a.stride_c, size);
  plan.lanes_along_units = along_units < along_slots && units > 1;

  // As few slots as leave each about eight positions or more, because the sums over the slots cost as much as
  // several positions; more where that leaves the chip idle. Slots side by side should cover a short row, or
  // a load of the warp touches more lines of the cache.
  const int most_slots = plan.lanes_along_units ? 8 : 32;
  plan.slots = kFewestSlots;
  while (plan.slots < most_slots &&
         (T >= 16 * plan.slots || (!plan.lanes_along_units && problem.positions[2] > plan.slots))) {
    plan.slots *= 2;
  }
  const int64_t wanted_threads = int64_t{sm_count} * 1024;
  while (plan.slots < 256 && T >= 16 * plan.slots &&
         problem.N * units * plan.chunk_count * plan.slots < wanted_threads) {
    plan.slots *= 2;
  }
  // The chunks of a unit read the same elements, so they share a block and its L1 cache: warps of their own,
  // because they run through different positions of the kernel.
  int chunk_threads = plan.chunk_count == 1                             ? 256
                      : plan.chunk_count <= 2 || plan.lanes_along_units ? 128
                                                                        : 64;
  chunk_threads = std::max(chunk_threads, plan.slots);
  plan.units = std::min(chunk_threads / plan.slots, power_of_two_from(units));
  while (plan.slots * plan.units < kWarp) (plan.lanes_along_units ? plan.slots : plan.units) *= 2;
  arrange_slots(problem, plan);
  const int most_chunks = std::max(1, kMaxDepthwiseThreads / (plan.slots * plan.units));
  plan.chunk_blocks = static_cast<int>(ceil_div(plan.chunk_count, most_chunks));
  plan.chunks_per_block = static_cast<int>(ceil_div(plan.chunk_count, plan.chunk_blocks));
  plan.unit_blocks = static_cast<int>(ceil_div(units, plan.units));

  // So many splits of the samples that all blocks run at once, or, when those of one split are more than the
  // chip holds, so many that the last wave hardly counts. One sample's positions are never split further: up
  // to 256 threads per unit already share them, so even a single sample of 32 channels runs on 32
  // multiprocessors.
  const bool sums = outputs.grad || outputs.sum_grad_centered_squared, squares = outputs.squares();
  const int64_t count = rows * problem.I();
  const int64_t split_bytes = count * 4 * (int{sums} + int{squares});
  const int64_t blocks = int64_t{plan.unit_blocks} * plan.chunk_blocks;
  const int64_t blocks_at_once = int64_t{sm_count} * 3 * 256 / plan.threads();
  int64_t splits = blocks <= blocks_at_once ? blocks_at_once / blocks : ceil_div(4 * blocks_at_once, blocks);
  if (split_bytes) splits = std::min(splits, kMaxPartialBytes / split_bytes);
  if (options.splits) splits = options.splits;
  splits = std::max<int64_t>(1, std::min({splits, problem.N, kMaxBlocks / blocks}));
  plan.splits = static_cast<int>(splits);

  const int64_t norms = outputs.batch_l2 && blocks > 1 ? problem.N * blocks : 0;
  const int64_t partials = splits > 1 ? splits * count : 0;
  plan.norm_offset = 0;
  plan.sum_offset = norms;
  plan.square_offset = plan.sum_offset + (sums ? partials : 0);
  plan.workspace_bytes = 4 * (plan.square_offset + (squares ? partials : 0));
  return plan;
}

DepthwisePlan plan_depthwise(const OuterProblem& problem, const ColumnOutputs& columns, int sm_count,
                             const Options& options) {
  if (problem.N * columns.V > INT32_MAX) throw std::invalid_argument("depthwise: too many samples");
  OuterProblem samples = problem;  // as many as splits may part
  if (!columns.batch_diag) samples.N *= columns.V;
  StatsOutputs outputs{};
  outputs.sum_grad_squared = columns.diag;
  return plan_depthwise(samples, outputs, sm_count, options);
}

}  // namespace backpack_cuda::cuda
