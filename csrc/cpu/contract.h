// The one-pass first-order statistics of a layer: chunks of samples are packed, contracted and dropped.
#pragma once
#include <algorithm>
#include <functional>
#include <vector>

#include "common/integers.h"
#include "common/stats_tensors.h"
#include "cpu/kernels.h"
#include "cpu/storage.h"
#include "cpu/workspace.h"

namespace backpack_cuda::cpu {

// Sizes of what is held at a time; together with tables and norms they stay below 16 MiB.
constexpr int64_t kChunkBytes = 1 << 20;  // packed operands of a chunk of samples: stays in the L2 cache
constexpr int64_t kSlabBytes =
    4 << 20;  // packed operands of one sample; larger samples come in slabs of rows t
constexpr int64_t kAccumulatorBytes =
    8 << 20;  // accumulators; more units are done in further passes over the operands

// A contraction G_n[o, k] = sum_t b[n, t, o] a[n, t, k], cut into units as ContractJob describes.
template <class Acc>
struct ContractPlan {
  Tile<Acc> tile;
  int64_t lanes;
  int64_t lanes_are_groups = 0;  // groups of the layer when vector lanes run over them
  int64_t groups;                // outer index of units: the layer's groups, or blocks of `lanes` groups
  int64_t all_rows;              // rows of the weight, all groups
  int64_t rows, columns;         // rows o and columns k per group of the layer
  int64_t column_begin =
      0;  // of the weight's row_length columns: wide rows are done in ranges of columns, from the left
  int64_t row_length;
  int64_t panels, blocks;
  int64_t samples;
  int64_t slabs = 1, slab_rows;  // a sample's rows t come in this many slabs of at most slab_rows
  int64_t a_group;               // packed elements of a per group and slab
  std::vector<int32_t> row_offset;
  std::vector<int64_t> column_offset;
  std::vector<int32_t> column_lanes;
  std::vector<int32_t> source;  // empty: columns in order
  // T = 1: the samples of the layer, of which every "sample" here holds slab_rows. Sums of squares are then
  // sums of products of squared operands, and sum_grad_centered_squared is the difference of two sums;
  // kCancelled marks where it lost its digits.
  int64_t rows_are_samples = 0;

  int64_t b_lanes() const { return lanes_are_groups ? lanes : 1; }
  int64_t strips() const { return groups * panels; }
  int64_t strip_size() const { return blocks * tile.mr * tile.nv * lanes; }

  // Sets tile, panels, blocks and empty column tables for this many column vectors per group.
  void choose_tile(const Kernels<Acc>& kernels, int64_t column_vectors);
  // Work per row t in vector instructions, all groups.
  double cost() const;
  // Strips whose accumulators fit into kAccumulatorBytes; the groups that they touch.
  int64_t strips_per_pass() const;
  int64_t groups_per_pass() const { return std::min(groups, ceil_div(strips_per_pass(), panels) + 1); }
};

// The sum of squares that belongs to a centered one. Infinite samples leave a centered sum of NaN, but not a
// sum of squares.
template <class T>
T uncentered(T centered, T sum, T inverse_count) {
  const T square = centered + sum * inverse_count * sum;
  return square != square && sum == sum ? sum * sum : square;
}

// Packs the operands of a plan.
template <class Acc>
class Operands {
 public:
  const Acc* sample_weights = nullptr;  // [samples of the layer]: b is packed times these; null: as it is

  virtual ~Operands() = default;
  virtual int64_t rows_in_slab(int64_t slab) const = 0;
  // Part `part` of `parts` of sample n, slab `slab`: groups [group_begin, group_end) of a, strips
  // [strip_begin, strip_end) of b.
  struct Piece {
    int64_t n, slab, part, parts;
    bool square;
  };
  virtual void pack_a(const Piece& piece, int64_t group_begin, int64_t group_end, Acc* dst) const = 0;
  virtual void pack_b(const Piece& piece, int64_t strip_begin, int64_t strip_end, Acc* dst) const = 0;
};

// Computes what is wanted of the weight. `chunk_packed(begin, end)` is called once for every range of
// samples, while they are still in the caches.
template <class Acc>
void contract(const ContractPlan<Acc>& plan, const Operands<Acc>& operands, int64_t want,
              const StatsTensors& weight, const std::function<void(int64_t, int64_t)>& chunk_packed);

}  // namespace backpack_cuda::cpu
