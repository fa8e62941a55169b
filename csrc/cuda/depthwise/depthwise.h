// Statistics of per-sample weight gradients of convolutions with few channels per group, without tensor
// cores: a tensor-core tile over (o, i) of one group would be nearly empty. Right for any problem, fast where
// O and channels are small.
//
// A unit is a pair (row r of groups * O, channel c of its group) and a chunk of the kernel's positions, whose
// sums over the positions (h, w) are the accumulators of a thread. Several threads, the slots, share the
// positions of a unit; each walks down the rows of its columns. With it walks the window of a that its chunk
// needs; where step = dilation, the window moves by one of its rows and stays in registers, so that a
// position costs one new row of a and one element of b.
//
//     slot  0 1 2 3 0 1 2 3        Slots lie side by side along w, in as many bands of rows as it takes.
//     Lanes
//           | | | | | | | |        of a warp that are neighbours are slots where w is the fastest dim in
//           memory v v v v v v v v        (NCHW), units where channels are (channels-last).
//
// Sums over the slots go through shuffles, and shared memory where the slots span warps. Then one thread owns
// an element of the gradient, and keeps its statistics in shared memory over the samples of its split.
//
// Cost model, with the figures of an H100 (3 TB/s, 29 T thread instructions/s: 76 instructions in the time of
// two float32 elements from memory, 38 in that of two 16-bit ones). Nothing here was measured.
//  * Bytes: a and b once, N groups (channels |a plane| + O T) elements; overlaps of windows come from L1.
//  * Flop: 2 N R channels kernel_volume T; far below any limit.
//  * Instructions per position, chunk and unit, counted in the machine code: 44 for 3x3 (131 for three
//    positions in the inner loop), about 60 for each of the two chunks of 5x5, 45 for each of the four of
//    7x7, 80 for 3x3 with step 2, which has five elements to read per position, not two.
//  * So 3x3 is bound by memory in float32 and reaches 80 to 90 % of its rate in 16 bits; 5x5 reaches 60 and
//    30 %, 7x7 reaches 40 and 20 %.
//  * Loads in flight: 768 threads per multiprocessor with three rows each, two new elements per row: 18 KB in
//    float32, about what latency needs; half of that in 16 bits.
//  * Planes of 7x7 in NCHW: a load of a warp touches four lines of L1, which then allows about 2.6 TB/s.
//  * Launches: one; one more for batch_l2, and one for sums over splits.
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

// Second order: V columns of every sample, which read the operand without columns from the caches.
DepthwisePlan plan_depthwise(const OuterProblem& problem, const ColumnOutputs& columns, int sm_count,
                             const Options& options);
void launch_depthwise(const OuterProblem& problem, const ColumnOutputs& columns, const DepthwisePlan& plan,
                      void* workspace, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
