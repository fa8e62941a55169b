// Which thread does what. Host code: no call of CUDA.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>

#include "common/integers.h"
#include "cuda/bias/bias.h"

namespace backpack_cuda::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kFewPositions = 8;  // up to which one thread takes all of them
constexpr int64_t kMaxPartialBytes = int64_t{16} << 20;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

int64_t square_root(int64_t x) { return static_cast<int64_t>(std::sqrt(static_cast<double>(x))); }

// So many splits of the samples that all blocks run at once, or, when the blocks of one split are more than
// the chip holds, so many that the last wave hardly counts.
int64_t splits_for(int64_t blocks_at_once, int64_t blocks) {
  if (blocks <= blocks_at_once) return blocks_at_once / blocks;
  return ceil_div(4 * blocks_at_once, blocks);
}

// Of the 32-byte sectors of memory, how many a load of a warp touches at `stride` elements between lanes.
int64_t sectors(int64_t stride, int size) {
  return std::max<int64_t>(1, std::min<int64_t>(kWarp, std::abs(stride) * size));
}

// Whether every offset but that of the vector's own dim is a multiple of the vector.
bool aligned(const BiasProblem& problem, int vector, std::initializer_list<int64_t> offsets) {
  if (reinterpret_cast<uintptr_t>(problem.data) % 16) return false;
  return std::all_of(offsets.begin(), offsets.end(), [&](int64_t offset) { return offset % vector == 0; });
}

// `samples` sums over `T` positions each: those of the problem, or more and shorter ones.
BiasPass plan_pass(const BiasProblem& problem, int64_t samples, int64_t T, const StatsOutputs& outputs,
                   int sm_count, int64_t forced_splits) {
  BiasPass pass = {};
  const int size = element_size(problem.element), vector = 16 / size;
  const int64_t* const stride = problem.stride;
  const bool one_dim = problem.size[0] == 1 && problem.size[1] == 1;
  // Parts of the positions are for the kernel that shares them, however short.
  const bool few_positions = problem.T() <= kFewPositions;
  pass.lanes_along_outputs = few_positions || sectors(problem.stride_o, size) < sectors(stride[2], size);
  pass.vector_outputs =
      pass.lanes_along_outputs && problem.stride_o == 1 &&
      aligned(problem, vector, {problem.O, problem.stride_n, stride[0], stride[1], stride[2]});
  pass.vector_positions = !pass.lanes_along_outputs && one_dim && stride[2] == 1 &&
                          aligned(problem, vector, {problem.size[2], problem.stride_n, problem.stride_o});
  const int64_t units = problem.O / (pass.vector_outputs ? vector : 1);
  const int64_t steps = T / (pass.vector_positions ? vector : 1);  // loads of a unit

  // About eight loads per slot, so that all of a thread's are in flight at once; more slots where that leaves
  // the chip idle. Lanes along outputs: at least eight, so that a slot has a lane for each of a unit's
  // outputs.
  pass.slots = 1;
  if (!few_positions) {
    const int most_slots = pass.lanes_along_outputs ? 8 : kWarp;
    pass.slots = pass.lanes_along_outputs ? 8 : 2;
    // Fewer loads along the positions, where adjacent slots read adjacent elements of short rows.
    const int loads = pass.lanes_along_outputs ? 8 : 4;
    while (pass.slots < most_slots && steps >= 2 * loads * pass.slots) pass.slots *= 2;
    const int64_t wanted_threads = int64_t{sm_count} * 1024;
    const int most = pass.lanes_along_outputs ? kMaxBiasThreads / 8 : kMaxBiasThreads;  // 8 lanes: 128 bytes
    while (pass.slots < most && steps >= 16 * pass.slots && samples * units * pass.slots < wanted_threads) {
      pass.slots *= 2;
    }
  }
  pass.units = std::min(kMaxBiasThreads / pass.slots, power_of_two_from(units));
  while (pass.slots * pass.units < kWarp) pass.units *= 2;
  pass.unit_blocks = static_cast<int>(ceil_div(units, pass.units));

  const bool sums = outputs.grad || outputs.sum_grad_centered_squared, squares = outputs.squares();
  const int64_t split_bytes = int64_t{problem.O} * 4 * (int{sums} + int{squares});
  int64_t splits =
      splits_for(int64_t{sm_count} * 3 * kMaxBiasThreads / (pass.slots * pass.units), pass.unit_blocks);
  // Adding the splits takes a thread per output: not more of them than steps in the loop over a split's
  // samples.
  if (pass.slots == 1) splits = std::min(splits, square_root(samples));
  if (split_bytes) splits = std::min(splits, kMaxPartialBytes / split_bytes);
  if (forced_splits) splits = forced_splits;
  splits = std::max<int64_t>(1, std::min({splits, samples, kMaxBlocks / pass.unit_blocks}));
  pass.splits = static_cast<int>(splits);

  const int64_t norms = outputs.batch_l2 && pass.unit_blocks > 1 ? samples * pass.unit_blocks : 0;
  const int64_t partials = splits > 1 ? splits * problem.O : 0;
  pass.sum_offset = norms;
  pass.square_offset = pass.sum_offset + (sums ? partials : 0);
  pass.floats = pass.square_offset + (squares ? partials : 0);
  return pass;
}

}  // namespace

BiasProblem merge_positions(BiasProblem problem) {
  int64_t size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};
  int last = 3;  // dims from here on are used
  for (int d = 2; d >= 0; --d) {
    if (problem.size[d] == 1) continue;
    if (last < 3 && problem.stride[d] == stride[last] * size[last]) {
      size[last] *= problem.size[d];
    } else {
      --last;
      size[last] = problem.size[d];
      stride[last] = problem.stride[d];
    }
  }
  std::copy(size, size + 3, problem.size);
  std::copy(stride, stride + 3, problem.stride);
  return problem;
}

BiasProblem second_problem(const BiasProblem& problem, int t_splits, const void* sums) {
  const int64_t O = problem.O, splits = t_splits;
  return {Element::kFloat32, sums, problem.N, problem.O, splits * O, 1, {1, 1, splits}, {0, 0, O}};
}

BiasPlan plan_bias(const BiasProblem& given, const StatsOutputs& outputs, int sm_count,
                   const Options& options) {
  const BiasProblem problem = merge_positions(given);
  if (options.sm_count) sm_count = static_cast<int>(options.sm_count);
  BiasPlan plan = {};
  plan.first = plan_pass(problem, problem.N, problem.T(), outputs, sm_count, options.splits);

  // Less than half of a block per multiprocessor, with long sums: parts of at least 32 loads per slot.
  const int64_t T = problem.T(), blocks = problem.N * plan.first.unit_blocks;
  int64_t t_splits = 1;
  if (2 * blocks < sm_count) {
    t_splits = std::min(ceil_div(4 * int64_t{sm_count}, blocks), T / (32 * int64_t{plan.first.slots}));
  }
  if (options.t_splits) t_splits = options.t_splits;
  t_splits = std::max<int64_t>(
      1, std::min({t_splits, ceil_div(T, 8), kMaxPartialBytes / (4 * problem.N * problem.O)}));
  plan.t_splits = static_cast<int>(t_splits);
  if (t_splits > 1) {
    StatsOutputs parts = {};
    parts.batch_grad = &plan;  // any address: wanted
    const int64_t samples = problem.N * t_splits, part = ceil_div(T, t_splits);
    plan.first = plan_pass(problem, samples, part, parts, sm_count, samples);
    plan.second = plan_pass(second_problem(problem, plan.t_splits, nullptr), problem.N, t_splits, outputs,
                            sm_count, options.splits);
    plan.second.norm_offset += samples * problem.O;
    plan.second.sum_offset += samples * problem.O;
    plan.second.square_offset += samples * problem.O;
    plan.second.floats += samples * problem.O;
  }
  plan.workspace_bytes = 4 * std::max(plan.first.floats, plan.second.floats);
  return plan;
}

}  // namespace backpack_cuda::cuda
