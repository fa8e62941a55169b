// Per-sample gradient statistics in one pass on the tensor cores: each tile of G_n is formed once, in
// registers, and leaves its share in every result that is wanted. For sm_80 and up.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/columns/column_sums.h"
#include "cuda/common/options.h"
#include "cuda/common/outer_problem.h"

namespace backpack_cuda::cuda {

enum class ContractPrecision : int { kTf32, kTf32x3, kBFloat16, kFloat16 };

// How the operands reach shared memory; the numbers are those of Options::loader.
enum class ContractLoader : int {
  kRows = 1,  // both operands: rows of adjacent channels, one stride for all positions, 16-byte copies
  kChannelsLast = 2,  // a: patches by 16-byte copies along the channels; b as in kRows
  kPositions = 3,     // a: patches by single elements; b: adjacent positions, by the widest copy they allow
  kElements = 4,      // any strides, single elements
};

// The numbers are those of Options::tile.
enum class ContractTile : int { k64 = 1, k128 = 2 };

struct ContractPlan {
  ContractPrecision precision;
  ContractLoader loader;
  ContractTile tile;
  bool squares;          // first order: keeps a tile of squares besides the sum
  bool packed;           // two samples per slab, for T of one mma depth at most
  bool keep_a, keep_b;   // second order: the operand without columns stays in shared memory for all of them
  int split_unit;        // second order: splits begin at a multiple of so many samples
  int copy_bytes;        // of b in kPositions: 16, 8, 4 or 2
  int splits;            // of the samples (n, or (n, v)), with partial sums in the workspace if above 1
  int t_splits;          // of the positions; above 1, splits is N, and the workspace holds parts of each G_n
  int t_per_split;       // positions of each, a multiple of the slab's rows
  int tiles_o, tiles_i;  // per group
  int64_t norm_columns;  // partial norms per sample
  ColumnSumsPlan column_sums;  // second order, with t_splits: of the pass over the parts
  // Parts of the workspace, in bytes from its begin. Bounds, where S blocks fit on the chip at a time
  // (sm_count, or three times that for 64x64) and a tile has A elements:
  //   sums, squares: 8 S A bytes each, which is 17 MB on 132 multiprocessors, whatever the problem; nothing
  //                  unless the tiles alone leave the chip idle. With t_splits, sums alone, of 4 S A bytes.
  //                  Second order: sums alone
  //   norms:         4 N bytes per tile of the weight (per 32 elements of it with t_splits); nothing with one
  //   column_sums:   its own
  int64_t norms_at, sums_at, squares_at, column_sums_at;
  int64_t workspace_bytes;
};

// The results that are wanted are those that are not null in `outputs`; nothing is read through them.
ContractPlan plan_contract(const OuterProblem& problem, const StatsOutputs& outputs, int sm_count,
                           const Options& options);

// The same for columns: samples are the pairs (n, v), v fastest.
ContractPlan plan_contract(const OuterProblem& problem, const ColumnOutputs& columns, int sm_count,
                           const Options& options);

// A sample with infinite operands may have NaN for its norm: zeros of the tiles' edges are multiplied too.
// Asynchronous; throws when a launch fails. `workspace`: plan.workspace_bytes, aligned to 16.
void launch_contract(const OuterProblem& problem, const StatsOutputs& outputs, const ContractPlan& plan,
                     void* workspace, cudaStream_t stream);
void launch_contract(const OuterProblem& problem, const ColumnOutputs& columns, const ContractPlan& plan,
                     void* workspace, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
