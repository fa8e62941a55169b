// The contract kernel. A block owns one tile of the weight's [O, I] and a range of samples, whose slabs of
// positions form one stream through a ring of asynchronous copies: while the epilogue of a sample runs, the
// slabs of the next are under way. One barrier per slab.
#pragma once

#include <type_traits>

#include "cuda/common/cuda_check.h"
#include "cuda/contract/epilogue.cuh"
#include "cuda/contract/loaders.cuh"
#include "cuda/contract/tile.cuh"

namespace backpack_cuda::cuda {

// All that an instantiation decides.
template <ContractPrecision kPrecision, ContractLoader kLoader, ContractTile kTile, ContractMode kMode_>
struct ContractTraits : TensorTile<kPrecision, kTile, kLoader == ContractLoader::kPositions> {
  using Tile = TensorTile<kPrecision, kTile, kLoader == ContractLoader::kPositions>;
  using Tile::kEdge, Tile::kWarps, Tile::kThreads;
  using typename Tile::Element;
  static constexpr ContractMode kMode = kMode_;
  static constexpr bool kColumns = kMode == ContractMode::kColumns;
  using SlabA = typename Tile::TileSlab;
  using SlabB = SlabA;
  using LoaderA =
      std::conditional_t<kLoader == ContractLoader::kRows, RowLoader<SlabA, kThreads, kColumns>,
                         PatchLoader<SlabA, kThreads, kLoader == ContractLoader::kChannelsLast, kColumns>>;
  using LoaderB = std::conditional_t<
      kLoader == ContractLoader::kPositions, PositionLoader<SlabB, kThreads, kColumns>,
      std::conditional_t<kLoader == ContractLoader::kElements, PatchLoader<SlabB, kThreads, false, kColumns>,
                         RowLoader<SlabB, kThreads, kColumns>>>;

  // The slabs' columns have another order than the weight's.
  static constexpr bool kOwnOrder = kLoader == ContractLoader::kChannelsLast;

  struct Shared {  // 36 to 44 KiB for 64x64, 68 to 87 KiB for 128x128
    alignas(16) Element b[kContractStages][SlabB::kElements];
    alignas(16) Element a[kContractStages][SlabA::kElements];
    typename LoaderA::Shared loader_a;
    typename LoaderB::Shared loader_b;
    ContractBlock block;
    int weight_columns[kOwnOrder ? kEdge : 1];
    // Of the samples that a slab completes, up to two; for slabs of even and of odd stages.
    float norms[2][2][kWarps];
  };
};

// Neighbouring blocks share rows of b.
template <class Traits>
__device__ __forceinline__ ContractBlock contract_block(const ContractParams& params, int tile, int part) {
  using Element = typename Traits::Element;
  const int tile_i = tile % params.tiles_i, tile_o = tile / params.tiles_i % params.tiles_o;
  const int group = tile / params.tiles_i / params.tiles_o;
  const int split = part / params.t_splits, t_begin = part % params.t_splits * params.t_per_split;
  const int unit = Traits::kColumns ? params.split_unit : 1;
  const int64_t units = Traits::kColumns ? static_cast<int64_t>(params.N) * params.V / unit : params.N;
  return {static_cast<int>(units * split / params.splits) * unit,
          static_cast<int>(units * (split + 1) / params.splits) * unit,
          t_begin,
          min(params.T, t_begin + params.t_per_split),
          group,
          tile_o * Traits::kEdge,
          tile_i * Traits::kEdge,
          static_cast<const Element*>(params.a.data) + group * params.a.stride_group,
          static_cast<const Element*>(params.b.data) + group * params.b.stride_group};
}

// Columns: where the ring holds the slab of an operand that is kept. The slabs of each n follow those of the
// one before; they are loaded once, with the first column of n in this block.
template <class Traits>
__device__ __forceinline__ int kept_slot(const ContractParams& params, int sample, int t0) {
  const unsigned n = static_cast<unsigned>(compute_late(sample)) / static_cast<unsigned>(params.V);
  return (n * params.kept_slabs + t0 / Traits::kRows) % kContractStages;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    contract_kernel(const __grid_constant__ ContractParams params) {
  using Element = typename Traits::Element;
  using Fragments = typename Traits::Fragments;
  using SlabA = typename Traits::SlabA;
  using SlabB = typename Traits::SlabB;
  constexpr int kRows = Traits::kRows, kDepth = Traits::kDepth;
  constexpr bool kTables = Traits::LoaderA::kTables || Traits::LoaderB::kTables;
  KERNEL_DYNAMIC_SHARED(typename Traits::Shared, shared);

  const ContractBlock& block = shared->block;
  const typename Traits::LoaderA loader_a(params, params.a, shared->loader_a, block, block.a, block.column);
  const typename Traits::LoaderB loader_b(params, params.b, shared->loader_b, block, block.b, block.row);
  Epilogue<Traits> epilogue(params, *shared);

  const int tiles = params.tiles_i * params.tiles_o * params.groups;
  const int tile = blockIdx.x % tiles, part = blockIdx.x / tiles;
  if (threadIdx.x == 0) shared->block = contract_block<Traits>(params, tile, part);
  __syncthreads();  // block
  loader_a.start();
  loader_b.start();
  if constexpr (Traits::kOwnOrder) {
    const int j = threadIdx.x, i = block.column + j;
    if (j < Traits::kEdge) {
      const int channels = params.a.channels, volume = params.I / channels;
      shared->weight_columns[j] = i < params.I ? i % channels * volume + i / channels : -1;
    }
  }

  // The producer is kContractStages - 1 slabs ahead of the products, and its tables one more.
  SlabBegin next{block.n_begin, block.t_begin};
  const auto prepare = [&](int stage, const SlabBegin& begin) {
    if (kTables && begin.n < block.n_end) {
      loader_a.prepare(stage, begin, threadIdx.x);
      loader_b.prepare(stage, begin, threadIdx.x - 32);  // another warp
    }
  };
  const auto load_operand = [&](const auto& loader, auto& ring, bool keep, int stage) {
    int slot = stage;
    if (Traits::kColumns && keep) {
      const bool first_column = next.n % static_cast<unsigned>(params.V) == 0;
      if (!first_column && next.n != block.n_begin) return;  // it is there
      slot = kept_slot<Traits>(params, next.n, next.t0);
    }
    loader.load(ring[slot], stage, next);
  };
  const auto load = [&](int stage) {
    if (next.n < block.n_end) {
      load_operand(loader_b, shared->b, params.keep_b, stage);
      load_operand(loader_a, shared->a, params.keep_a, stage);
      next.advance<kRows>(block, params.packed);
    }
    cp_async_commit();  // an empty group past the end keeps their number
  };
  if constexpr (kTables) {
    SlabBegin begin = next;
    for (int stage = 0; stage < kContractStages; ++stage) {
      prepare(stage, begin);
      begin.advance<kRows>(block, params.packed);
    }
  }
  __syncthreads();  // tables
#pragma unroll 1
  for (int stage = 0; stage < kContractStages - 1; ++stage) load(stage);

  // Norms of the samples [n, end), which the slab of this stage completed: one value per sample and tile.
  const auto flush_norms = [&](int stage, int n, int end) {
    const int s = threadIdx.x;
    if (s < end - n) {
      float total = 0;
#pragma unroll
      for (int w = 0; w < Traits::kWarps; ++w) total += shared->norms[stage % 2][s][w];
      params.norms[static_cast<int64_t>(n + s) * tiles + tile] = total;
    }
  };

  typename Fragments::Accumulator acc = {};
  int stage = kContractStages - 1;
  for (int n = block.n_begin; n < block.n_end; ++n) {
    const bool second = params.packed && (n - block.n_begin) % 2;  // of two samples in a slab
    for (int t0 = block.t_begin; t0 < block.t_end; t0 += kRows) {
      if (!second) {
        cp_async_wait<kContractStages - 2>();
        __syncthreads();  // the next slab has landed for all, and all have left the last one, refilled now
        load(stage);
        if (params.norms && t0 == block.t_begin && n > block.n_begin) {
          flush_norms(stage, n - (params.packed ? 2 : 1), n);
        }
        stage = (stage + 1) % kContractStages;
        prepare(stage, next);  // its tables were last read three slabs ago
      }
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      const int slot_b = Traits::kColumns && params.keep_b ? kept_slot<Traits>(params, n, t0) : stage;
      const int slot_a = Traits::kColumns && params.keep_a ? kept_slot<Traits>(params, n, t0) : stage;
      const Element* const slab_b = shared->b[slot_b] + SlabB::at(second * kDepth, Traits::warp_o(warp));
      const Element* const slab_a = shared->a[slot_a] + SlabA::at(second * kDepth, Traits::warp_i(warp));
      Fragments::step(acc, slab_b, slab_a, lane);
      if (t0 + kDepth < block.t_end) {
        Fragments::step(acc, slab_b + SlabB::at(kDepth, 0), slab_a + SlabA::at(kDepth, 0), lane);
      }
    }
    epilogue.sample(acc, n, &shared->norms[stage % 2][second][threadIdx.x / 32]);
#pragma unroll
    for (int m = 0; m < Fragments::kM; ++m) {
#pragma unroll
      for (int c = 0; c < Fragments::kN; ++c) {
#pragma unroll
        for (int r = 0; r < 4; ++r) acc[m][c][r] = 0.f;
      }
    }
  }
  if (params.norms) {
    __syncthreads();  // the last slab's
    const int last = (block.n_end - block.n_begin - 1) % (params.packed ? 2 : 1);
    flush_norms(stage, block.n_end - 1 - last, block.n_end);
  }
  epilogue.finish(part);
}

template <class Traits>
void launch_contract_kernel(const ContractParams& params, cudaStream_t stream) {
  auto* const kernel = &contract_kernel<Traits>;
  constexpr size_t kBytes = sizeof(typename Traits::Shared);
  check(allow_dynamic_shared(kernel, kBytes), "contract");
  const unsigned blocks =
      unsigned(params.tiles_i) * params.tiles_o * params.groups * params.splits * params.t_splits;
  KERNEL_LAUNCH(dim3(blocks), dim3(Traits::kThreads), kBytes, stream, kernel, params);
  check(cudaGetLastError(), "contract");
}

// No 128x128 with three products, as contract_plan.cpp knows: it would not fit the registers.
template <ContractPrecision kPrecision, ContractLoader kLoader, ContractMode kMode>
void launch_contract_tile(const ContractParams& params, ContractTile tile, cudaStream_t stream) {
  if constexpr (kPrecision != ContractPrecision::kTf32x3) {
    if (tile == ContractTile::k128) {
      using Traits = ContractTraits<kPrecision, kLoader, ContractTile::k128, kMode>;
      return launch_contract_kernel<Traits>(params, stream);
    }
  }
  launch_contract_kernel<ContractTraits<kPrecision, kLoader, ContractTile::k64, kMode>>(params, stream);
}

// First order.
template <ContractPrecision kPrecision, ContractLoader kLoader>
void launch_contract_stats(const ContractParams& params, ContractTile tile, bool squares,
                           cudaStream_t stream) {
  squares ? launch_contract_tile<kPrecision, kLoader, ContractMode::kSquares>(params, tile, stream)
          : launch_contract_tile<kPrecision, kLoader, ContractMode::kSum>(params, tile, stream);
}

// Second order.
template <ContractPrecision kPrecision>
void launch_contract_columns(const ContractParams& params, ContractLoader loader, ContractTile tile,
                             cudaStream_t stream) {
  constexpr ContractMode kMode = ContractMode::kColumns;
  switch (loader) {
    case ContractLoader::kRows:
      return launch_contract_tile<kPrecision, ContractLoader::kRows, kMode>(params, tile, stream);
    case ContractLoader::kChannelsLast:
      return launch_contract_tile<kPrecision, ContractLoader::kChannelsLast, kMode>(params, tile, stream);
    case ContractLoader::kPositions:
      return launch_contract_tile<kPrecision, ContractLoader::kPositions, kMode>(params, tile, stream);
    case ContractLoader::kElements:
      return launch_contract_tile<kPrecision, ContractLoader::kElements, kMode>(params, tile, stream);
  }
}

}  // namespace backpack_cuda::cuda
