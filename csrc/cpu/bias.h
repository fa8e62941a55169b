// Statistics of per-sample sums: the bias of every layer.
#pragma once
#include "cpu/contract.h"
#include "cpu/strided.h"

namespace backpack_cuda::cpu {

// The sums over all positions of every channel of V tensors [N, *, C, *].
template <class Acc>
class PositionSums {
 public:
  PositionSums(const Tensor& tensor, int64_t channel_dim, int64_t v_stride = 0);
  // Writes those of (n, v) for q = n * V + v in [begin, end) to sums [end - begin, C].
  void operator()(int64_t begin, int64_t end, int64_t V, Acc* sums) const;
  // Calls run(begin, end) for ranges of channels, in parallel.
  template <class F>
  void for_channels(const F& run) const;

  const int64_t channels;
  const Storage storage;

 private:
  void one(int64_t n, int64_t v, int64_t channel_begin, int64_t channel_end, Acc* sums) const;

  const Kernels<Acc>& kernels_;
  const int64_t sample_stride_, channel_stride_, v_stride_;
  const Rows before_, after_;  // positions before and after the channel dim
  const void* data_;
};

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
  const Kernels<Acc>& kernels_;
  const int64_t want_;
  const PositionSums<Acc> position_sums_;
  const int64_t channels_;
  const StatsTensors& bias_;
  int64_t count_ = 0;          // samples so far
  int64_t samples_per_block_;  // whose sums are held at a time
  Acc* sums_ = nullptr;        // [samples_per_block, C]
  double* total_ = nullptr;    // [C]
  double* square_ = nullptr;   // [C], centered when that is wanted
};

// The same for V output gradients per sample, of which `first` [N, *, C, *] is the first.
template <class Acc>
class ColumnBiasStats {
 public:
  ColumnBiasStats(const Tensor& first, const OutputGradients<Acc>& gradients, int64_t channel_dim,
                  int64_t want, const ColumnTensors& bias, Workspace& workspace);
  void add(int64_t begin, int64_t end);  // pairs n * V + v
  void finish();

 private:
  const OutputGradients<Acc> gradients_;
  const int64_t want_, samples_;
  const PositionSums<Acc> position_sums_;
  const int64_t channels_;
  const ColumnTensors& bias_;
  int64_t block_;            // pairs (n, v) whose sums are held at a time
  Acc* sums_ = nullptr;      // [block, C]
  Acc* square_ = nullptr;    // [C] of the current sample
  double* total_ = nullptr;  // [C]
};

}  // namespace backpack_cuda::cpu
