// Test switches of the CUDA kernels (operator _cuda_option): each forces a choice that is otherwise made by
// the problem's shape. 0 leaves the choice; a choice that does not apply is ignored.
#pragma once

#include <cstdint>

namespace backpack_cuda::cuda {

struct Options {
  int64_t way = 0;       // how the results are computed: see cost_model.h
  int64_t tile = 0;      // contract: 1 for 64x64, 2 for 128x128
  int64_t loader = 0;    // contract: 1 to 4, see contract.h
  int64_t splits = 0;    // of the samples
  int64_t t_splits = 0;  // of the positions of one sample
  int64_t sm_count = 0;  // multiprocessors to plan for
};

}  // namespace backpack_cuda::cuda
