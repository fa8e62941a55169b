// The C entry point through which tests ask the cost model.
#include "cuda/cost_model.h"

using namespace backpack_cuda::cuda;

// wanted: bits 1 grad, 2 batch_grad, 4 batch_l2, 8 sum_grad_squared, 16 centered. seconds [3] of each way
// that applies, else -1. Returns the way chosen.
extern "C" int choose_way_for(const OuterProblem* problem, int wanted, int weighted, int linear, int forced,
                              double* seconds) {
  float something = 0;
  const StatsOutputs out{wanted & 1 ? &something : nullptr,  wanted & 2 ? &something : nullptr,
                         wanted & 4 ? &something : nullptr,  wanted & 8 ? &something : nullptr,
                         wanted & 16 ? &something : nullptr, weighted ? &something : nullptr};
  for (int way = 1; way <= 3; ++way) {
    const bool possible = applies(Way(way), *problem, out, linear);
    seconds[way - 1] = possible ? cost_of(Way(way), *problem, out).seconds() : -1;
  }
  Options options;
  options.way = forced;
  return int(choose_way(*problem, out, linear, options));
}
