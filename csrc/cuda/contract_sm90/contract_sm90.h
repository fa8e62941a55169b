// The contract kernel (csrc/cuda/contract) for the tensor cores and the copy engine of Hopper: bfloat16 and
// float16 operands as dense rows, that is Linear layers and 1x1 convolutions in channels-last order. wgmma
// takes both operands straight from shared memory, where TMA puts them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/options.h"
#include "cuda/common/outer_problem.h"

namespace backpack_cuda::cuda {

// Whether this path was built, the current device has it (compute capability 9.0) and it can do the problem:
// bfloat16 or float16, one group, kernel 1 without padding; adjacent channels; one stride from position to
// position and, beyond a sample's positions, from sample to sample; strides that 16 bytes divide (so I and O
// are multiples of 8 where rows touch); aligned data.
bool contract_sm90_applies(const OuterProblem& problem);

struct ContractSm90Plan {
  int tiles_o, tiles_i;  // of 128 x 128
  int splits;            // of the samples, with partial sums in the workspace if above 1
  // Parts of the workspace, in bytes from its begin. Bounds: sums and squares 64 KiB each per multiprocessor,
  // nothing unless tiles alone leave the chip idle; norms 4 N bytes per tile, nothing for one tile.
  int64_t norms_at, sums_at, squares_at;
  int64_t workspace_bytes;
};

// The results that are wanted are those that are not null in `outputs`; nothing is read through them.
// Options: splits, sm_count.
ContractSm90Plan plan_contract_sm90(const OuterProblem& problem, const StatsOutputs& outputs, int sm_count,
                                    const Options& options);

// Asynchronous; throws when a launch fails. `workspace`: plan.workspace_bytes, aligned to 16.
void launch_contract_sm90(const OuterProblem& problem, const StatsOutputs& outputs,
                          const ContractSm90Plan& plan, void* workspace, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
