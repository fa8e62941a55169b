// Statistics of per-sample weight gradients of convolutions with few channels per group, without tensor
// cores: a tensor-core tile over (o, i) of one group would be nearly empty. Right for any problem, fast where
// O and channels are small.
//
// A unit is a pair (row r of groups * O, channel c of its group) and a chunk of the kernel's positions, whose
// sums over the positions p are the accumulators of a thread. Several threads, the slots, share the positions
// of a unit; every thread walks down the rows of its columns:
//
//          w ->                    The window of a that the chunk needs at (h, w) moves down with h. Where
//      h   |  |  |  |  slots       step = dilation it moves by one kernel row, and stays in registers: a row
//      of |   v  v  v  v  walk        new elements of a and one of b per position.
//
// Sums over the slots go through shuffles, and shared memory where the slots span warps; then one thread owns
// an element of the gradient, keeps its statistics in registers over the samples of its split, and writes
// them once. Adjacent lanes are slots where w is the fastest dim in memory (NCHW), units where channels are
// (channels-last).
//
// Cost model: a and b are read once from memory, N groups (channels T step^2 + O T) elements, overlaps of
// windows come from L1. Per position and unit 2 kernel_volume flop, and about
//   4 + 2 taps + 5 (new elements of a + 1) instructions per chunk: 45 for 3x3, 2 x 60 for 5x5, 4 x 45 for
//   7x7, 80 for 3x3 with step 2.
// An H100 issues 29 T thread instructions/s and reads 3 TB/s: 76 instructions in the time of two float32
// elements, 38 in the time of two of 16 bits. So 3x3 is bound by memory in float32 and near it in 16 bits;
// 5x5 reaches 60 and 30 %, 7x7 40 and 20 % of the memory's rate. Not measured.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/options.h"
#include "cuda/common/outer_problem.h"

namespace backpack_cuda::cuda {

// How many positions of the kernel a thread has accumulators for: rows x columns of it, and by how many rows
// the window moves per step; if by all, nothing is kept.
enum class DepthwiseBox : int { k3x3Rolling, k3x3, k5x3Rolling, k7x2Rolling, k1x5 };

constexpr int kMaxDepthwiseThreads = 256;  // per block

struct DepthwisePlan {
  DepthwiseBox box;
  int box_rows, box_columns;           // used of it
  int chunks[3], chunk_count;          // of the kernel: per dim, and their product
  bool lanes_along_units;              // else along the slots
  int slots, units, chunks_per_block;  // of a block; slots and units are powers of two
  int slots_w;                         // slots side by side; slots / slots_w below each other
  int strip;                           // rows that a slot walks down
  int unit_blocks, chunk_blocks, splits;
  int64_t norm_offset, sum_offset, square_offset;  // in the workspace, in floats
  // At most 32 MB for the partial sums of splits, and [N, unit_blocks * chunk_blocks] floats for batch_l2:
  // less than a hundredth of b where T is at least 128.
  int64_t workspace_bytes;

  int threads() const { return slots * units * chunks_per_block; }
  int64_t blocks() const { return int64_t{unit_blocks} * chunk_blocks * splits; }
};

DepthwisePlan plan_depthwise(const OuterProblem& problem, const StatsOutputs& outputs, int sm_count,
                             const Options& options);

// `workspace` holds plan.workspace_bytes, aligned to 16; the plan was made for this problem and these
// outputs.
void launch_depthwise(const OuterProblem& problem, const StatsOutputs& outputs, const DepthwisePlan& plan,
                      void* workspace, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
