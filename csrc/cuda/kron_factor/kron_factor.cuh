// The kron_factor kernel. A block owns one split of the rows of one tile of one product: slabs of rows, their
// entries in the tile's rows and in its columns, stream through a ring of asynchronous copies and are
// multiplied. On the diagonal both are the same slab.
#pragma once

#include "cuda/common/cuda_check.h"
#include "cuda/contract/loaders.cuh"
#include "cuda/contract/tile.cuh"
#include "cuda/kron_factor/kron_tables.cuh"

namespace backpack_cuda::cuda {

constexpr int kKronStages = 4;

// The corner of a row's patch, and what a column adds to it: offset in elements and coordinates, as unsigned
// numbers that wrap around.
struct KronPlace {
  int64_t offset;
  uint32_t at[3];
};
constexpr uint32_t kKronNowhere = 0x80000000u;  // outside, whatever is added

template <ContractPrecision kPrecision, ContractLoader kLoader, ContractTile kTile>
struct KronTraits : TensorTile<kPrecision, kTile, kLoader == ContractLoader::kPositions> {
  using Base = TensorTile<kPrecision, kTile, kLoader == ContractLoader::kPositions>;
  using typename Base::Element;
  using Slab = typename Base::TileSlab;
  static constexpr bool kWide = kLoader == ContractLoader::kChannelsLast;
  // Slabs that are summed by themselves: by the tensor cores, which truncate, or with rounding.
  static constexpr int kTerm = kPrecision == ContractPrecision::kTf32x3 ? 16 : 4;
  static constexpr int kVector = kWide ? 16 / static_cast<int>(sizeof(Element)) : 1;
  static constexpr int kTileStride = Base::kEdge + 1;  // of the finished tile

  struct Shared {
    union {
      alignas(16) Element slabs[kKronStages][2][Slab::kElements];  // rows' and columns' entries
      float tile[Base::kEdge * kTileStride];                       // [row, column], and sums of the rows
    };
    KronPlace rows[kKronStages][Base::kRows];
    KronPlace columns[2][Base::kEdge / kVector];
    // The block's work.
    int segment[3];
    int group, item;
    int tile_row, tile_column;  // first of each
    bool diagonal;              // one operand serves as both
    int slab_count;
    // Of the first row: its sample and position, and how many rows the product has from there on.
    int64_t n0;
    unsigned t0;
    int64_t rows_left;
  };
};

template <class Traits>
__device__ __forceinline__ void find_work(const KronJob& job, typename Traits::Shared& shared) {
  const int item = static_cast<int>(blockIdx.x);
  int product = 0, end = job.products;  // the last one that begins at the item or before it: it has items
  while (end - product > 1) {
    const int middle = (product + end) / 2;
    (job.first_item[middle] <= item ? product : end) = middle;
  }
  shared.segment[0] = product / job.axes[2].segments / job.axes[1].segments;
  shared.segment[1] = product / job.axes[2].segments % job.axes[1].segments;
  shared.segment[2] = product % job.axes[2].segments;
  const bool diagonal = on_the_diagonal(job, shared.segment);
  const int tiles = tiles_of(job, diagonal), first = job.first_item[product];
  const int splits = (job.first_item[product + 1] - first) / (tiles * job.groups);
  const int split = (item - first) % splits, tile = (item - first) / splits % tiles;
  int column = tile % tiles_across(job), row = tile / tiles_across(job);
  if (diagonal) {
    column = column_of_upper_tile(tile);
    row = tile - static_cast<int>(upper_tile(0, column));
  }
  shared.item = item;
  shared.group = (item - first) / splits / tiles;
  shared.tile_row = row * Traits::kEdge;
  shared.tile_column = column * Traits::kEdge;
  shared.diagonal = diagonal && row == column;

  const int64_t T = int64_t{job.axes[0].count[shared.segment[0]]} * job.axes[1].count[shared.segment[1]] *
                    job.axes[2].count[shared.segment[2]];
  const int64_t slabs = (job.N * T + Traits::kRows - 1) / Traits::kRows;
  const int64_t begin = slabs * split / splits;
  shared.slab_count = static_cast<int>(slabs * (split + 1) / splits - begin);
  shared.n0 = begin * Traits::kRows / T;
  shared.t0 = static_cast<unsigned>(begin * Traits::kRows % T);
  shared.rows_left = job.N * T - begin * Traits::kRows;
}

// Tables and copies; see cuda/contract/loaders.cuh for the frame.
template <class Traits>
class KronLoader {
 public:
  using Element = typename Traits::Element;
  using Slab = typename Traits::Slab;
  using Shared = typename Traits::Shared;

  __device__ __forceinline__ KronLoader(const KronJob& job, Shared& shared) : job_(job), shared_(shared) {}

  // The columns of both operands.
  __device__ __forceinline__ void start() const {
    constexpr int kColumns = Traits::kEdge / Traits::kVector;
    for (int e = threadIdx.x; e < 2 * kColumns; e += Traits::kThreads) {
      const int operand = e / kColumns;
      const int j = (operand ? shared_.tile_column : shared_.tile_row) + e % kColumns * Traits::kVector;
      const int volume = job_.kernel[0] * job_.kernel[1] * job_.kernel[2];
      const int k = job_.channels_inner ? j / job_.channels : j % volume;
      const int c = job_.channels_inner ? j % job_.channels : j / volume;
      const int place[3] = {k / (job_.kernel[2] * job_.kernel[1]), k / job_.kernel[2] % job_.kernel[1],
                            k % job_.kernel[2]};
      KronPlace column{c * job_.stride_c, {}};
#pragma unroll
      for (int d = 0; d < 3; ++d) {
        const int delta = place[d] * job_.dilation[d] + (operand ? job_.axes[d].lag[shared_.segment[d]] : 0);
        column.at[d] = delta;
        column.offset += delta * job_.stride[d];
      }
      const int64_t channel = int64_t{shared_.group} * job_.channels + c;
      if (j >= job_.columns || channel >= job_.total_channels) column.at[1] = kKronNowhere;
      shared_.columns[operand][e % kColumns] = column;
    }
  }

  // The rows of one slab, by a warp that the slabs take in turn.
  __device__ __forceinline__ void prepare(int stage, int slab) const {
    const unsigned thread = threadIdx.x - 32u * (slab % Traits::kWarps);
    if (thread >= Traits::kRows || slab >= shared_.slab_count) return;
    unsigned count[3];
#pragma unroll
    for (int d = 0; d < 3; ++d) count[d] = job_.axes[d].count[shared_.segment[d]];
    const unsigned row = static_cast<unsigned>(slab) * Traits::kRows + thread, t = shared_.t0 + row;
    const unsigned T = count[0] * count[1] * count[2], position = t % T;
    const unsigned p[3] = {position / count[2] / count[1], position / count[2] % count[1],
                           position % count[2]};
    KronPlace place{(shared_.n0 + t / T) * job_.stride_n, {}};
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      const int corner = job_.axes[d].begin[shared_.segment[d]] + static_cast<int>(p[d]) * job_.step[d];
      place.at[d] = corner;
      place.offset += corner * job_.stride[d];
    }
    if (row >= shared_.rows_left) place.at[0] = kKronNowhere;
    shared_.rows[stage][thread] = place;
  }

  // The entries of one operand, zeros where a row or column is past the edge or outside of the input.
  __device__ __forceinline__ void load(int operand, int stage) const {
    Element* const slab = shared_.slabs[stage][operand];
    const Element* const data =
        static_cast<const Element*>(job_.data) + int64_t{shared_.group} * job_.channels * job_.stride_c;
    const int thread = compute_late(threadIdx.x);
    if constexpr (Traits::kWide) {
      constexpr int kChunks = Slab::kColumns / Traits::kVector;
      static_assert(!Slab::kAlongT && Traits::kThreads == kChunks * Slab::kDepth,
                    "one copy per thread and half slab");
      const int chunk = thread % kChunks, first_row = thread / kChunks;
      const KronPlace column = shared_.columns[operand][chunk];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const KronPlace& row = shared_.rows[stage][half * Slab::kDepth + first_row];
        const bool valid = inside(row, column);
        const Element* const from = data + (valid ? row.offset + column.offset : 0);
        cp_async<16>(slab + Slab::at(half * Slab::kDepth + first_row, chunk * Traits::kVector), from,
                     valid ? 16 : 0);
      }
    } else {
      if (Slab::kAlongT && job_.whole_copies) return load_positions(slab, data, operand, stage, thread);
      using Map = ElementMap<Slab, Traits::kThreads>;
#pragma unroll 1
      for (int row_pass = 0; row_pass < Map::kRowPasses; ++row_pass) {
        const int row = Map::row(thread, row_pass);
        const KronPlace patch = shared_.rows[stage][row];
        constexpr int kBatch = 4;  // more would cost registers
#pragma unroll 1
        for (int pass = 0; pass < Map::kColumnPasses; pass += kBatch) {
          Element* to[kBatch];
          const Element* from[kBatch];
          bool valid[kBatch];
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            const int c = Map::column(thread, pass + j);
            const KronPlace& column = shared_.columns[operand][c];
            valid[j] = inside(patch, column);
            to[j] = slab + Slab::at(row, c);
            from[j] = data + (valid[j] ? patch.offset + column.offset : 0);
          }
          copy_elements(to, from, valid);
        }
      }
    }
  }

 private:
  // 16 bytes of adjacent positions of one channel: never of two samples, nor past the last.
  __device__ __forceinline__ void load_positions(Element* slab, const Element* data, int operand, int stage,
                                                 int thread) const {
    constexpr int kVector = 16 / static_cast<int>(sizeof(Element)), kChunks = Slab::kRows / kVector;
    constexpr int kColumnsPerPass = Traits::kThreads / kChunks;
    const int first_row = thread % kChunks * kVector;
    const KronPlace& row = shared_.rows[stage][first_row];
#pragma unroll 2
    for (int c = thread / kChunks; c < Slab::kColumns; c += kColumnsPerPass) {
      const KronPlace& column = shared_.columns[operand][c];
      const bool valid = inside(row, column);
      cp_async<16>(slab + Slab::at(first_row, c), data + (valid ? row.offset + column.offset : 0),
                   valid ? 16 : 0);
    }
  }

  __device__ __forceinline__ bool inside(const KronPlace& row, const KronPlace& column) const {
    return row.at[0] + column.at[0] < static_cast<uint32_t>(job_.size[0]) &&
           row.at[1] + column.at[1] < static_cast<uint32_t>(job_.size[1]) &&
           row.at[2] + column.at[2] < static_cast<uint32_t>(job_.size[2]);
  }

  const KronJob& job_;
  Shared& shared_;
};

// The finished tile as results: above the diagonal and mirrored. Patches in one split, of one layer's group.
template <class Traits>
__device__ __forceinline__ void store_results(const KronJob& job, typename Traits::Shared& shared) {
  constexpr int kEdge = Traits::kEdge, kStride = Traits::kTileStride;
  const int volume = job.layer_kernel[0] * job.layer_kernel[1] * job.layer_kernel[2];
  const int64_t size = out_size(job);
  float* const out = job.out + shared.group * size * size;
  const auto place = [&](int column) {  // in the factor
    return job.channels_inner ? column % job.channels * volume + column / job.channels : column;
  };
  const auto stored = [&](int row, int column) {
    const int i = shared.tile_row + row, j = shared.tile_column + column;
    return i <= j && j < job.columns;
  };
  // Along the rows, then along the columns: neighbouring threads write neighbours.
  for (int e = threadIdx.x; e < kEdge * kEdge; e += Traits::kThreads) {
    const int row = e / kEdge, column = e % kEdge;
    if (!stored(row, column)) continue;
    const int64_t i = place(shared.tile_row + row), j = place(shared.tile_column + column);
    float& value = shared.tile[row * kStride + column];
    value = updated(job, shared.group, i < j ? i : j, i < j ? j : i, value);
    out[i * size + j] = value;
  }
  __syncthreads();  // all values that will be mirrored, and none above the diagonal is read any more
  for (int e = threadIdx.x; e < kEdge * kEdge; e += Traits::kThreads) {
    const int row = e % kEdge, column = e / kEdge;
    if (!stored(row, column)) continue;
    const int64_t i = place(shared.tile_row + row), j = place(shared.tile_column + column);
    out[j * size + i] = shared.tile[row * kStride + column];
  }
  if (job.homogeneous && shared.diagonal) {
    for (int row = threadIdx.x; row < kEdge && shared.tile_row + row < job.columns; row += Traits::kThreads) {
      const int64_t i = place(shared.tile_row + row);
      const float value = updated(job, shared.group, i, size - 1, shared.tile[row * kStride + kEdge]);
      out[i * size + size - 1] = out[(size - 1) * size + i] = value;
    }
    if (threadIdx.x == 0 && shared.tile_row == 0) {
      out[size * size - 1] = updated(job, shared.group, size - 1, size - 1, job.count);
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    kron_factor_kernel(const __grid_constant__ KronJob job) {
  using Element = typename Traits::Element;
  using Fragments = typename Traits::Fragments;
  using Slab = typename Traits::Slab;
  using Accumulator = typename Fragments::Accumulator;
  constexpr int kEdge = Traits::kEdge, kDepth = Traits::kDepth;
  KERNEL_DYNAMIC_SHARED(typename Traits::Shared, shared);
  if (threadIdx.x == 0) find_work<Traits>(job, *shared);
  __syncthreads();  // the block's work
  const KronLoader<Traits> loader(job, *shared);
  loader.start();
  // Copies are kKronStages - 1 slabs ahead of the products, and their tables one more.
  for (int stage = 0; stage < kKronStages; ++stage) loader.prepare(stage, stage);
  __syncthreads();  // tables
  const auto load = [&](int slab, int stage) {
    if (slab < shared->slab_count) {
      loader.load(0, stage);
      if (!shared->diagonal) loader.load(1, stage);
    }
    cp_async_commit();  // an empty group past the end keeps their number
  };
#pragma unroll 1
  for (int stage = 0; stage < kKronStages - 1; ++stage) load(stage, stage);

  // Sums of a few slabs, then of those: of one long sum too much is lost.
  Accumulator terms = {}, sums = {};
  const auto add_terms = [&] {
#pragma unroll
    for (int m = 0; m < Fragments::kM; ++m) {
#pragma unroll
      for (int n = 0; n < Fragments::kN; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[m][n][r] += terms[m][n][r], terms[m][n][r] = 0;
      }
    }
  };
  const bool sums_rows = job.homogeneous && shared->diagonal;
  float row_sum = 0;  // over half of each slab, of the tile's row threadIdx.x % kEdge
  int stage = 0;
#pragma unroll 1
  for (int slab = 0; slab < shared->slab_count; ++slab) {
    cp_async_wait<kKronStages - 2>();
    __syncthreads();  // this slab has landed for all, and all have left the last one, refilled now
    load(slab + kKronStages - 1, (stage + kKronStages - 1) % kKronStages);
    loader.prepare(stage, slab + kKronStages);  // its tables were last read three slabs ago
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Element* const slabs[2] = {shared->slabs[stage][0], shared->slabs[stage][!shared->diagonal]};
    const Element* const rows = slabs[0] + Slab::at(0, Traits::warp_o(warp));
    const Element* const columns = slabs[1] + Slab::at(0, Traits::warp_i(warp));
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      Fragments::step(terms, rows + Slab::at(k * kDepth, 0), columns + Slab::at(k * kDepth, 0), lane);
    }
    if (slab % Traits::kTerm == Traits::kTerm - 1) add_terms();
    if (sums_rows) {
      static_assert(Traits::kThreads == 2 * kEdge);
      float part = 0;
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k) {
        part += static_cast<float>(slabs[0][Slab::at(threadIdx.x / kEdge * kDepth + k, threadIdx.x % kEdge)]);
      }
      row_sum += part;
    }
    stage = (stage + 1) % kKronStages;
  }
  add_terms();

  cp_async_wait<0>();
  __syncthreads();  // the ring is free: the tile takes its place
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Fragments::kM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = Traits::warp_o(warp) + Fragments::row(lane, m, r);
#pragma unroll
      for (int run = 0; run < Fragments::kRuns; ++run) {
        const int column = Traits::warp_i(warp) + Fragments::run_column(lane, run);
#pragma unroll
        for (int e = 0; e < Fragments::kRun; ++e) {
          shared->tile[row * Traits::kTileStride + column + e] = Fragments::value(sums, m, r, run, e);
        }
      }
    }
  }
  float* const half_sum = &shared->tile[threadIdx.x % kEdge * Traits::kTileStride + kEdge];
  if (threadIdx.x < kEdge) *half_sum = row_sum;
  __syncthreads();  // the tile, and first halves
  if (threadIdx.x >= kEdge) *half_sum += row_sum;
  __syncthreads();
  if (job.partial) {
    constexpr int kElements = kEdge * Traits::kTileStride;
    float* const partial = job.partial + int64_t{shared->item} * kElements;
    for (int e = threadIdx.x; e < kElements; e += Traits::kThreads) partial[e] = shared->tile[e];
  } else {
    store_results<Traits>(job, *shared);
  }
}

template <class Traits>
void launch_kron_kernel(const KronJob& job, cudaStream_t stream) {
  auto* const kernel = &kron_factor_kernel<Traits>;
  constexpr size_t kBytes = sizeof(typename Traits::Shared);
  check(allow_dynamic_shared(kernel, kBytes), "kron_factor");
  KERNEL_LAUNCH(dim3(static_cast<unsigned>(job.first_item[job.products])), dim3(Traits::kThreads), kBytes,
                stream, kernel, job);
  check(cudaGetLastError(), "kron_factor");
}

// The large tile where kron_factor_plan.cpp may choose it.
template <ContractPrecision kPrecision, ContractLoader kLoader>
void launch_kron_tile(const KronJob& job, ContractTile tile, cudaStream_t stream) {
  if constexpr (kPrecision != ContractPrecision::kTf32x3 && kLoader != ContractLoader::kElements) {
    if (tile == ContractTile::k128) {
      return launch_kron_kernel<KronTraits<kPrecision, kLoader, ContractTile::k128>>(job, stream);
    }
  }
  launch_kron_kernel<KronTraits<kPrecision, kLoader, ContractTile::k64>>(job, stream);
}

}  // namespace backpack_cuda::cuda
