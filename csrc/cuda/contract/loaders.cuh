// How a slab reaches shared memory.
//
// Interface: Shared, tables of the block; kTables, whether it has any; start(), called once by all threads;
// prepare(stage, begin, thread), which writes the tables of a slab, by threads that count from 0; load(slab,
// stage, begin), which issues its copies: zeros where a row or column is past the edge. Each needs a barrier
// after the one before it; none waits or synchronises. Loaders keep nothing in registers: what they need is a
// few instructions from threadIdx, or lies in the tables.
#pragma once

#include "cuda/common/ptx.cuh"
#include "cuda/contract/slab.cuh"

namespace backpack_cuda::cuda {

// Copies single elements, kCount at a time. There is no asynchronous copy of 2 bytes; with several loads
// under way their latencies overlap.
template <class Element, int kCount>
__device__ __forceinline__ void copy_elements(Element* const (&to)[kCount],
                                              const Element* const (&from)[kCount],
                                              const bool (&valid)[kCount]) {
  if constexpr (sizeof(Element) == 4) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) cp_async<4>(to[j], from[j], valid[j] ? 4 : 0);
  } else {
    uint16_t values[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      values[j] = valid[j] ? *reinterpret_cast<const uint16_t*>(from[j]) : uint16_t{0};
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) *reinterpret_cast<uint16_t*>(to[j]) = values[j];
  }
}

// Rows of adjacent channels, positions of one stride, all aligned to 16 bytes, whole 16 bytes of columns.
template <class Slab, int kThreads, bool kColumns>
class RowLoader {
 public:
  using Element = typename Slab::Element;
  static constexpr int kVector = 16 / sizeof(Element), kChunks = Slab::kColumns / kVector;
  static constexpr bool kTables = true;
  struct Shared {
    int64_t rows[kContractStages][Slab::kRows];  // where each row begins, in bytes from the first
    uint32_t valid_rows[kContractStages];        // a bit each; the other rows are zeros
    int64_t columns[kChunks];                    // addresses in the first row, 0 past the edge
  };

  // data: the group's; column0: the tile's first column.
  __device__ __forceinline__ RowLoader(const ContractParams& params, const ContractOperand& x, Shared& shared,
                                       const ContractBlock& block, const void* const& data,
                                       const int& column0)
      : params_(params), x_(x), shared_(shared), block_(block), data_(data), column0_(column0) {}
  __device__ __forceinline__ void start() const {
    for (int chunk = threadIdx.x; chunk < kChunks; chunk += kThreads) {
      const int column = column0_ + chunk * kVector;
      const Element* const data = static_cast<const Element*>(data_);
      shared_.columns[chunk] = column < x_.columns ? reinterpret_cast<int64_t>(data + column) : 0;
    }
  }
  __device__ __forceinline__ void prepare(int stage, const SlabBegin& begin, unsigned thread) const {
    if (thread >= Slab::kRows) return;
    const SlabRow<Slab> row(begin, thread, block_, params_.packed);
    const int64_t offset = sample_offset<kColumns>(params_, x_, row.n) + row.t * x_.stride_t;
    const unsigned valid = __ballot_sync(Slab::kRows == 32 ? ~0u : (1u << Slab::kRows) - 1, row.valid);
    shared_.rows[stage][thread] = row.valid ? offset * static_cast<int>(sizeof(Element)) : 0;
    if (thread == 0) shared_.valid_rows[stage] = valid;
  }
  __device__ __forceinline__ void load(Element* slab, int stage, const SlabBegin&) const {
    const int thread = compute_late(threadIdx.x), first_row = thread / kChunks, chunk = thread % kChunks;
    const int64_t column = shared_.columns[chunk];
    const unsigned valid_rows = shared_.valid_rows[stage] >> first_row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t from = column + shared_.rows[stage][half * Slab::kDepth + first_row];
      const bool valid = column && valid_rows >> half * Slab::kDepth & 1;
      cp_async<16>(slab + Slab::at(half * Slab::kDepth + first_row, chunk * kVector),
                   reinterpret_cast<const void*>(from),
                   valid ? 16 : 0);  // all or nothing takes fewer instructions
    }
  }

 private:
  static_assert(!Slab::kAlongT && kThreads == kChunks * Slab::kDepth, "one copy per thread and half slab");
  const ContractParams& params_;
  const ContractOperand& x_;
  Shared& shared_;
  const ContractBlock& block_;
  const void* const& data_;
  const int& column0_;
};

// Adjacent positions of each channel, into a column-major slab, by the widest copies that the operand allows.
template <class Slab, int kThreads, bool kColumns>
class PositionLoader {
 public:
  using Element = typename Slab::Element;
  struct Shared {};
  static constexpr bool kTables = false;

  __device__ __forceinline__ PositionLoader(const ContractParams& params, const ContractOperand& x, Shared&,
                                            const ContractBlock& block, const void* const& data,
                                            const int& column0)
      : params_(params), x_(x), block_(block), data_(data), column0_(column0) {}
  __device__ __forceinline__ void start() const {}
  __device__ __forceinline__ void prepare(int, const SlabBegin&, unsigned) const {}
  __device__ __forceinline__ void load(Element* slab, int, const SlabBegin& begin) const {
    if (params_.copy_bytes == 16) {
      load_by<16>(slab, begin);
    } else if (params_.copy_bytes == 8) {
      load_by<8>(slab, begin);
    } else if (params_.copy_bytes == 4) {
      load_by<4>(slab, begin);
    } else {
      load_by<2>(slab, begin);
    }
  }

 private:
  static_assert(Slab::kAlongT);

  template <int kBytes>
  __device__ __forceinline__ void load_by(Element* slab, const SlabBegin& begin) const {
    if constexpr (kBytes >= sizeof(Element)) {
      constexpr int kVector = kBytes / sizeof(Element), kChunks = Slab::kRows / kVector;
      constexpr int kColumnsPerPass = kThreads / kChunks, kPasses = Slab::kColumns / kColumnsPerPass;
      static_assert(kThreads % kChunks == 0 && Slab::kColumns % kColumnsPerPass == 0, "slab not covered");
      const int thread = compute_late(threadIdx.x);
      const int first_row = thread % kChunks * kVector, first_column = thread / kChunks;
      const SlabRow<Slab> row(begin, first_row, block_, params_.packed);
      const int valid_bytes = min(kVector, block_.t_end - row.t) * static_cast<int>(sizeof(Element));
      const Element* const from = static_cast<const Element*>(data_) +
                                  (row.valid ? sample_offset<kColumns>(params_, x_, row.n) + row.t : 0);
      constexpr int kBatch = kBytes == 2 ? 4 : 1;
#pragma unroll 2
      for (int pass = 0; pass < kPasses; pass += kBatch) {
        Element* to[kBatch];
        const Element* source[kBatch];
        bool valid[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int column = first_column + (pass + j) * kColumnsPerPass;
          valid[j] = row.valid && column0_ + column < x_.columns;
          to[j] = slab + Slab::at(first_row, column);
          source[j] = from + (valid[j] ? (column0_ + column) * x_.stride_c : 0);
        }
        if constexpr (kBytes == 2) {
          copy_elements(to, source, valid);
        } else {
          cp_async<kBytes>(to[0], source[0], valid[0] ? valid_bytes : 0);
        }
      }
    }
  }

  const ContractParams& params_;
  const ContractOperand& x_;
  const ContractBlock& block_;
  const void* const& data_;
  const int& column0_;
};

// Which rows and columns of a slab a thread copies by single elements: columns(pass) for each of its rows.
// Lanes run along t in a column-major slab, which is then also how memory is adjacent; otherwise eight
// along the columns and four along t. Either way they hit 32 different banks.
template <class Slab, int kThreads>
struct ElementMap {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kLanesT = Slab::kAlongT ? Slab::kRows : 4, kLanesC = 32 / kLanesT;
  static constexpr int kBlocksT = Slab::kRows / kLanesT, kBlocksC = Slab::kColumns / kLanesC;
  static constexpr int kWarpsT = kWarps < kBlocksT ? kWarps : kBlocksT, kWarpsC = kWarps / kWarpsT;
  static constexpr int kRowPasses = kBlocksT / kWarpsT, kColumnPasses = kBlocksC / kWarpsC;
  static_assert(kWarpsT * kRowPasses == kBlocksT && kWarpsC * kColumnPasses == kBlocksC, "slab not covered");

  static __device__ __forceinline__ int row(int thread, int pass) {
    return (pass * kWarpsT + thread / 32 % kWarpsT) * kLanesT + thread % kLanesT;
  }
  static __device__ __forceinline__ int column(int thread, int pass) {
    const int block = pass * kWarpsC + thread / 32 / kWarpsT, lane = thread % 32 / kLanesT;
    // Two columns at a time are four apart: 80 banks, which is 16.
    if constexpr (Slab::kAlongT && kLanesC == 2) return block / 4 * 8 + block % 4 + lane * 4;
    return block * kLanesC + lane;
  }
};

// Patches, at any strides. kWide: 16-byte copies of adjacent channels at one place of the kernel, with
// columns in the order (place, channel); otherwise single elements, in the weight's order (channel, place).
template <class Slab, int kThreads, bool kWide, bool kColumns>
class PatchLoader {
 public:
  using Element = typename Slab::Element;
  static constexpr bool kTables = true;
  static constexpr int kVector = kWide ? 16 / static_cast<int>(sizeof(Element)) : 1;
  struct Row {
    int64_t offset;      // of the patch's corner
    uint32_t corner[3];  // its coordinates, perhaps outside
  };
  struct Column {
    int64_t offset;     // relative to the corner
    uint32_t delta[3];  // likewise
  };
  struct Shared {
    Row rows[kContractStages][Slab::kRows];
    Column columns[Slab::kColumns / kVector];
  };

  __device__ __forceinline__ PatchLoader(const ContractParams& params, const ContractOperand& x,
                                         Shared& shared, const ContractBlock& block, const void* const& data,
                                         const int& column0)
      : params_(params), x_(x), shared_(shared), block_(block), data_(data), column0_(column0) {}
  __device__ __forceinline__ void start() const {
    const ContractOperand& x = x_;
    for (int j = threadIdx.x; j < Slab::kColumns / kVector; j += kThreads) {
      const int i = column0_ + j * kVector, volume = x.kernel[0] * x.kernel[1] * x.kernel[2];
      const int place = kWide ? i / x.channels : i % volume, c = kWide ? i % x.channels : i / volume;
      const int k[3] = {place / (x.kernel[2] * x.kernel[1]), place / x.kernel[2] % x.kernel[1],
                        place % x.kernel[2]};
      Column column{c * x.stride_c, {}};
#pragma unroll
      for (int d = 0; d < 3; ++d) {
        column.delta[d] = k[d] * x.dilation[d];
        column.offset += k[d] * x.dilation[d] * x.stride[d];
      }
      if (i >= x.columns) column.delta[1] = kNowhere;
      shared_.columns[j] = column;
    }
  }
  __device__ __forceinline__ void prepare(int stage, const SlabBegin& begin, unsigned thread) const {
    if (thread >= Slab::kRows) return;
    const SlabRow<Slab> place(begin, thread, block_, params_.packed);
    const int p[3] = {place.t / params_.positions[2] / params_.positions[1],
                      place.t / params_.positions[2] % params_.positions[1], place.t % params_.positions[2]};
    Row row{sample_offset<kColumns>(params_, x_, place.n), {}};
#pragma unroll
    for (int d = 0; d < 3; ++d) {
      const int corner = p[d] * x_.step[d] - x_.padding[d];
      row.corner[d] = corner;
      row.offset += corner * x_.stride[d];
    }
    if (!place.valid) row.corner[0] = kNowhere;
    shared_.rows[stage][thread] = row;
  }
  __device__ __forceinline__ void load(Element* slab, int stage, const SlabBegin&) const {
    if constexpr (kWide) {
      constexpr int kChunks = Slab::kColumns / kVector;
      static_assert(!Slab::kAlongT && kThreads == kChunks * Slab::kDepth,
                    "one copy per thread and half slab");
      const int thread = compute_late(threadIdx.x), chunk = thread % kChunks, first_row = thread / kChunks;
      const Element* const data = static_cast<const Element*>(data_);
      const Column column = shared_.columns[chunk];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Row& row = shared_.rows[stage][half * Slab::kDepth + first_row];
        const bool valid = inside(row, column);
        const Element* const from = data + (valid ? row.offset + column.offset : 0);
        cp_async<16>(slab + Slab::at(half * Slab::kDepth + first_row, chunk * kVector), from, valid ? 16 : 0);
      }
    } else {
      const int thread = compute_late(threadIdx.x);
      const Element* const data = static_cast<const Element*>(data_);
#pragma unroll 1
      for (int row_pass = 0; row_pass < Map::kRowPasses; ++row_pass) {
        const int row = Map::row(thread, row_pass);
        const Row patch = shared_.rows[stage][row];
        // More would cost registers; asynchronous copies do not need it.
        constexpr int kBatch = kColumns && sizeof(Element) == 4 ? 2 : 4;
#pragma unroll 1
        for (int pass = 0; pass < Map::kColumnPasses; pass += kBatch) {
          Element* to[kBatch];
          const Element* from[kBatch];
          bool valid[kBatch];
#pragma unroll
          for (int j = 0; j < kBatch; ++j) {
            const int c = Map::column(thread, pass + j);
            const Column& column = shared_.columns[c];
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
  using Map = ElementMap<Slab, kThreads>;
  // Outside whatever is added: rows past the edge have it in one dim, columns in another.
  static constexpr uint32_t kNowhere = 0x80000000u;

  __device__ __forceinline__ bool inside(const Row& row, const Column& column) const {
    return row.corner[0] + column.delta[0] < static_cast<uint32_t>(x_.size[0]) &&
           row.corner[1] + column.delta[1] < static_cast<uint32_t>(x_.size[1]) &&
           row.corner[2] + column.delta[2] < static_cast<uint32_t>(x_.size[2]);
  }

  const ContractParams& params_;
  const ContractOperand& x_;
  Shared& shared_;
  const ContractBlock& block_;
  const void* const& data_;
  const int& column0_;
};

}  // namespace backpack_cuda::cuda
