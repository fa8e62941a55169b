// Which way a Kronecker factor is formed, and how its work is cut.
#include <algorithm>
#include <iterator>
#include <set>
#include <stdexcept>
#include <vector>

#include "common/integers.h"
#include "cuda/kron_factor/kron_factor.h"

namespace backpack_cuda::cuda {
namespace {

constexpr int kDims = 3;

bool divides(int64_t elements, int64_t value) { return value % elements == 0; }

ContractPrecision choose_precision(const KronProblem& p) {
  switch (p.element) {
    case Element::kBFloat16:
      return ContractPrecision::kBFloat16;
    case Element::kFloat16:
      return ContractPrecision::kFloat16;
    default:
      return p.tf32 ? ContractPrecision::kTf32 : ContractPrecision::kTf32x3;
  }
}

// Adjacent channels in whole aligned copies of 16 bytes. Strides that are never walked do not matter.
bool wide_channels_apply(const KronProblem& p) {
  const int64_t elements = 16 / element_size(p.element);
  bool aligned = p.x.stride_c == 1 && divides(elements, p.channels) &&
                 divides(16, reinterpret_cast<intptr_t>(p.x.data)) &&
                 (p.N == 1 || divides(elements, p.x.stride_n));
  for (int d = 0; d < kDims; ++d) aligned = aligned && (p.size[d] == 1 || divides(elements, p.x.stride[d]));
  return aligned;
}

ContractLoader choose_loader(const KronProblem& p, int64_t forced) {
  const bool wide = wide_channels_apply(p);
  if (forced > int64_t(ContractLoader::kChannelsLast) && forced <= int64_t(ContractLoader::kElements))
    return static_cast<ContractLoader>(forced);
  if (wide) return ContractLoader::kChannelsLast;
  // Lanes run along the positions where these are closer in memory than the channels.
  for (int d = kDims - 1; d >= 0; --d) {
    if (p.positions[d] > 1) {
      return p.x.stride[d] * p.step[d] < p.x.stride_c ? ContractLoader::kPositions
                                                      : ContractLoader::kElements;
    }
  }
  return p.N > 1 && p.x.stride_n < p.x.stride_c ? ContractLoader::kPositions : ContractLoader::kElements;
}

// Kernel 1, and all samples' positions in adjacent and aligned 16 bytes.
bool whole_copies_apply(const KronProblem& p) {
  const int64_t elements = 16 / element_size(p.element);
  int64_t extent = 1;
  for (int d = kDims - 1; d >= 0; --d) {
    if (p.kernel[d] != 1 || p.padding[d] != 0 || p.positions[d] != p.size[d]) return false;
    if (p.size[d] == 1) continue;
    if (p.step[d] != 1 || p.x.stride[d] != extent) return false;
    extent *= p.size[d];
  }
  return divides(elements, extent) && divides(16, reinterpret_cast<intptr_t>(p.x.data)) &&
         (p.N == 1 || divides(elements, p.x.stride_n)) &&
         (p.channels * p.groups == 1 || divides(elements, p.x.stride_c));
}

// ---- the coordinates of one dim ----

KronAxis axis_of_patches(const KronProblem& p, int d) {
  KronAxis axis{};
  axis.segments = 1;
  axis.begin[0] = -p.padding[d];
  axis.count[0] = p.positions[d];
  return axis;
}

struct Interval {
  int64_t begin, end;
};

// The coordinates u of input[u] input[u + lag] in the pair (k, k + lag / dilation): u = residue + step * m,
// with m in the interval, where both lie inside of the input.
Interval coordinates(const KronProblem& p, int d, int64_t u0, int64_t residue, int64_t lag) {
  const int64_t step = p.step[d], first = (u0 - residue) / step;
  const int64_t least = std::max<int64_t>(0, -lag), end = p.size[d] - std::max<int64_t>(0, lag);
  const auto up = [&](int64_t u) { return u <= residue ? 0 : ceil_div(u - residue, step); };
  return {std::max(first, up(least)), std::min(first + p.positions[d], up(end))};
}

// Whether the tables hold this kernel and its segments.
bool axis_of_lags(const KronProblem& p, int d, KronAxis& axis) {
  const int K = p.kernel[d];
  if (K > kKronKernel) return false;
  axis = {};
  for (int difference = 1 - K; difference < K; ++difference) {
    const int64_t step = p.step[d], lag = int64_t{difference} * p.dilation[d];
    const int k_begin = std::max(0, -difference), k_end = std::min(K, K - difference);
    const auto corner = [&](int k) { return int64_t{k} * p.dilation[d] - p.padding[d]; };
    const auto residue_of = [&](int k) { return (corner(k) % step + step) % step; };
    std::set<int64_t> residues;
    for (int k = k_begin; k < k_end; ++k) residues.insert(residue_of(k));
    for (const int64_t residue : residues) {
      std::set<int64_t> cuts;
      for (int k = k_begin; k < k_end; ++k) {
        const Interval m = coordinates(p, d, corner(k), residue, lag);
        if (residue_of(k) == residue && m.begin < m.end) cuts.insert({m.begin, m.end});
      }
      const std::vector<int64_t> at(cuts.begin(), cuts.end());
      const auto covers = [&](int k, int64_t m) {
        const Interval pair = coordinates(p, d, corner(k), residue, lag);
        return residue_of(k) == residue && pair.begin <= m && m < pair.end;
      };
      const int first_segment = axis.segments;
      for (size_t j = 0; j + 1 < at.size(); ++j) {
        bool used = false;
        for (int k = k_begin; k < k_end; ++k) used = used || covers(k, at[j]);
        if (!used) continue;
        if (axis.segments == kKronSegments) return false;
        axis.begin[axis.segments] = static_cast<int>(residue + step * at[j]);
        axis.count[axis.segments] = static_cast<int>(at[j + 1] - at[j]);
        axis.lag[axis.segments] = static_cast<int>(lag);
        ++axis.segments;
      }
      for (int k = k_begin; k < k_end; ++k) {  // a pair's segments are neighbours
        if (residue_of(k) != residue) continue;
        int first = first_segment, end = first_segment;
        for (int s = first_segment; s < axis.segments; ++s) {
          if (!covers(k, (axis.begin[s] - residue) / step)) continue;
          if (first == end) first = s;
          end = s + 1;
        }
        const int pair = k * K + k + difference;
        axis.first[pair] = static_cast<uint8_t>(first);
        axis.end[pair] = static_cast<uint8_t>(end);
      }
    }
  }
  return true;
}

int64_t count_products(const KronAxis (&axes)[kDims]) {
  return int64_t{axes[0].segments} * axes[1].segments * axes[2].segments;
}

// ---- products, tiles, splits ----

// Of each lag and its negative one is formed: that whose first nonzero entry is positive.
struct Work {
  const KronProblem& p;
  const KronPlan& plan;
  int edge, slab_rows;

  template <class Visit>
  void for_each_product(const Visit& visit) const {
    int product = 0;
    for (int s0 = 0; s0 < plan.axes[0].segments; ++s0) {
      for (int s1 = 0; s1 < plan.axes[1].segments; ++s1) {
        for (int s2 = 0; s2 < plan.axes[2].segments; ++s2) visit(product++, s0, s1, s2);
      }
    }
  }
  int64_t tiles(int s0, int s1, int s2) const {  // per group
    const int64_t across = ceil_div(plan.columns, edge);
    for (const int lag : {plan.axes[0].lag[s0], plan.axes[1].lag[s1], plan.axes[2].lag[s2]}) {
      if (lag != 0) return lag > 0 ? across * across : 0;
    }
    return across * (across + 1) / 2;
  }
  int64_t slabs(int s0, int s1, int s2) const {
    const int64_t rows = p.N * plan.axes[0].count[s0] * plan.axes[1].count[s1] * plan.axes[2].count[s2];
    return ceil_div(rows, slab_rows);
  }
};

constexpr int64_t kMostSlabs = 1 << 25;  // of an item: its rows are counted in 32 bits

int64_t splits_of(int64_t slabs, int64_t slabs_per_item, int64_t forced) {
  return forced > 0 ? std::min(forced, slabs) : ceil_div(slabs, slabs_per_item);
}

// Slabs of an item. One product: the fewest splits that keep the chip within a tenth of as busy as any number
// does. Several are of many sizes: small enough that the last ones to finish are a small part of all.
int64_t choose_slabs_per_item(const Work& work, int64_t places) {
  const KronPlan& plan = work.plan;
  const int64_t share = std::max<int64_t>(1, ceil_div(static_cast<int64_t>(plan.slabs), 2 * places));
  if (plan.products > 1) return std::clamp<int64_t>(share, 8, kMostSlabs);
  const int64_t slabs = work.slabs(0, 0, 0), tiles = work.tiles(0, 0, 0) * plan.groups;
  const auto time = [&](int64_t splits) {
    return ceil_div(tiles * splits, places) * ceil_div(slabs, splits);
  };
  // Four slabs fill the ring.
  const int64_t most = std::clamp<int64_t>(2 * places / tiles, 1, std::max<int64_t>(1, slabs / 4));
  int64_t least = time(1);
  for (int64_t s = 2; s <= most; ++s) least = std::min(least, time(s));
  int64_t splits = 1;
  while (10 * time(splits) > 11 * least) ++splits;
  return std::min(ceil_div(slabs, splits), kMostSlabs);
}

int64_t blocks_at_a_time(ContractTile tile, int sm_count) {
  return int64_t{sm_count} * (tile == ContractTile::k64 ? 3 : 1);
}
int edge_of(ContractTile tile) { return tile == ContractTile::k64 ? 64 : 128; }

struct Candidate {
  KronPlan plan;
  double clocks;
};

// The plan for one way and tile; its cost, in clocks of the whole chip, is a model of an H100 on paper: per
// multiprocessor and clock mma.sync does 1300 TF32 or 2600 16-bit flops, 24 bytes come from the L2 cache and
// 12 go there.
Candidate make_plan(const KronProblem& p, bool lags, const KronAxis (&axes)[kDims], ContractTile tile,
                    ContractLoader loader, int sm_count, int64_t forced_splits) {
  Candidate result{};
  KronPlan& plan = result.plan;
  plan.precision = choose_precision(p);
  plan.loader = loader;
  plan.tile = tile;
  plan.whole_copies = loader == ContractLoader::kPositions && whole_copies_apply(p);
  plan.lags = lags;
  const int edge = edge_of(tile), slab_rows = p.element == Element::kFloat32 ? 16 : 32;
  const int64_t D = int64_t{p.columns()};
  plan.groups_per_tile = lags ? 1 : static_cast<int>(std::clamp<int64_t>(edge / D, 1, p.groups));
  plan.groups = static_cast<int>(ceil_div(p.groups, plan.groups_per_tile));
  plan.columns = lags ? p.channels : static_cast<int>(plan.groups_per_tile * D);
  std::copy(std::begin(axes), std::end(axes), plan.axes);
  plan.products = static_cast<int>(count_products(axes));

  const Work work{p, plan, edge, slab_rows};
  work.for_each_product([&](int, int s0, int s1, int s2) {
    plan.slabs += double(work.slabs(s0, s1, s2)) * double(work.tiles(s0, s1, s2)) * plan.groups;
  });
  const int64_t per_item = plan.products ? choose_slabs_per_item(work, blocks_at_a_time(tile, sm_count)) : 1;
  int64_t items = 0, most_splits = 0;
  work.for_each_product([&](int product, int s0, int s1, int s2) {
    plan.first_item[product] = static_cast<int>(items);
    const int64_t tiles = work.tiles(s0, s1, s2) * plan.groups;
    const int64_t splits = splits_of(work.slabs(s0, s1, s2), per_item, forced_splits);
    most_splits = std::max(most_splits, splits);
    items += tiles * splits;
    if (items > INT32_MAX) throw std::invalid_argument("kron_factor: too many tiles");
  });
  plan.first_item[plan.products] = static_cast<int>(items);
  plan.ways = std::min(32, power_of_two_from(ceil_div(most_splits, 8)));
  plan.final = !lags && most_splits == 1 && plan.groups_per_tile == 1;
  plan.workspace_bytes = plan.final ? 0 : items * edge * (edge + 1) * 4;

  const double terms = plan.precision == ContractPrecision::kTf32x3 ? 3 : 1;
  const double multiplied =
      2. * edge * edge * slab_rows * terms / (p.element == Element::kFloat32 ? 1300 : 2600);
  const double loaded = 2. * edge * slab_rows * element_size(p.element) / 24;
  const double out = double(p.groups) * double(D) * double(D) * 4;
  result.clocks = (plan.slabs * std::max(multiplied, loaded) +
                   double(items) * (4. * edge * edge / 12 * (plan.final ? 1 : 2) + 1500) + out / 12) /
                  sm_count;
  return result;
}

KronPlan no_products() {
  KronPlan plan{};
  plan.groups_per_tile = plan.groups = plan.ways = 1;
  return plan;
}

}  // namespace

KronPlan plan_kron_factor(const KronProblem& p, int sm_count, const Options& options) {
  if (options.sm_count > 0) sm_count = static_cast<int>(options.sm_count);
  const int64_t entries = p.N * p.channels * p.size[0] * p.size[1] * p.size[2];
  if (entries == 0 || p.T() == 0) return no_products();

  KronAxis patches[kDims], lags[kDims];
  bool lags_apply = p.kernel_volume() > 1 && options.way != int64_t(KronWay::kPatches);
  for (int d = 0; d < kDims; ++d) {
    patches[d] = axis_of_patches(p, d);
    lags_apply = lags_apply && axis_of_lags(p, d, lags[d]);
  }
  lags_apply = lags_apply && count_products(lags) <= kKronProducts;

  const ContractLoader loader = choose_loader(p, options.loader);
  // Three products per step: the tensor cores are the limit with either tile, and 128x128 would spill. Where
  // columns are read element by element, loads are.
  const bool large_applies =
      choose_precision(p) != ContractPrecision::kTf32x3 && loader != ContractLoader::kElements;
  Candidate best{};
  for (const bool by_lags : {true, false}) {
    if (by_lags ? !lags_apply : lags_apply && options.way == int64_t(KronWay::kLags)) continue;
    for (const ContractTile tile : {ContractTile::k64, ContractTile::k128}) {
      const bool excluded = tile == ContractTile::k128 ? !large_applies || options.tile == 1
                                                       : large_applies && options.tile == 2;
      if (excluded) continue;
      const Candidate plan =
          make_plan(p, by_lags, by_lags ? lags : patches, tile, loader, sm_count, options.splits);
      if (best.clocks == 0 || plan.clocks < best.clocks) best = plan;
    }
  }
  return best.plan;
}

}  // namespace backpack_cuda::cuda
