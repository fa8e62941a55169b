// The depthwise_stats kernel; depthwise.h explains it.
#pragma once

#include <cstdint>

#include "cuda/common/cuda_check.h"
#include "cuda/common/moments.cuh"
#include "cuda/common/norm_window.cuh"
#include "cuda/depthwise/depthwise.h"

namespace backpack_cuda::cuda {

struct DepthwiseParams {
  OuterProblem problem;
  StatsOutputs outputs;
  DepthwisePlan plan;
  float *sum, *square;  // [splits, R, I], null with one split
  float* norm;          // [N, norm_columns], null when not wanted
  int64_t units;        // of `unit` samples each, which splits do not part
  int unit;
  bool sums, squares, centered;  // kept
  ColumnOutputs columns;         // second order: the samples are the pairs (n, v), v fastest; else V = 0
};

// Blocks per multiprocessor, which bound the registers: tall boxes need more.
template <int kRows>
constexpr int kDepthwiseBlocks = kRows > 3 ? 2 : 3;

// A thread's part of the positions: columns w, w + slots_w, ... and in them the rows [h_begin, h_end).
struct DepthwiseSlot {
  int w, h_begin, h_end;
};

// A box of the kernel: its first position, and how much of it the kernel has.
struct DepthwiseChunk {
  int d, h, w, rows, columns;
};

// The value at `offset`, 0 outside: a zero that is multiplied, so that Inf and NaN of b count at the border.
template <class T>
__device__ __forceinline__ float load_or_zero(const T* from, int offset, bool inside) {
  return inside ? static_cast<float>(from[offset]) : 0.f;
}

// Adds this thread's share of G_n[k] over the box's positions k. a and b point to the unit's channels. Within
// a window 32 bits are enough for offsets: the plan saw to it.
template <class T, int kRows, int kColumns, int kShift>
__device__ __forceinline__ void add_positions(const OuterProblem& problem, int slots_w,
                                              const DepthwiseSlot& slot, const DepthwiseChunk& chunk,
                                              const T* __restrict__ a, const T* __restrict__ b,
                                              float (&sums)[kRows][kColumns]) {
  constexpr int kKept = kRows - kShift;  // rows of the window that the next position needs too
  const unsigned a_down = static_cast<unsigned>(problem.a.stride[1] * problem.dilation[1]);
  const unsigned a_right = static_cast<unsigned>(problem.a.stride[2] * problem.dilation[2]);
  const int64_t a_next = problem.a.stride[1] * problem.step[1], b_next = problem.b.stride[1];
  const unsigned a_height = problem.size[1], a_width = problem.size[2], dilation_h = problem.dilation[1];
  for (int d = 0; d < problem.positions[0]; ++d) {
    const int a_d = d * problem.step[0] + chunk.d * problem.dilation[0] - problem.padding[0];
    const bool depth_inside = static_cast<unsigned>(a_d) < static_cast<unsigned>(problem.size[0]);
    for (int w = slot.w; w < problem.positions[2]; w += slots_w) {
      const int a_w = w * problem.step[2] + chunk.w * problem.dilation[2] - problem.padding[2];
      int a_h = slot.h_begin * problem.step[1] + chunk.h * problem.dilation[1] - problem.padding[1];
      const T* a_at = a + (a_d * problem.a.stride[0] + a_h * problem.a.stride[1] + a_w * problem.a.stride[2]);
      const T* b_at = b + (d * problem.b.stride[0] + slot.h_begin * b_next + w * problem.b.stride[2]);
      bool column_inside[kColumns];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        column_inside[j] =
            depth_inside && j < chunk.columns &&
            static_cast<unsigned>(a_w) + j * static_cast<unsigned>(problem.dilation[2]) < a_width;
      }
      float window[kRows][kColumns];
      const auto load_row = [&](int i, int to) {
        const bool row_inside =
            static_cast<unsigned>(a_h) + i * dilation_h < a_height && (kKept > 0 || i < chunk.rows);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          window[to][j] =
              load_or_zero(a_at, static_cast<int>(i * a_down + j * a_right), row_inside && column_inside[j]);
        }
      };
#pragma unroll
      for (int i = 0; i < kKept; ++i) load_row(i, i + kShift);  // the first position moves them up
#pragma unroll(kKept ? 3 : 1)
      for (int h = slot.h_begin; h < slot.h_end; ++h) {
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) window[i][j] = window[i + kShift][j];
        }
#pragma unroll
        for (int i = kKept; i < kRows; ++i) load_row(i, i);
        const float y = static_cast<float>(*b_at);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) sums[i][j] = fmaf(y, window[i][j], sums[i][j]);
        }
        a_h += problem.step[1];
        a_at += a_next;
        b_at += b_next;
      }
    }
  }
}

// The same for boxes of one row: the inner loop runs along w, because most such problems have just one row.
template <class T, int kColumns>
__device__ __forceinline__ void add_rows(const OuterProblem& problem, int slots_w, const DepthwiseSlot& slot,
                                         const DepthwiseChunk& chunk, const T* __restrict__ a,
                                         const T* __restrict__ b, float (&sums)[1][kColumns]) {
  const unsigned a_width = problem.size[2], dilation_w = problem.dilation[2];
  const unsigned a_right = static_cast<unsigned>(problem.a.stride[2] * problem.dilation[2]);
  const int64_t a_next = problem.a.stride[2] * problem.step[2] * slots_w,
                b_next = problem.b.stride[2] * slots_w;
  const int count = (problem.positions[2] - slot.w + slots_w - 1) / slots_w;
  for (int d = 0; d < problem.positions[0]; ++d) {
    const int a_d = d * problem.step[0] + chunk.d * problem.dilation[0] - problem.padding[0];
    for (int h = slot.h_begin; h < slot.h_end; ++h) {
      const int a_h = h * problem.step[1] + chunk.h * problem.dilation[1] - problem.padding[1];
      const bool row_inside = static_cast<unsigned>(a_d) < static_cast<unsigned>(problem.size[0]) &&
                              static_cast<unsigned>(a_h) < static_cast<unsigned>(problem.size[1]);
      int a_w = slot.w * problem.step[2] + chunk.w * problem.dilation[2] - problem.padding[2];
      const T* a_at = a + (a_d * problem.a.stride[0] + a_h * problem.a.stride[1] + a_w * problem.a.stride[2]);
      const T* b_at = b + (d * problem.b.stride[0] + h * problem.b.stride[1] + slot.w * problem.b.stride[2]);
#pragma unroll 2
      for (int c = 0; c < count; ++c) {
        float window[kColumns];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          const bool inside =
              row_inside && j < chunk.columns && static_cast<unsigned>(a_w) + j * dilation_w < a_width;
          window[j] = load_or_zero(a_at, static_cast<int>(j * a_right), inside);
        }
        const float y = static_cast<float>(*b_at);
#pragma unroll
        for (int j = 0; j < kColumns; ++j) sums[0][j] = fmaf(y, window[j], sums[0][j]);
        a_w += slots_w * problem.step[2];
        a_at += a_next;
        b_at += b_next;
      }
    }
  }
}

// threadIdx.x = (chunk, unit, slot), the last two in the order that plan.lanes_along_units says; blockIdx.x =
// (split, unit block, chunk block), so that blocks that read the same elements run at the same time.
template <class T, int kRows, int kColumns, int kShift>
__global__ void __launch_bounds__(kMaxDepthwiseThreads, kDepthwiseBlocks<kRows>)
    depthwise_kernel(const DepthwiseParams params) {
  constexpr int kTaps = kRows * kColumns;
  constexpr unsigned kAll = 0xffffffffu;
  const OuterProblem& problem = params.problem;
  const StatsOutputs& outputs = params.outputs;
  const DepthwisePlan& plan = params.plan;
  KERNEL_SHARED(norm_window, NormWindow<kMaxDepthwiseThreads / 32>);
  KERNEL_DYNAMIC_SHARED(int64_t,
                        position);  // [block_elements], in the gradient [R, I]; then the floats below

  const int64_t blocks_per_split = int64_t{plan.unit_blocks} * plan.chunk_blocks;
  const int split = static_cast<int>(blockIdx.x / blocks_per_split);
  const int block_in_split = static_cast<int>(blockIdx.x - split * blocks_per_split);
  const int first_unit = block_in_split / plan.chunk_blocks * plan.units;
  const int first_chunk = block_in_split % plan.chunk_blocks * plan.chunks_per_block;
  const int units = problem.groups * problem.O * problem.channels;
  const int kernel_volume = problem.kernel[0] * problem.kernel[1] * problem.kernel[2];

  // The box of the kernel with that number; without positions beyond the last.
  const auto chunk_at = [&](int in_block) {
    const int number = first_chunk + in_block, w = number % plan.chunks[2], dh = number / plan.chunks[2];
    DepthwiseChunk chunk = {dh / plan.chunks[1], dh % plan.chunks[1] * plan.box_rows, w * plan.box_columns, 0,
                            0};
    if (number < plan.chunk_count) {
      chunk.rows = min(plan.box_rows, problem.kernel[1] - chunk.h);
      chunk.columns = min(plan.box_columns, problem.kernel[2] - chunk.w);
    }
    return chunk;
  };

  // This thread's part in the sums over positions.
  const int lane = threadIdx.x % 32, threads_per_chunk = plan.slots * plan.units;
  const int my_chunk = threadIdx.x / threads_per_chunk, in_chunk = threadIdx.x % threads_per_chunk;
  const int my_unit = plan.lanes_along_units ? in_chunk % plan.units : in_chunk / plan.slots;
  const int my_slot = plan.lanes_along_units ? in_chunk / plan.units : in_chunk % plan.slots;
  const DepthwiseChunk chunk = chunk_at(my_chunk);
  const int unit = first_unit + my_unit, row = unit / problem.channels;
  DepthwiseSlot slot = {my_slot % plan.slots_w, 0, 0};
  if (unit < units && chunk.rows) {
    slot.h_begin = min(my_slot / plan.slots_w * plan.strip, problem.positions[1]);
    slot.h_end = min(slot.h_begin + plan.strip, problem.positions[1]);
  }
  if (slot.h_begin == slot.h_end) slot.w = problem.positions[2];  // nothing to do
  const T* a = static_cast<const T*>(problem.a.data);
  const T* b = static_cast<const T*>(problem.b.data);
  if (unit < units) {
    const int channel = row / problem.O * problem.channels + unit % problem.channels;
    a += channel * problem.a.stride_c;
    b += row * problem.b.stride_c;
  }

  // Lanes that share a unit differ in the bits [first_bit, last_bit) of their number.
  const int first_bit = plan.lanes_along_units ? min(plan.units, 32) : 1;
  const int last_bit = plan.lanes_along_units ? 32 : min(plan.slots, 32);
  const int slots_in_warp = last_bit / first_bit, warps_per_unit = plan.slots / slots_in_warp;
  const int warp_of_unit = my_slot / slots_in_warp;
  const int block_elements = plan.chunks_per_block * plan.units * kTaps;

  float* const sum = reinterpret_cast<float*>(position + block_elements);  // [block_elements]
  float* const square = sum + block_elements;                              // [block_elements]
  float* const shared_sums = square + block_elements;  // [2, warps_per_unit, block_elements]

  // The elements that this thread owns: of its warp's units, or of the block's where units span warps.
  const bool warp_alone = warps_per_unit == 1;
  const int owners = warp_alone ? 32 : blockDim.x;
  const int owner = warp_alone ? lane : threadIdx.x;
  const int warp_unit = __shfl_sync(kAll, my_unit, 0);
  const int elements = warp_alone ? 32 / slots_in_warp * kTaps : block_elements;
  const int first_element = warp_alone ? (my_chunk * plan.units + warp_unit) * kTaps : 0;
  for (int mine = owner; mine < elements; mine += owners) {
    const int element = first_element + mine, tap = element % kTaps, its_unit = element / kTaps % plan.units;
    const DepthwiseChunk its_chunk = chunk_at(element / kTaps / plan.units);
    const int i = tap / kColumns, j = tap % kColumns;
    const bool exists = i < its_chunk.rows && j < its_chunk.columns && first_unit + its_unit < units;
    const int64_t k =
        (int64_t{its_chunk.d} * problem.kernel[1] + its_chunk.h + i) * problem.kernel[2] + its_chunk.w + j;
    position[element] = exists ? (int64_t{first_unit} + its_unit) * kernel_volume + k : -1;
    sum[element] = square[element] = 0;
  }

  const int64_t count = int64_t{units} * kernel_volume;
  const ColumnOutputs& columns = params.columns;
  const int64_t begin = params.units * split / plan.splits * params.unit;
  const int64_t end = params.units * (split + 1) / plan.splits * params.unit;
  for (int64_t n = begin; n < end; ++n) {
    float sums[kRows][kColumns] = {};
    unsigned sample = static_cast<unsigned>(n), v = 0;
    if (columns.V) {
      sample /= columns.V;
      v = static_cast<unsigned>(n) - sample * columns.V;
    }
    const T* const its_a = a + (sample * problem.a.stride_n + v * columns.a_stride_v);
    const T* const its_b = b + (sample * problem.b.stride_n + v * columns.b_stride_v);
    if constexpr (kRows == 1) {
      add_rows<T>(problem, plan.slots_w, slot, chunk, its_a, its_b, sums);
    } else {
      add_positions<T, kRows, kColumns, kShift>(problem, plan.slots_w, slot, chunk, its_a, its_b, sums);
    }
    for (int bit = first_bit; bit < last_bit; bit *= 2) {
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        float& value = sums[tap / kColumns][tap % kColumns];
        value += __shfl_xor_sync(kAll, value, bit);
      }
    }
    // Two buffers in turn: who still reads the last sample's sums is not disturbed.
    float* const buffer = shared_sums + (n - begin) % 2 * warps_per_unit * block_elements;
    if ((lane & (last_bit - first_bit)) == 0) {
      float* const to = buffer + warp_of_unit * block_elements + (my_chunk * plan.units + my_unit) * kTaps;
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) to[tap] = sums[tap / kColumns][tap % kColumns];
    }
    if (warp_alone) {
      __syncwarp();
    } else {
      __syncthreads();
    }

    const SampleWeights moment(static_cast<int>(n - begin));
    const float weight = outputs.weights ? outputs.weights[n] : 1.f;
    float norm = 0;
    for (int mine = owner; mine < elements; mine += owners) {
      const int element = first_element + mine;
      const int64_t at = position[element];
      if (at < 0) continue;
      float g = 0;
      for (int warp = 0; warp < warps_per_unit; ++warp) g += buffer[warp * block_elements + element];
      if (columns.V) {
        const int64_t column_row = v * problem.N + sample;
        if (columns.factor) static_cast<T*>(columns.factor)[column_row * count + at] = static_cast<T>(g);
        // The sum of this sample's squares, and that of all samples.
        sum[element] = fmaf((columns.signs ? columns.signs[column_row] : 1.f) * g, g, sum[element]);
        if (v + 1 == static_cast<unsigned>(columns.V) || n + 1 == end) {
          if (columns.batch_diag) columns.batch_diag[sample * count + at] = sum[element];
          square[element] += sum[element];
          sum[element] = 0;
        }
        continue;
      }
      if (outputs.batch_grad) static_cast<T*>(outputs.batch_grad)[n * count + at] = static_cast<T>(g);
      norm = fmaf(g, g, norm);
      if (params.centered) {
        add_centered(g, moment, sum[element], square[element]);
      } else {
        sum[element] = fmaf(weight, g, sum[element]);
        square[element] = fmaf(g, g, square[element]);
      }
    }
    if (params.norm) {
      norm_window.add(n, norm);
      norm_window.flush(n, begin, end, params.norm + block_in_split, blocks_per_split);
    }
  }

  const float inverse_N = 1.f / static_cast<float>(problem.N);
  for (int mine = owner; mine < elements; mine += owners) {
    const int element = first_element + mine;
    const int64_t at = position[element];
    if (at < 0) continue;
    if (plan.splits > 1) {
      if (params.sums) params.sum[split * count + at] = sum[element];
      if (params.squares) params.square[split * count + at] = square[element];
      continue;
    }
    if (columns.diag) columns.diag[at] = square[element];
    if (outputs.grad) static_cast<T*>(outputs.grad)[at] = static_cast<T>(sum[element]);
    if (outputs.sum_grad_centered_squared) outputs.sum_grad_centered_squared[at] = square[element];
    if (outputs.sum_grad_squared) {
      outputs.sum_grad_squared[at] =
          params.centered ? uncentered(square[element], sum[element], inverse_N) : square[element];
    }
  }
}

template <class T, int kRows, int kColumns, int kShift>
void launch_box(const DepthwiseParams& params, cudaStream_t stream) {
  const DepthwisePlan& plan = params.plan;
  const int slots_in_warp =
      plan.lanes_along_units ? (plan.units < 32 ? 32 / plan.units : 1) : (plan.slots < 32 ? plan.slots : 32);
  const size_t elements = size_t{1} * plan.chunks_per_block * plan.units * kRows * kColumns;
  const size_t shared_bytes =
      elements * (sizeof(int64_t) + (2 + 2 * plan.slots / slots_in_warp) * sizeof(float));
  auto* const kernel = &depthwise_kernel<T, kRows, kColumns, kShift>;
  KERNEL_LAUNCH(dim3(static_cast<unsigned>(plan.blocks())), dim3(plan.threads()), shared_bytes, stream,
                kernel, params);
  check(cudaGetLastError(), "depthwise_stats");
}

template <class T>
void launch_depthwise_kernel(const DepthwiseParams& params, cudaStream_t stream) {
  switch (params.plan.box) {
    case DepthwiseBox::k3x3Rolling:
      return launch_box<T, 3, 3, 1>(params, stream);
    case DepthwiseBox::k3x3:
      return launch_box<T, 3, 3, 3>(params, stream);
    case DepthwiseBox::k5x3Rolling:
      return launch_box<T, 5, 3, 1>(params, stream);
    case DepthwiseBox::k7x2Rolling:
      return launch_box<T, 7, 2, 1>(params, stream);
    case DepthwiseBox::k1x5:
      return launch_box<T, 1, 5, 1>(params, stream);
  }
}

}  // namespace backpack_cuda::cuda
