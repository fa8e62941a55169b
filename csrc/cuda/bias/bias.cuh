// The bias_stats kernels; bias.h explains them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/bias/bias.h"
#include "cuda/common/cuda_check.h"
#include "cuda/common/moments.cuh"
#include "cuda/common/norm_window.cuh"

namespace backpack_cuda::cuda {

constexpr int kBiasBatch = 4;  // samples, or loads of 16 bytes, that a thread has in flight
constexpr int kBiasLoads = 8;  // loads along the positions

// One pass. Its samples are the parts of the problem's samples: t_splits of each.
struct BiasParams {
  BiasProblem problem;
  Element output;  // element type of grad and batch_grad
  StatsOutputs outputs;
  BiasPass pass;
  int64_t samples, steps;  // N * t_splits; loads over the positions of an output
  int t_splits;
  bool one_dim;                  // only the last position dim is longer than 1
  float *sum, *square;           // [splits, O], null with one split
  float* norm;                   // [samples, unit_blocks], null when not wanted
  bool sums, squares, centered;  // kept
};

template <class T, int kSize>
struct alignas(sizeof(T) * kSize) BiasVector {
  T values[kSize];
};

template <class T, int kSize>
__device__ __forceinline__ BiasVector<T, kSize> load_vector(const T* from) {
  return *reinterpret_cast<const BiasVector<T, kSize>*>(from);
}

// As float32; zeros instead of a vector that is not part of the sum.
template <class T, int kSize>
__device__ __forceinline__ void convert(const BiasVector<T, kSize>& from, bool counts, float (&to)[kSize]) {
#pragma unroll
  for (int k = 0; k < kSize; ++k) to[k] = counts ? static_cast<float>(from.values[k]) : 0.f;
}

__device__ __forceinline__ void store_element(void* to, int64_t at, float value, Element element) {
  if (element == Element::kFloat32) {
    static_cast<float*>(to)[at] = value;
  } else if (element == Element::kBFloat16) {
    static_cast<__nv_bfloat16*>(to)[at] = static_cast<__nv_bfloat16>(value);
  } else {
    static_cast<__half*>(to)[at] = static_cast<__half>(value);
  }
}

// Where position t is, in elements. kOneDim: only the last position dim is longer than 1.
template <bool kOneDim>
__device__ __forceinline__ int64_t position_offset(const BiasProblem& problem, unsigned t) {
  if constexpr (kOneDim) return t * problem.stride[2];
  const unsigned width = static_cast<unsigned>(problem.size[2]),
                 height = static_cast<unsigned>(problem.size[1]);
  const unsigned row = t / width, depth = row / height;
  return depth * problem.stride[0] + (row - depth * height) * problem.stride[1] +
         (t - row * width) * problem.stride[2];
}

// The statistics of one output over the samples of a split.
struct BiasMoments {
  float sum = 0, square = 0;

  __device__ __forceinline__ void add(const BiasParams& params, int64_t sample, int64_t o, float g,
                                      float weight, const SampleWeights& moment) {
    if (params.outputs.batch_grad) {
      store_element(params.outputs.batch_grad, sample * params.problem.O + o, g, params.output);
    }
    if (params.centered) {
      add_centered(g, moment, sum, square);
    } else {
      sum = fmaf(weight, g, sum);
      square = fmaf(g, g, square);
    }
  }

  __device__ __forceinline__ void write(const BiasParams& params, int split, int64_t o) const {
    const StatsOutputs& outputs = params.outputs;
    if (params.pass.splits > 1) {
      if (params.sums) params.sum[int64_t{split} * params.problem.O + o] = sum;
      if (params.squares) params.square[int64_t{split} * params.problem.O + o] = square;
      return;
    }
    if (outputs.grad) store_element(outputs.grad, o, sum, params.output);
    if (outputs.sum_grad_centered_squared) outputs.sum_grad_centered_squared[o] = square;
    if (outputs.sum_grad_squared) {
      const float inverse_N = 1.f / static_cast<float>(params.samples);
      outputs.sum_grad_squared[o] = params.centered ? uncentered(square, sum, inverse_N) : square;
    }
  }
};

// Few positions: a thread owns kOutputs adjacent outputs.
template <class T, int kOutputs>
__global__ void __launch_bounds__(kMaxBiasThreads, 2) bias_few_positions_kernel(const BiasParams params) {
  const BiasProblem& problem = params.problem;
  const BiasPass& pass = params.pass;
  KERNEL_SHARED(norm_window, NormWindow<kMaxBiasThreads / 32>);
  const int split = blockIdx.x / pass.unit_blocks, unit_block = blockIdx.x % pass.unit_blocks;
  const int64_t first_output = (int64_t{unit_block} * pass.units + threadIdx.x) * kOutputs;
  const bool active = first_output < problem.O;
  const T* const data = static_cast<const T*>(problem.data) + (active ? first_output * problem.stride_o : 0);
  BiasMoments moments[kOutputs];
  const int64_t begin = params.samples * split / pass.splits,
                end = params.samples * (split + 1) / pass.splits;
  for (int64_t batch = begin; batch < end; batch += kBiasBatch) {
    float g[kBiasBatch][kOutputs] = {};
    for (unsigned t = 0; t < params.steps; ++t) {
      const T* const at = data + (batch * problem.stride_n + position_offset<false>(problem, t));
      BiasVector<T, kOutputs> loaded[kBiasBatch];
#pragma unroll
      for (int s = 0; s < kBiasBatch; ++s) {  // the last sample again instead of those beyond
        loaded[s] = load_vector<T, kOutputs>(at + min(int64_t{s}, end - 1 - batch) * problem.stride_n);
      }
#pragma unroll
      for (int s = 0; s < kBiasBatch; ++s) {
        float x[kOutputs];
        convert<T>(loaded[s], active, x);
#pragma unroll
        for (int k = 0; k < kOutputs; ++k) g[s][k] += x[k];
      }
    }
#pragma unroll
    for (int s = 0; s < kBiasBatch; ++s) {
      const int64_t n = batch + s;
      if (n >= end) break;  // the same for all threads
      const SampleWeights moment(static_cast<int>(n - begin));
      const float weight = params.outputs.weights ? params.outputs.weights[n] : 1.f;
      float norm = 0;
#pragma unroll
      for (int k = 0; k < kOutputs; ++k) {
        norm = fmaf(g[s][k], g[s][k], norm);
        if (active) moments[k].add(params, n, first_output + k, g[s][k], weight, moment);
      }
      if (params.norm) {
        norm_window.add(n, norm);
        norm_window.flush(n, begin, end, params.norm + unit_block, pass.unit_blocks);
      }
    }
  }
  if (!active) return;
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) moments[k].write(params, split, first_output + k);
}

// The sums over the steps first, first + slots, ... below end; each loads kVector elements, kStride positions
// from the step before.
template <class T, int kVector, int kStride, bool kOneDim>
__device__ __forceinline__ void sum_steps(const BiasProblem& problem, const T* data, unsigned first,
                                          unsigned end, unsigned slots, float (&sums)[kVector]) {
  double totals[kVector] = {};
  unsigned step = first;
  while (step < end) {
    float part[kVector] = {};
#pragma unroll 1
    for (int round = 0; round < 8 && step < end; ++round) {
      BiasVector<T, kVector> loaded[kBiasLoads];
#pragma unroll
      for (int l = 0; l < kBiasLoads; ++l) {  // the last step again instead of those beyond: no branch
        const unsigned at = min(step + l * slots, end - 1);
        loaded[l] = load_vector<T, kVector>(data + position_offset<kOneDim>(problem, at * kStride));
      }
      float x[kBiasLoads][kVector];
#pragma unroll
      for (int l = 0; l < kBiasLoads; ++l) convert<T>(loaded[l], step + l * slots < end, x[l]);
#pragma unroll
      for (int distance = 1; distance < kBiasLoads; distance *= 2) {
#pragma unroll
        for (int l = 0; l < kBiasLoads; l += 2 * distance) {
#pragma unroll
          for (int k = 0; k < kVector; ++k) x[l][k] += x[l + distance][k];
        }
      }
#pragma unroll
      for (int k = 0; k < kVector; ++k) part[k] += x[0][k];
      step += kBiasLoads * slots;
    }
#pragma unroll
    for (int k = 0; k < kVector; ++k) totals[k] += part[k];
  }
#pragma unroll
  for (int k = 0; k < kVector; ++k) sums[k] = static_cast<float>(totals[k]);
}

// Many positions: threadIdx.x = (unit, slot) in the order that pass.lanes_along_outputs says.
template <class T, int kVector, bool kVectorOfOutputs>
__global__ void __launch_bounds__(kMaxBiasThreads, 2) bias_many_positions_kernel(const BiasParams params) {
  constexpr int kOutputs = kVectorOfOutputs ? kVector : 1;  // of a unit
  constexpr unsigned kAll = 0xffffffffu;
  const BiasProblem& problem = params.problem;
  const BiasPass& pass = params.pass;
  KERNEL_SHARED(norm_window, NormWindow<kMaxBiasThreads / 32>);
  KERNEL_DYNAMIC_SHARED(float, partial);  // [2, warps_per_unit, units, kOutputs]

  const int split = blockIdx.x / pass.unit_blocks, unit_block = blockIdx.x % pass.unit_blocks;
  const int lane = threadIdx.x % 32;
  const int my_unit = pass.lanes_along_outputs ? threadIdx.x % pass.units : threadIdx.x / pass.slots;
  const int my_slot = pass.lanes_along_outputs ? threadIdx.x / pass.units : threadIdx.x % pass.slots;
  const int64_t block_output = int64_t{unit_block} * pass.units * kOutputs;  // the first
  const bool active = block_output + my_unit * kOutputs < problem.O;
  const T* data = static_cast<const T*>(problem.data);
  if (active) data += (block_output + my_unit * kOutputs) * problem.stride_o;

  // Lanes that share a unit differ in the bits [first_bit, last_bit) of their number.
  const int first_bit = pass.lanes_along_outputs ? min(pass.units, 32) : 1;
  const int last_bit = pass.lanes_along_outputs ? 32 : min(pass.slots, 32);
  const int slots_in_warp = last_bit / first_bit, warps_per_unit = pass.slots / slots_in_warp;
  const int warp_of_unit = my_slot / slots_in_warp, block_outputs = pass.units * kOutputs;

  // The output that this thread owns: of its warp's units, or of the block's where units span warps.
  const bool warp_alone = warps_per_unit == 1;
  const int warp_unit = __shfl_sync(kAll, my_unit, 0);
  const int owned = warp_alone ? warp_unit * kOutputs + lane : threadIdx.x;
  const int64_t o = block_output + owned;
  const bool owner =
      (warp_alone ? lane < 32 / slots_in_warp * kOutputs : owned < block_outputs) && o < problem.O;

  BiasMoments moments;
  const int64_t begin = params.samples * split / pass.splits,
                end = params.samples * (split + 1) / pass.splits;
  for (int64_t sample = begin; sample < end; ++sample) {
    const int64_t n = sample / params.t_splits, part = sample % params.t_splits;
    const unsigned first_step = static_cast<unsigned>(params.steps * part / params.t_splits) + my_slot;
    const unsigned end_step = active ? static_cast<unsigned>(params.steps * (part + 1) / params.t_splits) : 0;
    const T* const its_data = data + n * problem.stride_n;
    constexpr int kStride = kVectorOfOutputs ? 1 : kVector;
    float x[kVector];
    if (kStride > 1 || params.one_dim) {
      sum_steps<T, kVector, kStride, true>(problem, its_data, first_step, end_step, pass.slots, x);
    } else {
      sum_steps<T, kVector, kStride, false>(problem, its_data, first_step, end_step, pass.slots, x);
    }
    float g[kOutputs];
#pragma unroll
    for (int k = 0; k < kVector; ++k) g[k % kOutputs] = k < kOutputs ? x[k] : g[k % kOutputs] + x[k];
    for (int bit = first_bit; bit < last_bit; bit *= 2) {
#pragma unroll
      for (int k = 0; k < kOutputs; ++k) g[k] += __shfl_xor_sync(kAll, g[k], bit);
    }
    // Two buffers in turn: who still reads the last sample's sums is not disturbed.
    float* const buffer = partial + (sample - begin) % 2 * warps_per_unit * block_outputs;
    if ((lane & (last_bit - first_bit)) == 0) {
#pragma unroll
      for (int k = 0; k < kOutputs; ++k) buffer[warp_of_unit * block_outputs + my_unit * kOutputs + k] = g[k];
    }
    if (warp_alone) {
      __syncwarp();
    } else {
      __syncthreads();
    }

    float norm = 0;
    if (owner) {
      float total = 0;
      for (int warp = 0; warp < warps_per_unit; ++warp) total += buffer[warp * block_outputs + owned];
      const float weight = params.outputs.weights ? params.outputs.weights[sample] : 1.f;
      moments.add(params, sample, o, total, weight, SampleWeights(static_cast<int>(sample - begin)));
      norm = total * total;
    }
    if (params.norm) {
      norm_window.add(sample, norm);
      norm_window.flush(sample, begin, end, params.norm + unit_block, pass.unit_blocks);
    }
  }
  if (owner) moments.write(params, split, o);
}

template <class T>
void launch_bias_pass(const BiasParams& params, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const BiasPass& pass = params.pass;
  const dim3 grid(static_cast<unsigned>(int64_t{pass.unit_blocks} * pass.splits)),
      block(pass.slots * pass.units);
  size_t shared_bytes = 0;
  auto* kernel =
      pass.vector_outputs ? &bias_few_positions_kernel<T, kVector> : &bias_few_positions_kernel<T, 1>;
  if (pass.slots > 1) {
    const int lanes_of_unit = pass.lanes_along_outputs ? (pass.units < 32 ? 32 / pass.units : 1)
                                                       : (pass.slots < 32 ? pass.slots : 32);
    const int outputs_of_unit = pass.vector_outputs ? kVector : 1;
    shared_bytes = size_t{2} * (pass.slots / lanes_of_unit) * pass.units * outputs_of_unit * sizeof(float);
    kernel = pass.vector_outputs     ? &bias_many_positions_kernel<T, kVector, true>
             : pass.vector_positions ? &bias_many_positions_kernel<T, kVector, false>
                                     : &bias_many_positions_kernel<T, 1, false>;
  }
  KERNEL_LAUNCH(grid, block, shared_bytes, stream, kernel, params);
  check(cudaGetLastError(), "bias_stats");
}

}  // namespace backpack_cuda::cuda
