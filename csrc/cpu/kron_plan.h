// How a Kronecker factor is computed: which dims are unfolded, what shares products, tiles and slabs.
#pragma once
#include <algorithm>
#include <array>
#include <memory>
#include <vector>

#include "common/integers.h"
#include "cpu/kron.h"

namespace backpack_cuda::cpu {

using Dims = KronSource::Dims;

// Split-up work for threads: fixed, so that results do not depend on their number.
constexpr int64_t kKronItems = 16;

inline int64_t product(const Dims& dims) { return dims[0] * dims[1] * dims[2]; }

struct Range {
  int64_t begin, end;
  int64_t length() const { return std::max<int64_t>(end - begin, 0); }
};

// Pairs (i, i') of kernel positions in one dim whose products are the same, but for their range.
struct LagClass {
  struct Member {
    int64_t i, other;
    int64_t first, last;  // its pieces
  };
  int64_t lag;      // i' - i
  int64_t residue;  // coordinates are stride * j + residue
  std::vector<Member> members;
  std::vector<Range> pieces;  // of j
};

// One dim of the convolution, on the grid of coordinates that patches read: grid coordinate y is coordinate
// y * step - padding of the image.
struct Axis {
  int64_t kernel, positions, step, stride, dilation, padding;
  Range image;                    // grid coordinates that patches read inside of the image
  std::vector<LagClass> classes;  // see find_classes
  struct Cost {
    double products = 0, pieces = 0;                  // of all lags
    double products_of_zero = 0, pieces_of_zero = 0;  // of lag 0
  } cost;

  Axis(const KronSource& source, int d);

  // Wide kernels have too many pairs of positions to look at each.
  bool can_lag() const { return kernel <= 256; }

  void find_classes();

  // j of the products of a piece whose left factor lies in `left` and whose right factor lies in the image.
  Range products(const LagClass& lags, const Range& piece, const Range& left) const;
};

// How a factor is computed.
template <class Acc>
struct KronPlan {
  const KronSource& source;
  const std::array<Axis, 3>& axes;
  std::array<bool, 3> unfolded;
  bool lanes_are_groups;
  ProductTile<Acc> tile;
  const int64_t lanes;
  int64_t channels;        // per group
  int64_t features;        // of a packed vector
  int64_t inner, outer;    // kernel positions of the unfolded dims, and of the others
  int64_t group_blocks;    // the groups, or blocks of `lanes` of them
  int64_t panel_features;  // of a panel of columns
  int64_t panels, row_panels;
  int64_t feature_stride;  // elements between features in a panel

  Dims slab, before, after;  // left factors of a slab, and how far right factors reach out of it
  int64_t slabs, chunk;      // slabs of a sample; samples packed together
  int64_t box_positions;     // packed at most per sample and slab

  KronPlan(const KronSource& source, const std::array<Axis, 3>& axes, int unfold, bool grouped,
           const ProductTile<Acc>& tile, int64_t lanes);

  // Elements of a panel per position, and of a tile.
  int64_t pitch() const { return tile.nv * lanes; }
  int64_t tile_size() const { return tile.mr * pitch(); }
  // The first panel of columns that reaches the diagonal.
  int64_t first_panel(int64_t row_panel) const { return row_panel * tile.mr / panel_features; }
  bool unfolds() const { return inner > 1; }
  // Packed grid coordinates in a dim that has not been cut into slabs.
  Range extent(int d) const { return unfolded[d] ? Range{0, axes[d].positions} : axes[d].image; }
  // Distances of packed positions in the sums over j.
  int64_t step(int d) const { return unfolded[d] ? 1 : axes[d].stride; }

  // Packed elements of a position, and of a chunk.
  int64_t position_size() const { return std::max<int64_t>(group_blocks * panels * pitch(), 1); }
  int64_t packed_size() const { return std::max<int64_t>(chunk * box_positions * position_size(), 1); }
  // Groups of a block, and its first channel.
  int64_t groups_in(int64_t block) const {
    return lanes_are_groups ? std::min(lanes, source.geometry.groups - block * lanes) : 1;
  }
  int64_t first_channel(int64_t block) const { return block * feature_stride * channels; }
  // Rough cost in cycles.
  double cost() const;

 private:
  void choose_slabs();
};

// The cheapest plan for these dims, whose classes have been found.
template <class Acc>
std::unique_ptr<KronPlan<Acc>> choose_plan(const KronSource& source, const std::array<Axis, 3>& axes);

// A slab: its left factors and everything that it reads, in packed coordinates.
struct KronSlab {
  std::array<Range, 3> left, box;

  template <class Acc>
  KronSlab(const KronPlan<Acc>& plan, int64_t index) {
    for (int d = 2; d >= 0; --d) {
      const Range extent = plan.extent(d);
      const int64_t count = ceil_div(extent.length(), plan.slab[d]),
                    begin = extent.begin + index % count * plan.slab[d];
      index /= count;
      left[d] = {begin, std::min(begin + plan.slab[d], extent.end)};
      box[d] = {std::max(begin - plan.before[d], extent.begin),
                std::min(left[d].end + plan.after[d], extent.end)};
    }
  }
  // Positions of the box, and how far its neighbours in a dim are from each other.
  int64_t positions() const { return box[0].length() * box[1].length() * box[2].length(); }
  Dims stride() const { return {box[1].length() * box[2].length(), box[2].length(), 1}; }
};

}  // namespace backpack_cuda::cpu
