// Statistics of per-sample sums: the bias of every layer.
#pragma once
#include "cpu/contract.h"
#include "cpu/strided.h"

namespace backpack_cuda::cpu {

// Takes the samples of grad_output [N, *, C, *] range by range, so that each is still in the caches of the
// weight's pass.
template <class Acc>
class BiasStats {
 public:
  // Computes nothing when nothing is wanted.
  BiasStats(const Tensor& grad_output, int64_t channel_dim, int64_t want, const StatsTensors& bias,
            Workspace& workspace);
  void add(int64_t begin, int64_t end);
  void finish();

 private:
  void sum_positions(int64_t n, int64_t channel_begin, int64_t channel_end, Acc* sums) const;

  const Kernels<Acc>& kernels_;
  const int64_t want_, channels_, sample_stride_, channel_stride_;
  const Rows before_, after_;  // positions before and after the channel dim
  const void* data_;
  const Storage storage_;
  const StatsTensors& bias_;
  int64_t count_ = 0;          // samples so far
  int64_t samples_per_block_;  // whose sums are held at a time
  Acc* sums_ = nullptr;        // [samples_per_block, C]
  double* total_ = nullptr;    // [C]
  double* square_ = nullptr;   // [C], centered when that is wanted
};

}  // namespace backpack_cuda::cpu
