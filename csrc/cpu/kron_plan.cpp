#include "cpu/kron_plan.h"

#include <map>
#include <numeric>

#include "cpu/contract.h"
#include "cpu/options.h"

namespace backpack_cuda::cpu {

Axis::Axis(const KronSource& source, int d)
    : kernel(source.geometry.kernel[d]),
      positions(source.positions[d]),
      step(kernel == 1 ? source.geometry.stride[d]
                       : std::gcd(source.geometry.stride[d], source.geometry.dilation[d])),
      stride(source.geometry.stride[d] / step),
      dilation(kernel == 1 ? 1 : source.geometry.dilation[d] / step),
      padding(source.geometry.padding[d]) {
  image.begin = std::max<int64_t>(ceil_div(padding, step), 0);
  const int64_t size = source.size[d] + padding;
  image.end =
      std::min(size > 0 ? ceil_div(size, step) : 0, (positions - 1) * stride + (kernel - 1) * dilation + 1);
  if (positions == 0) image.end = 0;
  image.end = std::max(image.end, image.begin);
}

void Axis::find_classes() {
  std::map<std::pair<int64_t, int64_t>, LagClass> found;
  for (int64_t i = 0; i < kernel; ++i)
    for (int64_t other = 0; other < kernel; ++other) {
      LagClass& entry = found[{other - i, i * dilation % stride}];
      entry.lag = other - i, entry.residue = i * dilation % stride;
      entry.members.push_back({i, other, 0, 0});
    }
  for (auto& [key, entry] : found) {
    std::vector<int64_t> cuts;
    for (const auto& member : entry.members)
      for (int64_t end : {int64_t{0}, positions}) cuts.push_back(member.i * dilation / stride + end);
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    // A member's range is a run of pieces; what lies between ranges is no piece.
    for (size_t cut = 0; cut + 1 < cuts.size(); ++cut) {
      const int64_t piece = int64_t(entry.pieces.size());
      bool covered = false;
      for (auto& member : entry.members) {
        const int64_t begin = member.i * dilation / stride;
        if (cuts[cut] < begin || cuts[cut] >= begin + positions) continue;
        if (!covered) entry.pieces.push_back({cuts[cut], cuts[cut + 1]});
        if (cuts[cut] == begin) member.first = piece;
        member.last = piece + 1;
        covered = true;
      }
    }
    classes.push_back(std::move(entry));
  }
  for (const LagClass& lags : classes)
    for (const Range& piece : lags.pieces) {
      const double length = double(products(lags, piece, image).length());
      cost.products += length, cost.pieces += 1;
      if (lags.lag == 0) cost.products_of_zero += length, cost.pieces_of_zero += 1;
    }
}

Range Axis::products(const LagClass& lags, const Range& piece, const Range& left) const {
  const int64_t shift = lags.lag * dilation;
  const int64_t begin = std::max(left.begin, image.begin - shift) - lags.residue,
                end = std::min(left.end, image.end - shift) - lags.residue;
  return {std::max(piece.begin, begin > 0 ? ceil_div(begin, stride) : 0),
          std::min(piece.end, end > 0 ? ceil_div(end, stride) : 0)};
}

template <class Acc>
KronPlan<Acc>::KronPlan(const KronSource& source, const std::array<Axis, 3>& axes, int unfold, bool grouped,
                        const ProductTile<Acc>& tile, int64_t lanes)
    : source(source), axes(axes), lanes_are_groups(grouped), tile(tile), lanes(lanes) {
  const int64_t groups = source.geometry.groups;
  channels = source.channels / groups;
  inner = outer = 1;
  for (int d = 2; d >= 0; --d)
    if (!axes[d].can_lag()) unfold = std::max(unfold, 3 - d);
  for (int d = 0; d < 3; ++d) {
    unfolded[d] = axes[d].kernel > 1 && d >= 3 - unfold;
    (unfolded[d] ? inner : outer) *= axes[d].kernel;
  }
  features = channels * inner;
  group_blocks = grouped ? ceil_div(groups, lanes) : groups;
  feature_stride = grouped ? lanes : 1;
  panel_features = grouped ? tile.nv : tile.nv * lanes;
  panels = ceil_div(features, panel_features);
  row_panels = ceil_div(features, tile.mr);
  choose_slabs();
}

// The largest slab (all, some planes, some lines of one plane, or part of one line) whose packed vectors
// fit. A slab is a range of left factors; right factors lie in it or in a border around it.
template <class Acc>
void KronPlan<Acc>::choose_slabs() {
  const int64_t limit = options().chunk_bytes ? options().chunk_bytes : kSlabBytes;
  for (int d = 0; d < 3; ++d) slab[d] = std::max<int64_t>(extent(d).length(), 1);
  bool first = true;
  for (int d = 0; d < 3; ++d) {
    const int64_t reach = unfolded[d] ? 0 : (axes[d].kernel - 1) * axes[d].dilation;
    after[d] = reach, before[d] = first ? 0 : reach;  // the first lag that is not zero is positive
    if (reach) first = false;
  }
  const auto box = [&] {
    int64_t positions = 1;
    for (int d = 0; d < 3; ++d)
      positions *= std::min(before[d] + slab[d] + after[d], std::max<int64_t>(extent(d).length(), 1));
    return positions;
  };
  for (int d = 0; box() * position_size() * int64_t(sizeof(Acc)) > limit;) {
    while (d < 3 && slab[d] == 1) ++d;
    if (d == 3) break;
    slab[d] = ceil_div(slab[d], 2);
  }
  slabs = 1;
  for (int d = 0; d < 3; ++d) slabs *= ceil_div(extent(d).length(), slab[d]);
  box_positions = box();
  const int64_t target = options().chunk_bytes ? options().chunk_bytes : kChunkBytes;
  chunk = slabs > 1 ? 1
                    : std::clamp<int64_t>(target / (box_positions * position_size() * int64_t(sizeof(Acc))),
                                          1, std::max<int64_t>(source.samples, 1));
}

template <class Acc>
double KronPlan<Acc>::cost() const {
  double products = 1, pieces = 1, products_of_zero = 1, pieces_of_zero = 1;
  for (int d = 0; d < 3; ++d) {
    const double outputs = double(axes[d].positions);
    products *= unfolded[d] ? outputs : axes[d].cost.products;
    pieces *= unfolded[d] ? 1 : axes[d].cost.pieces;
    products_of_zero *= unfolded[d] ? outputs : axes[d].cost.products_of_zero;
    pieces_of_zero *= unfolded[d] ? 1 : axes[d].cost.pieces_of_zero;
  }
  double upper = 0;  // tiles that reach the upper triangle
  for (int64_t panel = 0; panel < row_panels; ++panel) upper += double(panels - first_panel(panel));
  const double tiles = double(panels * row_panels);
  const double fmas = tile.mr * tile.nv, loads = tile.mr + tile.nv;
  // Two FMAs or two loads per cycle, four cycles from an FMA to the next on the same register.
  const double per_product = std::max({fmas / 2, loads / 2, 4.0}) + 1;
  const double packed = double(slabs) * double(box_positions) * double(panels * pitch());
  const double per_piece = (2 * fmas + 30) * double(slabs) / double(chunk);
  const double sums = per_product * (upper * products_of_zero + tiles * (products - products_of_zero) / 2) +
                      per_piece * (upper * pieces_of_zero + tiles * (pieces - pieces_of_zero) / 2);
  return double(group_blocks) * (sums + packed * (unfolds() ? 1.0 : 0.5));
}

template <class Acc>
std::unique_ptr<KronPlan<Acc>> choose_plan(const KronSource& source, const std::array<Axis, 3>& axes) {
  const Kernels<Acc>& kernels = cpu::kernels<Acc>();
  const int64_t forced = options().kron;
  std::unique_ptr<KronPlan<Acc>> best;
  double best_cost = 0;
  for (int grouped = 0; grouped < (source.geometry.groups > 1 ? 2 : 1); ++grouped)
    for (int unfold = 0; unfold <= 3; ++unfold) {
      if (forced && forced != 1 + unfold && forced != 5 + unfold) continue;
      if (forced && source.geometry.groups > 1 && grouped != forced / 5) continue;
      const ProductTile<Acc>* tiles = grouped ? kernels.grouped_products : kernels.dense_products;
      for (int t = 0; t < (grouped ? kernels.grouped_product_count : kernels.dense_product_count); ++t) {
        auto plan = std::make_unique<KronPlan<Acc>>(source, axes, unfold, grouped, tiles[t], kernels.lanes);
        const double cost = plan->cost();
        if (!best || cost < best_cost) best = std::move(plan), best_cost = cost;
      }
    }
  return best;
}

#define INSTANTIATE(Acc)         \
  template struct KronPlan<Acc>; \
  template std::unique_ptr<KronPlan<Acc>> choose_plan(const KronSource&, const std::array<Axis, 3>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace backpack_cuda::cpu
