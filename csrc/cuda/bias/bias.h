// Statistics of per-sample bias gradients: G_n[o] = sum over the positions of grad_output.
//
// Cost model: N O T elements are read once, with one conversion and one addition each, which is 5 to 10 times
// less work than the multiprocessors could do in that time; so the limit is the rate of memory (an H100: 3
// TB/s), given enough loads in flight: 512 threads per multiprocessor with four or eight loads of up to 16
// bytes each are 32 to 64 KB. One launch; one more each for batch_l2 and for sums over splits, two when
// positions are split. Nothing here was measured.
//
//  * Few positions (T = 1: Linear layers of 2-d inputs): a thread owns one output, or 16 bytes of them, and
//    runs through the samples of its split, four at a time.
//  * Many positions: several threads, the slots, share the positions of an output. Adjacent lanes are outputs
//    where those are adjacent in memory (Linear, channels-last), else slots (NCHW). Sums over the slots go
//    through shuffles, and shared memory where the slots span warps; then one thread owns an output.
//  * Too few samples and outputs to fill the chip: the positions are split too. A first pass stores sums of
//    parts [N, t_splits, O], and a second takes those for its positions.
//
// Accuracy: a thread adds eight elements pairwise, eight such sums in a row, and those in float64, so that
// the error does not grow with T.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/options.h"
#include "cuda/common/outer_problem.h"

namespace backpack_cuda::cuda {

struct BiasProblem {
  Element element;
  const void* data;  // [N, O, three position dims]; strides in elements, any
  int64_t N;         // at least 1
  int O;             // at least 1
  int64_t stride_n, stride_o;
  int64_t size[3];  // positions, T = their product, at least 1, below 2^31
  int64_t stride[3];

  int64_t T() const { return size[0] * size[1] * size[2]; }
};

constexpr int kMaxBiasThreads = 256;  // per block

// One pass over an operand.
struct BiasPass {
  bool lanes_along_outputs;               // else along the slots
  bool vector_outputs, vector_positions;  // loads of 16 bytes along the one or the other; not both
  int slots, units;         // of a block, powers of two; a unit is an output, or a vector of them
  int unit_blocks, splits;  // splits of the samples
  int64_t norm_offset, sum_offset, square_offset;  // in the workspace, in floats
  int64_t floats;                                  // of the workspace
};

struct BiasPlan {
  // The first pass sees N * t_splits samples and stores their sums when t_splits > 1; `second` is then the
  // pass over those.
  int t_splits;
  BiasPass first, second;
  // At most 16 MB for the sums of parts, 16 MB for those of splits, and [N, unit_blocks] floats for batch_l2.
  int64_t workspace_bytes;
};

// The same positions in fewer dims where several are one in memory; the last is the innermost.
BiasProblem merge_positions(BiasProblem problem);

// The sums of parts as a problem of their own.
BiasProblem second_problem(const BiasProblem& problem, int t_splits,
                           const void* sums);  // [N, t_splits, O], float32

BiasPlan plan_bias(const BiasProblem& problem, const StatsOutputs& outputs, int sm_count,
                   const Options& options);

// The outputs are those of a weight with R = O, I = 1. `workspace` holds plan.workspace_bytes, aligned to 16;
// the plan was made for this problem and these outputs.
void launch_bias(const BiasProblem& problem, const StatsOutputs& outputs, const BiasPlan& plan,
                 void* workspace, cudaStream_t stream);

// The sums [N, O] over the positions alone, in float32 whatever the element type; the plan was made for a
// batch_grad.
void launch_bias_sums(const BiasProblem& problem, float* sums, const BiasPlan& plan, void* workspace,
                      cudaStream_t stream);

}  // namespace backpack_cuda::cuda
