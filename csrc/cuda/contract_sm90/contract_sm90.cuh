// The kernel. A block of three warpgroups owns a tile [128 o, 128 i] and a range of samples. One thread of
// the first keeps a ring of four slabs of 64 positions filled by TMA; the other two multiply, 64 rows each,
// and work on their halves of G_n when a sample is complete. They drift apart, so that one multiplies while
// the other is at that.
//
// By the model of docs/kernels.md the tile's 512 bytes per position take 21 clocks from the L2 cache and its
// products 8: clusters whose blocks share slabs by multicast are the step to take where a GPU confirms that.
#pragma once

#include "cuda/common/cuda_check.h"
#include "cuda/common/moments.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/contract_sm90/contract_sm90_params.h"
#include "cuda/contract_sm90/ptx_sm90.cuh"

namespace backpack_cuda::cuda {
namespace sm90 {

constexpr int kStages = 4;
constexpr int kWarpgroup = 128;             // threads
constexpr int kConsumers = 2 * kWarpgroup;  // two warpgroups, 64 rows o each
constexpr int kThreads = kWarpgroup + kConsumers;
constexpr int kConsumerWarps = kConsumers / 32;
constexpr int kBoxElements = kSm90SlabRows * kSm90BoxColumns;
constexpr int kBoxBytes = 2 * kBoxElements;
constexpr int kBoxes = kSm90Tile / kSm90BoxColumns;  // per operand and slab
constexpr int kSlabBytes = 2 * kBoxes * kBoxBytes;
constexpr int kDepth = 16;                      // positions per wgmma
constexpr int kDepthBytes = kDepth * 128 >> 4;  // as matrix descriptors count
constexpr int kNormWindow = 32;                 // samples whose norms wait in shared memory
constexpr int kAlignment = 1024;                // after which the swizzle repeats
// 64 accumulators, 64 sums, 64 squares and some 40 more; together at most the 64 K of a multiprocessor.
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kWarpgroup * kProducerRegisters + kConsumers * kConsumerRegisters <= 65536);

template <class Half>
struct Shared {
  Half b[kStages][kBoxes][kBoxElements];  // [64 t, 64 o] each
  Half a[kStages][kBoxes][kBoxElements];  // [64 t, 64 i] each
  float norms[kNormWindow][kConsumerWarps];
  uint64_t full[kStages], empty[kStages];
};

// Walks the ring; a phase's parity changes with every round.
struct Position {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Fills the ring: one thread.
template <class Half>
__device__ __forceinline__ void produce(const ContractSm90Params& params, Shared<Half>& shared, int n_begin,
                                        int n_end, int o0, int i0) {
  prefetch_map(&params.b);
  prefetch_map(&params.a);
  Position at;
  for (int n = n_begin; n < n_end; ++n) {
    for (int t0 = 0; t0 < params.T; t0 += kSm90SlabRows) {
      wait(&shared.empty[at.stage], at.parity ^ 1);
      uint64_t* const full = &shared.full[at.stage];
      arrive_and_expect(full, kSlabBytes);  // rows and columns past the edges count, as zeros
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        copy_box(shared.b[at.stage][box], &params.b, full, o0 + box * kSm90BoxColumns, t0, n);
        copy_box(shared.a[at.stage][box], &params.a, full, i0 + box * kSm90BoxColumns, t0, n);
      }
      at.advance();
    }
  }
}

// Where a thread's registers belong in [O, I].
struct Place {
  int row, column;  // of register 0; register r: row + 8 (r / 2 % 2), column + 8 (r / 4) + r % 2
  int O, I;
  bool paired_stores;

  // Whether register r belongs to the parameter.
  __device__ __forceinline__ bool inside(int r) const {
    return row + r / 2 % 2 * 8 < O && column + r / 4 * 8 + r % 2 < I;
  }
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

// out[O, I] = value(r), as far as it exists.
template <class T, class Value>
__device__ __forceinline__ void store_tile(const Place& place, T* out, const Value& value) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (place.row + 8 * half >= place.O) continue;
    T* const row = out + static_cast<int64_t>(place.row + 8 * half) * place.I + place.column;
#pragma unroll
    for (int eight = 0; eight < kSm90Tile / 8; ++eight) {
      const int r = 4 * eight + 2 * half;
      const int columns = place.I - place.column - 8 * eight;  // left
      if (place.paired_stores && columns >= 2) {
        *reinterpret_cast<Pair<T>*>(row + 8 * eight) = {static_cast<T>(value(r)),
                                                        static_cast<T>(value(r + 1))};
      } else {
        if (columns >= 1) row[8 * eight] = static_cast<T>(value(r));
        if (columns >= 2) row[8 * eight + 1] = static_cast<T>(value(r + 1));
      }
    }
  }
}

// Sum of squares of what belongs to the parameter. What lies beyond is zero, but not where the other factor
// is infinite.
__device__ __forceinline__ float norm_of(const float (&g)[64], const Place& place, bool whole) {
  float parts[4] = {};
  if (whole) {
#pragma unroll
    for (int r = 0; r < 64; ++r) parts[r % 4] = fmaf(g[r], g[r], parts[r % 4]);
  } else {
#pragma unroll
    for (int r = 0; r < 64; ++r) {
      if (place.inside(r)) parts[r % 4] = fmaf(g[r], g[r], parts[r % 4]);
    }
  }
  return sum_over_warp((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

// Two warpgroups. `thread` counts from 0 over both.
template <class Half, bool kSquares>
__device__ __forceinline__ void consume(const ContractSm90Params& params, Shared<Half>& shared, int thread,
                                        int n_begin, int n_end, int o0, int i0) {
  const int warpgroup = thread / kWarpgroup, warp = thread / 32, lane = thread % 32;
  const Place place{o0 + 16 * warp + lane / 4, i0 + 2 * (lane % 4), params.O, params.I, params.paired_stores};
  const bool whole_tile = o0 + kSm90Tile <= params.O && i0 + kSm90Tile <= params.I;
  const int64_t elements = static_cast<int64_t>(params.O) * params.I;

  float g[64] = {};  // G_n
  float sum[64] = {};
  [[maybe_unused]] float square[64] = {};
  bool accumulate = false;  // false: the next product starts from zero
  int in_use = -1;          // stage whose products are in flight
  Position at;
  const auto release = [&](int stage) {
    if (stage >= 0 && lane == 0) arrive(&shared.empty[stage]);
  };
  const int whole_slabs = params.T / kSm90SlabRows, rows_left = params.T % kSm90SlabRows;
  const auto b_descriptor = [&] {
    return matrix_descriptor(shared_address(shared.b[at.stage][warpgroup]), kBoxBytes);
  };
  const auto a_descriptor = [&] {
    return matrix_descriptor(shared_address(shared.a[at.stage][0]), kBoxBytes);
  };
  for (int n = n_begin; n < n_end; ++n) {
    for (int slab = 0; slab < whole_slabs; ++slab) {
      wait(&shared.full[at.stage], at.parity);
      const uint64_t b = b_descriptor(), a = a_descriptor();
      fence_registers(g);
#pragma unroll
      for (int k = 0; k < kSm90SlabRows / kDepth; ++k) {
        wgmma<Half>(g, b + k * kDepthBytes, a + k * kDepthBytes, k > 0 || accumulate);
      }
      commit_products();
      wait_for_products<1>();  // those of the slab before
      release(in_use);
      accumulate = true;
      in_use = at.stage;
      at.advance();
    }
    // Only as many products as there are positions. Kept apart, because products under conditions of their
    // own among those above would make ptxas close a group after each.
    if (rows_left > 0) {
      wait_for_accumulators(g);
      release(in_use);
      wait(&shared.full[at.stage], at.parity);
      const uint64_t b = b_descriptor(), a = a_descriptor();
      fence_registers(g);
#pragma unroll 1
      for (int k = 0; k * kDepth < rows_left; ++k) {
        wgmma<Half>(g, b + k * kDepthBytes, a + k * kDepthBytes, accumulate);
        accumulate = true;
      }
      commit_products();
      in_use = at.stage;
      at.advance();
    }
    wait_for_accumulators(g);
    release(in_use);
    in_use = -1;
    accumulate = false;

    if constexpr (kSquares) {
      if (params.centered) {
        const SampleWeights weights(n - n_begin);
#pragma unroll
        for (int r = 0; r < 64; ++r) add_centered(g[r], weights, sum[r], square[r]);
      } else {
#pragma unroll
        for (int r = 0; r < 64; ++r) {
          sum[r] += g[r];
          square[r] = fmaf(g[r], g[r], square[r]);
        }
      }
    } else {
      const float weight = params.weights ? params.weights[n] : 1.f;
#pragma unroll
      for (int r = 0; r < 64; ++r) sum[r] = fmaf(weight, g[r], sum[r]);
    }
    if (params.batch_grad) {
      store_tile(place, static_cast<Half*>(params.batch_grad) + n * elements, [&](int r) { return g[r]; });
    }
    if (params.norms) {
      const int slot = (n - n_begin) % kNormWindow;
      const float share = norm_of(g, place, whole_tile);
      if (lane == 0) shared.norms[slot][warp] = share;
      if (slot == kNormWindow - 1 || n + 1 == n_end) {
        sync_some<1, kConsumers>();  // the shares of all warps are there
        if (thread <= slot) {
          float norm = 0;
          for (int w = 0; w < kConsumerWarps; ++w) norm += shared.norms[thread][w];
          const int64_t sample = n - slot + thread;
          params.norms[sample * (gridDim.x * gridDim.y) + blockIdx.y * gridDim.x + blockIdx.x] = norm;
        }
        sync_some<1, kConsumers>();  // they have been read
      }
    }
  }

  const int64_t part = blockIdx.z * elements;
  if (params.partial_sums) {
    store_tile(place, params.partial_sums + part, [&](int r) { return sum[r]; });
  } else if (params.grad) {
    store_tile(place, static_cast<Half*>(params.grad), [&](int r) { return sum[r]; });
  }
  if constexpr (kSquares) {
    if (params.partial_squares) {
      store_tile(place, params.partial_squares + part, [&](int r) { return square[r]; });
      return;
    }
    if (params.sum_grad_centered_squared) {
      store_tile(place, params.sum_grad_centered_squared, [&](int r) { return square[r]; });
    }
    if (params.sum_grad_squared) {
      const float inverse_N = 1.f / static_cast<float>(params.N);
      store_tile(place, params.sum_grad_squared, [&](int r) {
        return params.centered ? uncentered(square[r], sum[r], inverse_N) : square[r];
      });
    }
  }
}

// Grid: (tiles_i, tiles_o, splits). Neighbouring blocks read the same rows of b.
template <class Half, bool kSquares>
__global__ void __launch_bounds__(kThreads, 1)
    contract_sm90_kernel(const __grid_constant__ ContractSm90Params params) {
  KERNEL_DYNAMIC_SHARED(unsigned char, raw);
  const uint32_t past_boundary = shared_address(raw) % kAlignment;
  Shared<Half>& shared =
      *reinterpret_cast<Shared<Half>*>(raw + (past_boundary ? kAlignment - past_boundary : 0));
  const int o0 = blockIdx.y * kSm90Tile, i0 = blockIdx.x * kSm90Tile;
  const int n_begin = static_cast<int>(int64_t{params.N} * blockIdx.z / gridDim.z);
  const int n_end = static_cast<int>(int64_t{params.N} * (blockIdx.z + 1) / gridDim.z);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      init_barrier(&shared.full[stage], 1);
      init_barrier(&shared.empty[stage], kConsumerWarps);
    }
    fence_barrier_init();
  }
  __syncthreads();  // the barriers are ready
  if (threadIdx.x < kWarpgroup) {
    release_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce(params, shared, n_begin, n_end, o0, i0);
  } else {
    request_registers<kConsumerRegisters>();
    consume<Half, kSquares>(params, shared, threadIdx.x - kWarpgroup, n_begin, n_end, o0, i0);
  }
}

}  // namespace sm90

template <class Half>
void launch_contract_sm90_kernel(const ContractSm90Params& params, bool squares, dim3 grid,
                                 cudaStream_t stream) {
  constexpr size_t kBytes = sizeof(sm90::Shared<Half>) + sm90::kAlignment;
  auto* const kernel =
      squares ? &sm90::contract_sm90_kernel<Half, true> : &sm90::contract_sm90_kernel<Half, false>;
  check(allow_dynamic_shared(kernel, kBytes), "contract_sm90");
  KERNEL_LAUNCH(grid, dim3(sm90::kThreads), kBytes, stream, kernel, params);
  check(cudaGetLastError(), "contract_sm90");
}

}  // namespace backpack_cuda::cuda
