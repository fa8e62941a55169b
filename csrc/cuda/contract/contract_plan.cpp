// Which instantiation of the contract kernel serves a problem, and how its work is cut.
#include <algorithm>
#include <stdexcept>

#include "common/integers.h"
#include "cuda/contract/contract_params.h"

namespace backpack_cuda::cuda {
namespace {

constexpr int kDims = 3;

bool divides(int64_t bytes, int64_t value) { return value % bytes == 0; }
bool divides(int64_t bytes, const void* address) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

// The distance between adjacent positions, walked in order, of an operand with these strides; -1 if it
// varies.
int64_t stride_of_positions(const OuterProblem& p, const int64_t (&strides)[kDims]) {
  int64_t stride = 0, extent = 1;  // of the dims seen so far, from the last
  for (int d = kDims - 1; d >= 0; --d) {
    if (p.positions[d] == 1) continue;
    if (extent == 1) {
      stride = strides[d];
    } else if (strides[d] != stride * extent) {
      return -1;
    }
    extent *= p.positions[d];
  }
  return stride;
}

int64_t b_stride_of_positions(const OuterProblem& p) { return stride_of_positions(p, p.b.stride); }

// Kernel 1: a is read where b is, perhaps with a step, and nowhere outside. Otherwise -1.
int64_t a_stride_of_positions(const OuterProblem& p) {
  int64_t strides[kDims];
  for (int d = 0; d < kDims; ++d) {
    if (p.kernel[d] != 1 || p.padding[d] != 0) return -1;
    if (int64_t{p.positions[d] - 1} * p.step[d] >= p.size[d]) return -1;
    strides[d] = p.a.stride[d] * p.step[d];
  }
  return stride_of_positions(p, strides);
}

// Whether every sample begins at a multiple of so many elements. Strides that are never walked do not matter.
bool samples_aligned(const OuterProblem& p, const Operand& x, const ColumnOutputs& columns, int64_t stride_v,
                     int64_t elements) {
  return (p.N == 1 || divides(elements, x.stride_n)) && (columns.V == 1 || divides(elements, stride_v));
}

// Rows of adjacent channels in whole copies of 16 bytes.
bool has_wide_rows(const OuterProblem& p, const Operand& x, int channels, const ColumnOutputs& columns,
                   int64_t stride_v) {
  const int64_t elements = 16 / element_size(p.element);
  return x.stride_c == 1 && divides(elements, channels) && divides(16, x.data) &&
         samples_aligned(p, x, columns, stride_v, elements);
}

bool have_wide_rows(const OuterProblem& p, const ColumnOutputs& columns) {
  return has_wide_rows(p, p.a, p.channels, columns, columns.a_stride_v) &&
         has_wide_rows(p, p.b, p.O, columns, columns.b_stride_v);
}

bool rows_apply(const OuterProblem& p, const ColumnOutputs& columns) {
  const int64_t elements = 16 / element_size(p.element);
  const int64_t stride_a = a_stride_of_positions(p), stride_b = b_stride_of_positions(p);
  return have_wide_rows(p, columns) && stride_a >= 0 && stride_b >= 0 && divides(elements, stride_a) &&
         divides(elements, stride_b);
}

bool channels_last_applies(const OuterProblem& p, const ColumnOutputs& columns) {
  const int64_t elements = 16 / element_size(p.element), stride_b = b_stride_of_positions(p);
  bool aligned = divides(elements, p.channels);
  for (int d = 0; d < kDims; ++d) aligned = aligned && (p.size[d] == 1 || divides(elements, p.a.stride[d]));
  return aligned && have_wide_rows(p, columns) && stride_b >= 0 && divides(elements, stride_b);
}

// T = 1 counts as adjacent.
bool positions_apply(const OuterProblem& p) { return p.T() == 1 || b_stride_of_positions(p) == 1; }

int widest_copy_along_positions(const OuterProblem& p, const ColumnOutputs& columns) {
  for (int bytes = 16; bytes > element_size(p.element); bytes /= 2) {
    const int64_t elements = bytes / element_size(p.element);
    if (divides(bytes, p.b.data) && samples_aligned(p, p.b, columns, columns.b_stride_v, elements) &&
        ((p.O == 1 && p.groups == 1) || divides(elements, p.b.stride_c))) {
      return bytes;
    }
  }
  return element_size(p.element);
}

ContractLoader choose_loader(const OuterProblem& p, const ColumnOutputs& columns, int64_t forced) {
  const bool applies[] = {rows_apply(p, columns), channels_last_applies(p, columns), positions_apply(p),
                          true};
  if (forced >= 1 && forced <= 4 && applies[forced - 1]) return static_cast<ContractLoader>(forced);
  if (applies[0]) return ContractLoader::kRows;
  if (applies[1]) return ContractLoader::kChannelsLast;
  // With one position there is nothing adjacent: elements, lanes mostly along the channels.
  if (applies[2] && p.T() > 1) return ContractLoader::kPositions;
  return ContractLoader::kElements;
}

ContractPrecision choose_precision(const OuterProblem& p) {
  switch (p.element) {
    case Element::kBFloat16:
      return ContractPrecision::kBFloat16;
    case Element::kFloat16:
      return ContractPrecision::kFloat16;
    default:
      return p.tf32 ? ContractPrecision::kTf32 : ContractPrecision::kTf32x3;
  }
}

int tile_edge(ContractTile tile) { return tile == ContractTile::k64 ? 64 : 128; }
// Three blocks of 128 threads or one of 256: what registers allow (docs/kernel_registers.md).
int64_t blocks_at_a_time(ContractTile tile, int sm_count) {
  return int64_t{sm_count} * (tile == ContractTile::k64 ? 3 : 1);
}
int64_t count_tiles(const OuterProblem& p, ContractTile tile) {
  return p.groups * ceil_div(p.O, tile_edge(tile)) * ceil_div(p.I(), tile_edge(tile));
}

// 128x128 reads half as much per flop; where that does not decide, 64x64 is the better choice.
ContractTile choose_tile(const OuterProblem& p, int64_t samples, ContractPrecision precision, int sm_count,
                         int64_t forced) {
  // Three products per step: the tensor cores are the limit with either tile, and 128x128 would spill.
  if (precision == ContractPrecision::kTf32x3) return ContractTile::k64;
  if (forced == 1) return ContractTile::k64;
  if (forced == 2) return ContractTile::k128;
  // The epilogue: 512 clocks for 128x128, which the main loops of two other blocks hide with 64x64. At 24
  // bytes of L2 per clock (an H100, on paper), that is what the smaller traffic saves in 12 positions of
  // float32, 23 of 2 bytes.
  if (p.T() < 24) return ContractTile::k64;
  const int64_t large = count_tiles(p, ContractTile::k128), small = count_tiles(p, ContractTile::k64);
  // Too much of the large tiles would be empty: an eighth costs as much as the traffic saves.
  if (large * 4 * 8 > small * 9) return ContractTile::k64;
  // Too few of them for one per multiprocessor.
  if (large * samples < sm_count) return ContractTile::k64;
  return ContractTile::k128;
}

// How well `splits` use the chip: the share of the places that work, over all rounds of blocks.
double efficiency(int64_t tiles, int64_t samples, int64_t splits, int64_t places) {
  const double rounds = static_cast<double>(ceil_div(tiles * splits, places));
  const double longest = static_cast<double>(ceil_div(samples, splits));  // samples of one split
  return static_cast<double>(tiles * samples) / (rounds * longest * static_cast<double>(places));
}

// The fewest that come within a tenth of the best: each split costs a partial sum.
int choose_splits(int64_t tiles, int64_t samples, int64_t places, int64_t forced) {
  if (forced > 0) return static_cast<int>(std::min(forced, samples));
  const int64_t most = std::clamp<int64_t>(2 * places / tiles, 1, samples);  // bounds the workspace
  double best = 0;
  for (int64_t s = 1; s <= most; ++s) best = std::max(best, efficiency(tiles, samples, s, places));
  int64_t splits = 1;
  while (efficiency(tiles, samples, splits, places) < 0.9 * best) ++splits;
  return static_cast<int>(splits);
}

// Splits of the positions, for few samples of many positions: else blocks would be missing. Not below eight
// slabs each, which is what filling the ring costs twice.
int64_t choose_t_splits(const OuterProblem& p, int64_t samples, int64_t tiles, int64_t places, int slab_rows,
                        int64_t forced) {
  if (forced > 0) return std::min<int64_t>(forced, ceil_div(p.T(), slab_rows));
  return std::max<int64_t>(1, std::min(places / (tiles * samples), p.T() / (int64_t{8} * slab_rows)));
}

int slab_rows(const OuterProblem& p) { return p.element == Element::kFloat32 ? 16 : 32; }
int64_t weight_count(const OuterProblem& p) { return int64_t{p.groups} * p.O * p.I(); }

// All but the workspace. With V = 1 and nothing wanted of the columns: first order.
ContractPlan plan_work(const OuterProblem& p, const ColumnOutputs& columns, int sm_count,
                       const Options& options) {
  const int64_t samples = p.N * columns.V;
  ContractPlan plan{};
  plan.precision = choose_precision(p);
  plan.loader = choose_loader(p, columns, options.loader);
  plan.copy_bytes = widest_copy_along_positions(p, columns);
  plan.tile = choose_tile(p, samples, plan.precision, sm_count, options.tile);
  plan.tiles_o = static_cast<int>(ceil_div(p.O, tile_edge(plan.tile)));
  plan.tiles_i = static_cast<int>(ceil_div(p.I(), tile_edge(plan.tile)));
  const int64_t tiles = count_tiles(p, plan.tile), places = blocks_at_a_time(plan.tile, sm_count);

  plan.t_splits =
      static_cast<int>(choose_t_splits(p, samples, tiles, places, slab_rows(p), options.t_splits));
  plan.t_per_split = static_cast<int>(round_up(ceil_div(p.T(), plan.t_splits), slab_rows(p)));
  plan.t_splits = static_cast<int>(ceil_div(p.T(), plan.t_per_split));  // rounding up may leave fewer
  const bool parts = plan.t_splits > 1;
  plan.packed = !parts && p.T() <= slab_rows(p) / 2;
  if (samples * plan.t_splits > INT32_MAX || tiles > INT32_MAX)
    throw std::invalid_argument("contract: too many samples");
  // All columns of n in one block; or at least both samples of a slab, so that they share an operand.
  plan.split_unit = parts ? 1 : columns.batch_diag ? columns.V : plan.packed && columns.V % 2 == 0 ? 2 : 1;
  plan.splits = parts ? static_cast<int>(samples)
                      : choose_splits(tiles, samples / plan.split_unit, places, options.splits);
  if (tiles * plan.splits * plan.t_splits > INT32_MAX)
    throw std::invalid_argument("contract: too many tiles");
  return plan;
}

int planned_sm_count(int sm_count, const Options& options) {
  return options.sm_count > 0 ? static_cast<int>(options.sm_count) : sm_count;
}

// Parts of the workspace behind each other, all aligned.
struct Reservations {
  int64_t end = 0;

  int64_t reserve(int64_t floats) {
    const int64_t begin = end;
    end += round_up(floats * 4, 256);
    return begin;
  }
};

}  // namespace

ContractPlan plan_contract(const OuterProblem& p, const StatsOutputs& outputs, int sm_count,
                           const Options& options) {
  sm_count = planned_sm_count(sm_count, options);
  ContractPlan plan =
      plan_work(p, ColumnOutputs{1, 0, 0, nullptr, nullptr, nullptr, nullptr}, sm_count, options);
  const bool parts = plan.t_splits > 1;
  const int64_t count = weight_count(p), tiles = count_tiles(p, plan.tile);
  plan.squares = !parts && outputs.squares();
  Reservations workspace;
  plan.norm_columns = parts ? ceil_div(count, 32) : tiles;  // the second pass has a partial norm per warp
  plan.norms_at = workspace.reserve(outputs.batch_l2 && plan.norm_columns > 1 ? p.N * plan.norm_columns : 0);
  const bool sum = parts || (plan.splits > 1 && (outputs.grad || outputs.squares()));
  plan.sums_at = workspace.reserve(sum ? int64_t{plan.splits} * plan.t_splits * count : 0);
  plan.squares_at = workspace.reserve(plan.splits > 1 && plan.squares ? plan.splits * count : 0);
  plan.workspace_bytes = workspace.end;
  return plan;
}

ContractPlan plan_contract(const OuterProblem& p, const ColumnOutputs& columns, int sm_count,
                           const Options& options) {
  sm_count = planned_sm_count(sm_count, options);
  ContractPlan plan = plan_work(p, columns, sm_count, options);
  const bool parts = plan.t_splits > 1;
  const bool keeps = !parts && columns.V > 1 && ceil_div(p.T(), slab_rows(p)) <= kContractStages &&
                     (!plan.packed || plan.split_unit % 2 == 0);
  plan.keep_a = keeps && columns.a_stride_v == 0;
  plan.keep_b = keeps && columns.b_stride_v == 0;
  const int64_t count = weight_count(p);
  Reservations workspace;
  const bool sum = parts || (plan.splits > 1 && columns.diag);
  plan.sums_at = workspace.reserve(sum ? int64_t{plan.splits} * plan.t_splits * count : 0);
  if (parts) plan.column_sums = plan_column_sums(p.N, columns, count, sm_count);
  plan.column_sums_at = workspace.reserve(plan.column_sums.workspace_floats);
  plan.workspace_bytes = workspace.end;
  return plan;
}

}  // namespace backpack_cuda::cuda
