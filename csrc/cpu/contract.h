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
  int64_t V = 1;                // output gradients per sample: a and b are packed for each of them, or once
  bool v_in_a = false;          // which of a and b differs between them
  // T = 1: the samples of the layer, of which every "sample" here holds slab_rows. Sums of squares are then
  // sums of products of squared operands, and sum_grad_centered_squared is the difference of two sums;
  // kCancelled marks where it lost its digits.
  int64_t rows_are_samples = 0;

  int64_t b_lanes() const { return lanes_are_groups ? lanes : 1; }
  int64_t strips() const { return groups * panels; }
  int64_t strip_size() const { return blocks * tile.mr * tile.nv * lanes; }

  // Packed elements of a slab with `count` output gradients per sample.
  int64_t packed(int64_t a, int64_t b, int64_t count) const { return v_in_a ? count * a + b : a + count * b; }
  // With these, for a slab of a sample that does not fit as a whole.
  int64_t slab_V() const { return std::min<int64_t>(V, 8); }

  // Sets tile, panels, blocks and empty column tables for this many column vectors per group.
  void choose_tile(const Kernels<Acc>& kernels, int64_t column_vectors);
  // Work per row t in vector instructions, all groups.
  double cost() const;
  // Strips whose accumulators fit into kAccumulatorBytes; the groups that they touch.
  int64_t strips_per_pass() const;
  int64_t groups_per_pass() const { return std::min(groups, ceil_div(strips_per_pass(), panels) + 1); }
};

// The V output gradients of every sample.
template <class Acc>
struct OutputGradients {
  int64_t V = 1;
  int64_t stride = 0;          // elements from one to the next
  const Acc* signs = nullptr;  // [samples of the layer, V]: factors of their squares; null: 1
};

// Where the results of a contraction go; null: not wanted.
struct ContractResults {
  const Tensor* grad = nullptr;                       // [*weight]
  const Tensor* batch_grad = nullptr;                 // [V, N, *weight]
  const Tensor* batch_l2 = nullptr;                   // [N], V = 1
  const Tensor* sum_grad_squared = nullptr;           // [*weight]
  const Tensor* sum_grad_centered_squared = nullptr;  // [*weight], V = 1
  const Tensor* batch_square = nullptr;               // [N, *weight] sum_v signs G_nv^2

  ContractResults() = default;
  ContractResults(const StatsTensors& p, int64_t want)
      : grad(want & kGrad ? &p.grad : nullptr),
        batch_grad(want & kBatchGrad ? &p.batch_grad : nullptr),
        batch_l2(want & kBatchL2 ? &p.batch_l2 : nullptr),
        sum_grad_squared(want & kSumGradSquared ? &p.sum_grad_squared : nullptr),
        sum_grad_centered_squared(want & kSumGradCenteredSquared ? &p.sum_grad_centered_squared : nullptr) {}
  ContractResults(const ColumnTensors& p, int64_t want)
      : batch_grad(want & kFactor ? &p.factor : nullptr),
        sum_grad_squared(want & kDiag ? &p.diag : nullptr),
        batch_square(want & kBatchDiag ? &p.batch_diag : nullptr) {}

  bool sums() const { return grad || squares(); }
  bool squares() const { return sum_grad_squared || sum_grad_centered_squared; }
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
  const Acc* signs = nullptr;           // those of OutputGradients

  virtual ~Operands() = default;
  virtual int64_t rows_in_slab(int64_t slab) const = 0;
  // Part `part` of `parts` of sample n, output gradient v, slab `slab`: groups [group_begin, group_end) of a,
  // strips [strip_begin, strip_end) of b.
  struct Piece {
    int64_t n, v, slab, part, parts;
    bool square;
  };
  virtual void pack_a(const Piece& piece, int64_t group_begin, int64_t group_end, Acc* dst) const = 0;
  virtual void pack_b(const Piece& piece, int64_t strip_begin, int64_t strip_end, Acc* dst) const = 0;
};

// `chunk_packed(begin, end)` is called once for every range of pairs n * V + v, in order, while they are
// still in the caches.
template <class Acc>
void contract(const ContractPlan<Acc>& plan, const Operands<Acc>& operands, const ContractResults& results,
              const std::function<void(int64_t, int64_t)>& chunk_packed);

}  // namespace backpack_cuda::cpu
