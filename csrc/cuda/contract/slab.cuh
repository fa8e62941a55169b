// One operand's share of a pipeline stage in shared memory: kRows positions of kColumns channels.
#pragma once

#include "cuda/contract/contract_params.h"

namespace backpack_cuda::cuda {

// Row-major (a row is a position), or column-major where kAlongT. The padding keeps all accesses free of bank
// conflicts: with 8 elements per row, fragments read 16 bytes at float32 banks 8 t + column, and 2-byte rows
// of one 8x8 matrix begin 16 bytes apart mod 128; with 16 bytes per column, float32 banks are 20 column + t,
// and 2-byte columns of one matrix begin 80 bytes apart.
template <class Element_, int kRows_, int kColumns_, bool kAlongT_>
struct Slab {
  using Element = Element_;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kDepth = kRows / 2;  // kDepth: of one mma
  static constexpr bool kAlongT = kAlongT_;
  static constexpr int kStride = kAlongT ? kRows + 16 / static_cast<int>(sizeof(Element)) : kColumns + 8;
  static constexpr int kElements = kStride * (kAlongT ? kColumns : kRows);

  static __device__ __forceinline__ constexpr int at(int row, int column) {
    return kAlongT ? column * kStride + row : row * kStride + column;
  }
};

// Where a sample of an operand begins, in elements.
template <bool kColumns>
__device__ __forceinline__ int64_t sample_offset(const ContractParams& params, const ContractOperand& x,
                                                 int sample) {
  if constexpr (!kColumns) return sample * x.stride_n;
  const unsigned V = params.V, n = static_cast<unsigned>(sample) / V;
  return n * x.stride_n + (static_cast<unsigned>(sample) - n * V) * x.stride_v;
}

// What a block works on. Kept in shared memory, because registers are scarce: at 128x128 the accumulators and
// two more tiles take 192 of 255.
struct ContractBlock {
  int n_begin, n_end, t_begin, t_end;  // samples and positions
  int group, row, column;              // first row and column of the tile in its group
  const void *a, *b;                   // the group's operands
};

// Where a slab begins. Its rows are the positions t0, t0 + 1, ... of sample n; with packed samples its first
// half belongs to sample n and its second half to sample n + 1.
struct SlabBegin {
  int n, t0;

  template <int kRows>
  __device__ __forceinline__ void advance(const ContractBlock& block, bool packed) {
    t0 += kRows;
    if (packed || t0 >= block.t_end) {
      t0 = block.t_begin;
      n += packed ? 2 : 1;
    }
  }
};

// The sample and position of one row. Rows past the block's share are to be zero.
template <class Slab>
struct SlabRow {
  int n, t;
  bool valid;
  __device__ __forceinline__ SlabRow(const SlabBegin& begin, int row, const ContractBlock& block,
                                     bool packed) {
    const bool second = packed && row >= Slab::kDepth;
    n = begin.n + second;
    t = begin.t0 + row - (second ? Slab::kDepth : 0);
    valid = n < block.n_end && t < block.t_end;
  }
};

}  // namespace backpack_cuda::cuda
