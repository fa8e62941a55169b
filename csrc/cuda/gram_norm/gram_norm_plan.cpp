// How the work of gram_norm is cut.
#include <algorithm>
#include <stdexcept>

#include "common/integers.h"
#include "cuda/gram_norm/gram_norm.h"

namespace backpack_cuda::cuda {
namespace {

constexpr int kSlabBytes = 128;  // of one row

int64_t align(int64_t bytes) { return round_up(bytes, 256); }

// Blocks per multiprocessor, as the kernels' registers and shared memory allow (gram_norm.cuh).
int blocks_per_multiprocessor(int tile) { return tile == 128 ? 1 : tile == 64 ? 3 : 6; }

// Of one split's part of both Gram matrices.
int64_t part_bytes(int tile) { return int64_t{2} * tile * tile * 4; }

int copy_bytes(const GramOperand& x, const GramNormParams& p, int columns) {
  const int size = element_size(p.element);
  if (x.stride_c != 1 && columns > 1) return 0;
  const auto divides = [&](int bytes) {
    return columns * size % bytes == 0 && reinterpret_cast<uintptr_t>(x.data) % bytes == 0 &&
           (p.N == 1 || x.stride_n * size % bytes == 0) && (p.T == 1 || x.stride_t * size % bytes == 0);
  };
  return divides(16) ? 16 : divides(4) ? 4 : 0;
}

int64_t slabs(const GramNormParams& p) {
  const int64_t size = element_size(p.element);
  return ceil_div(p.I * size, kSlabBytes) + ceil_div(p.O * size, kSlabBytes);
}

void cut_rows(const GramNormParams& p, GramNormPlan& plan) {
  const int64_t row_blocks = ceil_div(p.T, plan.tile);
  plan.slot = plan.tile;
  if (plan.tile == 32) {
    while (plan.slot / 2 >= p.T) plan.slot /= 2;
  }
  const int64_t pairs = row_blocks * (row_blocks + 1) / 2;
  plan.units = ceil_div(p.N, plan.tile / plan.slot) * pairs;
  if (plan.units > INT32_MAX) throw std::invalid_argument("gram_norm: too many samples");
  plan.pairs = static_cast<int>(pairs);
}

// Clocks of the chip for the whole problem, on a model of an H100 (assumptions, not measurements): per
// multiprocessor and clock, mma.sync does 1300 TF32 or 2600 16-bit flops, 24 bytes come from the L2 cache and
// 13 from memory; a load takes 1000 clocks, and four slabs of a block are on their way.
double clocks(const GramNormParams& p, const GramNormPlan& plan, int sm_count) {
  const double terms = p.element == Element::kFloat32 && !p.tf32 ? 3 : 1, tile = plan.tile;
  const double products = terms * 2 * tile * tile * (kSlabBytes / 4) / 1300;  // per slab, either element size
  // Pairs of one sample share their rows; where there is but one pair, every row is read once, from memory.
  const double loads = plan.pairs == 1 ? tile * kSlabBytes / 13 : 2 * tile * kSlabBytes / 24;
  const int64_t blocks = plan.units * plan.splits;
  const int64_t at_a_time =
      std::min<int64_t>(blocks_per_multiprocessor(plan.tile), ceil_div(blocks, sm_count));
  const double rounds = static_cast<double>(ceil_div(blocks, at_a_time * sm_count));
  const double slab = std::max(static_cast<double>(at_a_time) * std::max(products, loads), 250.);
  const double merge =
      plan.splits == 1 ? 0
                       : 5000 + 2 * static_cast<double>(blocks * part_bytes(plan.tile)) / (24. * sm_count);
  return rounds * (static_cast<double>(ceil_div(slabs(p), plan.splits)) * slab + 1500) + merge;
}

// Units alone may leave multiprocessors idle. Never more blocks than fit at a time, which bounds the
// workspace, and never fewer than four slabs per block.
void choose_splits(const GramNormParams& p, GramNormPlan& plan, int sm_count) {
  const int64_t places = int64_t{sm_count} * blocks_per_multiprocessor(plan.tile);
  const int64_t most = std::min(places / plan.units, slabs(p) / 4);
  plan.splits = 1;
  double least = clocks(p, plan, sm_count);
  const auto consider = [&](int64_t splits) {
    if (splits > most || splits <= 1) return;
    GramNormPlan trial = plan;
    trial.splits = static_cast<int>(splits);
    const double cost = clocks(p, trial, sm_count);
    if (cost < least) plan = trial, least = cost;
  };
  // A plan is made at every call: few candidates, those that fill the multiprocessors evenly among them.
  for (int64_t splits = 2; splits <= most; splits *= 2) consider(splits);
  for (int blocks = 1; blocks <= blocks_per_multiprocessor(plan.tile); ++blocks) {
    consider(std::min(most, int64_t{sm_count} * blocks / plan.units));
  }
}

}  // namespace

GramNormPlan plan_gram_norm(const GramNormParams& p, int sm_count, const Options& options) {
  if (std::max(p.I, p.O) > INT32_MAX - kSlabBytes) throw std::invalid_argument("gram_norm: too many columns");
  if (options.sm_count > 0) sm_count = static_cast<int>(options.sm_count);
  GramNormPlan best{};
  double least = 0;
  for (const int tile : {32, 64, 128}) {
    const int number = tile == 64 ? 1 : tile == 128 ? 2 : 3;
    if (options.tile >= 1 && options.tile <= 3) {
      if (options.tile != number) continue;
    } else if (tile == 32 ? p.T > 32 : p.T <= tile / 2) {
      continue;  // off the diagonal 32 rows load too much per flop; of 64, half would be empty
    }
    GramNormPlan plan{};
    plan.tile = tile;
    cut_rows(p, plan);
    choose_splits(p, plan, sm_count);
    const double cost = clocks(p, plan, sm_count);
    if (best.tile == 0 || cost < least) best = plan, least = cost;
  }
  if (options.splits > 0) best.splits = static_cast<int>(std::clamp<int64_t>(options.splits, 1, slabs(p)));
  best.copy_a = copy_bytes(p.a, p, p.I);
  best.copy_b = copy_bytes(p.b, p, p.O);

  best.norms_at = 0;
  best.parts_at = align(best.pairs > 1 ? p.N * best.pairs * 4 : 0);
  best.workspace_bytes =
      best.parts_at + (best.splits > 1 ? best.units * best.splits * part_bytes(best.tile) : 0);

  const double columns = static_cast<double>(slabs(p)) * (kSlabBytes / element_size(p.element));
  const double units = static_cast<double>(best.units), tile = best.tile;
  const double diagonal = units * static_cast<double>(ceil_div(p.T, best.tile)) / best.pairs;
  best.flops = 2 * tile * tile * columns * units;
  best.bytes = tile * (2 * units - diagonal) * columns * element_size(p.element);
  return best;
}

}  // namespace backpack_cuda::cuda
