// Which kernels compute a set of results: the flops and bytes of every way, and the choice.
#pragma once

#include "cuda/common/options.h"
#include "cuda/common/outer_problem.h"

namespace backpack_cuda::cuda {

// Values of the test switch "way".
enum class Way : int {
  kContract = 1,   // everything in one pass of the contraction
  kSeparate = 2,   // Linear: grad by the library's product, norms by outer_norm (T = 1) or gram_norm, squares
                   // for T = 1 by square_gemm; reads the operands once for each
  kDepthwise = 3,  // convolutions: scalar arithmetic, one pass, no waste where groups have few channels
  kContractSm90 = 4,  // as kContract, by wgmma and TMA where these apply
};

// Seconds on a model of an H100. The figures are assumptions of data sheets, not measurements; only their
// ratios matter.
struct Cost {
  double products = 0;  // seconds of multiplications, padded to the kernels' tiles
  double bytes = 0;     // of operands and per-sample results, each as often as it is read or written
  double epilogue = 0;  // seconds of the work at sample boundaries
  int launches = 0;

  double seconds() const;
};

Cost cost_of(Way way, const OuterProblem& problem, const StatsOutputs& out);

// Whether the way can compute these results. `linear`: the problem is a Linear layer's.
bool applies(Way way, const OuterProblem& problem, const StatsOutputs& out, bool linear);

// The cheapest way that applies, or the one that `options` ask for.
Way choose_way(const OuterProblem& problem, const StatsOutputs& out, bool linear, const Options& options);

// The same for the columns of a convolution.
Way choose_way(const OuterProblem& problem, const ColumnOutputs& columns, const Options& options);

// Whether the contraction should try the path of sm_90a. It has never run on a GPU: until it has been right
// and faster there (benchmarks/gpu_report.py), only the switch "way" chooses it.
bool wants_sm90(const OuterProblem& problem, const Options& options);

}  // namespace backpack_cuda::cuda
