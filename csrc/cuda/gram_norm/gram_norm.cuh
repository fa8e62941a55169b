// The gram_norm kernel. A block forms one tile of each of the two Gram matrices in registers, one after the
// other: rows p and rows q of one sample, contracted over the columns. Slabs of 128 bytes per row stream
// through a ring in shared memory, those of `b` right behind those of `a`. Both operands of these products
// lie with the contracted index along the row, as the fragments of mma.sync want them: ldmatrix without
// transposition serves all element types, since a fragment of TF32 has the bytes of one of 16-bit elements.
//
// The tensor cores truncate their sums. Sums here are of squares on the diagonal, and thousands of
// truncations downwards would show: every step of at most 64 bytes of columns starts at zero, and is added
// outside of the tensor cores, rounding to nearest.
#pragma once

#include <type_traits>

#include "cuda/common/cuda_check.h"
#include "cuda/common/ptx.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/gram_norm/gram_norm.h"

namespace backpack_cuda::cuda {

constexpr int kGramSlabBytes = 128;               // of one row
constexpr int kGramChunks = kGramSlabBytes / 16;  // of one row of a slab
constexpr int kGramSteps = kGramSlabBytes / 32;   // mma steps per slab, for every element type
constexpr int kGramSumThreads = 256;

// How rows reach shared memory.
struct GramRows {
  const void* data;
  int64_t stride_n, stride_t, stride_c;
  int columns;
  int copy;         // bytes: 16, 4, or 0 for single elements
  bool along_rows;  // single elements: adjacent threads read adjacent rows, not columns
};

struct GramJob {
  GramRows x[2];  // a and b
  int64_t N;
  int T, slot, pairs;
  int slabs[2];  // of the columns of a and of b
  int splits;
  int64_t stage_bytes;
  float* norms;   // [N, pairs]; the results themselves if pairs is 1
  float4* parts;  // [units, splits, 2, kGroups, threads], if splits > 1
};

// The pair p <= q of row blocks: (0,0) (0,1) (1,1) (0,2) ...
struct GramPair {
  int p, q;
  __device__ __forceinline__ explicit GramPair(int index)
      : q(static_cast<int>((sqrtf(8.f * static_cast<float>(index) + 1.f) - 1.f) * 0.5f)) {
    while (first(q + 1) <= index) ++q;  // the square root is rounded
    while (first(q) > index) --q;
    p = static_cast<int>(index - first(q));
  }
  static __device__ __forceinline__ int64_t first(int64_t q) { return q * (q + 1) / 2; }
};

// kTerms: 3 for float32-accurate products of float, else 1. Each warp owns kWarpRows x kWarpColumns.
template <class Element_, int kTerms_, int kTile_, int kWarpRows, int kWarpColumns, int kStages_,
          int kMinBlocks_>
struct GramTile {
  using Element = Element_;
  static constexpr int kTerms = kTerms_, kTile = kTile_, kStages = kStages_, kMinBlocks = kMinBlocks_;
  static constexpr int kWarpsAcross = kTile / kWarpColumns, kWarps = kTile / kWarpRows * kWarpsAcross;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kM = kWarpRows / 16, kN = kWarpColumns / 8;
  static constexpr int kSlab = kGramSlabBytes / sizeof(Element);  // columns
  static constexpr int kChain = kTerms == 3 ? 1 : 2;              // mma steps between additions outside
  using Products = float[kM][kN][4];
  using Offsets = int64_t[2][2 * kTile];  // of the rows p and q, in a and in b; -1: no such row

  // Chunks are swapped around within a row so that eight rows' chunks lie in different banks.
  static __device__ __forceinline__ int place(int row, int chunk) {
    return row * kGramSlabBytes + (chunk ^ row % kGramChunks) * 16;
  }

  // ---- from global to shared memory: kTile rows, one slab of columns from `column` on; zeros elsewhere ----

  template <int kBytes>
  static __device__ __forceinline__ void copy_pieces(const GramRows& x, const int64_t* offsets, char* slab,
                                                     int column) {
    constexpr int kPieces = kGramSlabBytes / kBytes, kElements = kBytes / int(sizeof(Element));
#pragma unroll 2
    for (int index = 0; index < kTile * kPieces; index += kThreads) {
      const int row = (index + static_cast<int>(threadIdx.x)) / kPieces;
      const int piece = threadIdx.x % kPieces, first = column + piece * kElements;
      const int64_t offset = offsets[row];
      // A piece is inside or outside as a whole: the plan sees to it, as copies in part cost more.
      const bool valid = offset >= 0 && first < x.columns;
      const Element* from = static_cast<const Element*>(x.data) + (valid ? offset + first : 0);
      char* to = slab + place(row, piece * kBytes / 16) + piece * kBytes % 16;
      cp_async<kBytes>(to, from, valid ? kBytes : 0);
    }
  }

  static __device__ __forceinline__ void copy_elements(const GramRows& x, const int64_t* offsets, char* slab,
                                                       int column) {
    constexpr int kBatch = 4;  // loads in flight; cp.async does not copy 2 bytes
    static_assert(kTile * kSlab % (kBatch * kThreads) == 0);
#pragma unroll 1
    for (int index = threadIdx.x; index < kTile * kSlab; index += kBatch * kThreads) {
      Element values[kBatch];
      Element* to[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int e = index + j * kThreads;
        const int row = x.along_rows ? e % kTile : e / kSlab, c = x.along_rows ? e / kTile : e % kSlab;
        const int64_t offset = offsets[row];
        const bool valid = offset >= 0 && column + c < x.columns;
        const Element* from =
            static_cast<const Element*>(x.data) + (valid ? offset + (column + c) * x.stride_c : 0);
        const int byte = c * int(sizeof(Element));
        to[j] = reinterpret_cast<Element*>(slab + place(row, byte / 16) + byte % 16);
        if constexpr (sizeof(Element) == 4) {
          cp_async<4>(to[j], from, valid ? 4 : 0);
        } else {
          values[j] = valid ? __ldg(from) : Element(0.f);
        }
      }
      if constexpr (sizeof(Element) != 4) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) *to[j] = values[j];
      }
    }
  }

  static __device__ __forceinline__ void copy_rows(const GramRows& x, const int64_t* offsets, char* slab,
                                                   int column) {
    if (x.copy == 16) {
      copy_pieces<16>(x, offsets, slab, column);
    } else if (sizeof(Element) == 2 && x.copy == 4) {
      copy_pieces<4>(x, offsets, slab, column);
    } else {
      copy_elements(x, offsets, slab, column);
    }
  }

  // ---- products ----

  static __device__ __forceinline__ void split(uint32_t (&hi)[4], uint32_t (&lo)[4]) {
    if constexpr (sizeof(Element) == 4) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if constexpr (kTerms == 1) {
          hi[r] = to_tf32(__uint_as_float(hi[r]));
        } else {
          const Tf32Split parts(__uint_as_float(hi[r]));
          hi[r] = parts.hi;
          lo[r] = parts.lo;
        }
      }
    }
  }

  // products += p q^T, for the rows p and q of this warp in one slab.
  static __device__ __forceinline__ void multiply(Products& products, const char* slab_p, const char* slab_q,
                                                  int lane) {
#pragma unroll
    for (int k = 0; k < kGramSteps; k += kChain) {
      uint32_t p_hi[kChain][kM][4], p_lo[kChain][kM][4];
#pragma unroll
      for (int c = 0; c < kChain; ++c) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          ldmatrix_x4<false>(p_hi[c][m], slab_p + place(16 * m + lane % 16, 2 * (k + c) + lane / 16));
          split(p_hi[c][m], p_lo[c][m]);
        }
      }
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        uint32_t q_hi[kChain][4], q_lo[kChain][4];  // of eight rows, then of eight more
#pragma unroll
        for (int c = 0; c < kChain; ++c) {
          ldmatrix_x4<false>(q_hi[c],
                             slab_q + place(8 * n + lane % 8 + lane / 16 * 8, 2 * (k + c) + lane / 8 % 2));
          split(q_hi[c], q_lo[c]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            float(&sum)[4] = products[m][n + h];
            if constexpr (kTerms == 3) {
              const uint32_t hi[2] = {q_hi[0][2 * h], q_hi[0][2 * h + 1]};
              const uint32_t lo[2] = {q_lo[0][2 * h], q_lo[0][2 * h + 1]};
              mma_tf32x3(sum, p_hi[0][m], p_lo[0][m], hi, lo);
            } else {
              float step[4] = {};
#pragma unroll
              for (int c = 0; c < kChain; ++c) {
                const uint32_t hi[2] = {q_hi[c][2 * h], q_hi[c][2 * h + 1]};
                if constexpr (sizeof(Element) == 4) {
                  mma_tf32(step, p_hi[c][m], hi);
                } else {
                  mma_half<Element>(step, p_hi[c][m], hi);
                }
              }
#pragma unroll
              for (int r = 0; r < 4; ++r) sum[r] += step[r];
            }
          }
        }
      }
    }
  }

  // ---- from Gram matrices to norms ----

  // Off the diagonal a pair stands for its mirror image too.
  static __device__ __forceinline__ void store(const GramJob& job, int64_t n, int pair, float norm) {
    const GramPair blocks(pair);
    norm *= blocks.p == blocks.q ? 1.f : 2.f;
    if (job.pairs == 1) norm = norm < 0 ? 0.f : norm;  // rounding; NaN stays
    job.norms[n * job.pairs + pair] = norm;
  }

  // Sums over the samples' squares of the elementwise product. Rows and columns that do not exist hold zeros.
  static __device__ __forceinline__ void finish(const GramJob& job, int64_t unit, const Products& gram_a,
                                                const Products& gram_b) {
    const int pair = static_cast<int>(unit % job.pairs);
    const int64_t group = unit / job.pairs;
    if constexpr (kTile == 32) {  // several samples may share the tile
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
      KERNEL_SHARED(row_sums, float[kTile][kWarpsAcross]);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = warp / kWarpsAcross * kWarpRows + 16 * m + lane / 4 + 8 * half;
          float sum = 0;
#pragma unroll
          for (int n = 0; n < kN; ++n) {
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int column = warp % kWarpsAcross * kWarpColumns + 8 * n + lane % 4 * 2 + c,
                        r = 2 * half + c;
              const bool same_sample = (row ^ column) < job.slot;  // slots are powers of two
              sum = same_sample ? fmaf(gram_a[m][n][r], gram_b[m][n][r], sum) : sum;
            }
          }
          sum += __shfl_xor_sync(0xffffffffu, sum, 1);
          sum += __shfl_xor_sync(0xffffffffu, sum, 2);
          if (lane % 4 == 0) row_sums[row][warp % kWarpsAcross] = sum;
        }
      }
      __syncthreads();  // all row sums are there
      if (warp != 0) return;
      float norm = 0;
#pragma unroll
      for (int w = 0; w < kWarpsAcross; ++w) norm += row_sums[lane][w];
      for (int rows = 1; rows < job.slot; rows *= 2) norm += __shfl_xor_sync(0xffffffffu, norm, rows);
      const int64_t n = group * (kTile / job.slot) + lane / job.slot;
      if (lane % job.slot == 0 && n < job.N) store(job, n, pair, norm);
    } else {
      float sums[4] = {};
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kN; ++n) {
#pragma unroll
          for (int r = 0; r < 4; ++r) sums[r] = fmaf(gram_a[m][n][r], gram_b[m][n][r], sums[r]);
        }
      }
      float norm[1] = {(sums[0] + sums[1]) + (sums[2] + sums[3])};
      sum_over_threads<kThreads>(norm);
      if (threadIdx.x == 0) store(job, group, pair, norm[0]);
    }
  }

  // This thread's share of one split's part of a Gram matrix.
  static __device__ __forceinline__ float4* part(const GramJob& job, int64_t unit, int split, int operand) {
    return job.parts + ((unit * job.splits + split) * 2 + operand) * (kM * kN * kThreads) + threadIdx.x;
  }
};

// Grid (units, splits): split s owns a range of the slabs of a and b.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    gram_norm_kernel(const __grid_constant__ GramJob job) {
  constexpr int kTile = Tile::kTile, kStages = Tile::kStages;
  KERNEL_DYNAMIC_SHARED(char, stages);
  KERNEL_SHARED(offsets, typename Tile::Offsets);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t unit = blockIdx.x;
  const GramPair pair(static_cast<int>(unit % job.pairs));
  const int rows = pair.p == pair.q ? kTile : 2 * kTile;  // on the diagonal p and q are the same

  const int64_t first_sample = unit / job.pairs * (kTile / job.slot);
  for (int index = threadIdx.x; index < 4 * kTile; index += Tile::kThreads) {
    const int row = index % kTile, block = index / kTile % 2, operand = index / (2 * kTile);
    const int64_t n = first_sample + row / job.slot;
    const int64_t t = row % job.slot + int64_t{block ? pair.q : pair.p} * kTile;
    const GramRows& x = job.x[operand];
    offsets[operand][block * kTile + row] = n < job.N && t < job.T ? n * x.stride_n + t * x.stride_t : -1;
  }
  __syncthreads();  // all offsets are there

  const int slabs = job.slabs[0] + job.slabs[1];
  const int begin = static_cast<int>(int64_t{slabs} * blockIdx.y / job.splits);
  const int end = static_cast<int>(int64_t{slabs} * (blockIdx.y + 1) / job.splits);
  int load_slab = begin, load_stage = 0;
  const auto load_next = [&] {
    if (load_slab < end) {
      const int operand = load_slab >= job.slabs[0];
      const GramRows& x = job.x[operand];
      const int column = (load_slab - (operand ? job.slabs[0] : 0)) * Tile::kSlab;
      char* const slab = stages + load_stage * job.stage_bytes;
#pragma unroll 1  // fewer addresses alive
      for (int row = 0; row < rows; row += kTile) {
        Tile::copy_rows(x, offsets[operand] + row, slab + row * kGramSlabBytes, column);
      }
      ++load_slab;
      load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    }
    cp_async_commit();  // past the end too: the waits count groups
  };
#pragma unroll 1
  for (int s = 0; s < kStages - 1; ++s) load_next();

  const int warp_p = warp / Tile::kWarpsAcross * (16 * Tile::kM);
  const int warp_q = rows - kTile + warp % Tile::kWarpsAcross * (8 * Tile::kN);
  typename Tile::Products gram_a = {}, gram = {};
  const auto keep_a = [&] {  // what follows belongs to b
#pragma unroll
    for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
      for (int n = 0; n < Tile::kN; ++n) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          gram_a[m][n][r] = gram[m][n][r];
          gram[m][n][r] = 0;
        }
      }
    }
  };
  int stage = 0;
#pragma unroll 1
  for (int slab = begin; slab < end; ++slab) {
    if (slab == job.slabs[0]) keep_a();
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this slab is there for all threads, and all have left the one that is refilled now
    load_next();
    const char* const from = stages + stage * job.stage_bytes;
    Tile::multiply(gram, from + warp_p * kGramSlabBytes, from + warp_q * kGramSlabBytes, lane);
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  if (end <= job.slabs[0]) keep_a();

  if (job.splits == 1) {
    Tile::finish(job, unit, gram_a, gram);
    return;
  }
  float4* const part_a = Tile::part(job, unit, blockIdx.y, 0);
  float4* const part_b = Tile::part(job, unit, blockIdx.y, 1);
#pragma unroll
  for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
    for (int n = 0; n < Tile::kN; ++n) {
      const float(&a)[4] = gram_a[m][n], (&b)[4] = gram[m][n];
      part_a[(m * Tile::kN + n) * Tile::kThreads] = make_float4(a[0], a[1], a[2], a[3]);
      part_b[(m * Tile::kN + n) * Tile::kThreads] = make_float4(b[0], b[1], b[2], b[3]);
    }
  }
}

// Second pass of split units: the whole Gram matrices, then their norms. Grid (units).
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads) gram_merge_kernel(const __grid_constant__ GramJob job) {
  typename Tile::Products grams[2] = {};
#pragma unroll
  for (int operand = 0; operand < 2; ++operand) {
#pragma unroll 1
    for (int split = 0; split < job.splits; ++split) {
      const float4* const part = Tile::part(job, blockIdx.x, split, operand);
#pragma unroll
      for (int m = 0; m < Tile::kM; ++m) {
#pragma unroll
        for (int n = 0; n < Tile::kN; ++n) {
          const float4 x = part[(m * Tile::kN + n) * Tile::kThreads];
          float(&sum)[4] = grams[operand][m][n];
          sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
        }
      }
    }
  }
  Tile::finish(job, blockIdx.x, grams[0], grams[1]);
}

// out[n] = sum over the pairs, at least 0. A warp per sample.
static __global__ void __launch_bounds__(kGramSumThreads)
    gram_sum_kernel(const float* __restrict__ norms,  // [N, pairs]
                    float* __restrict__ out,          // [N]
                    int64_t N, int pairs) {
  constexpr int kSamples = kGramSumThreads / 32;
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t{gridDim.x} * kSamples;
  for (int64_t n = int64_t{blockIdx.x} * kSamples + threadIdx.x / 32; n < N; n += step) {
    float total[1] = {};
#pragma unroll 4
    for (int pair = lane; pair < pairs; pair += 32) total[0] += norms[n * pairs + pair];
    sum_over_threads<32>(total);
    if (lane == 0) out[n] = total[0] < 0 ? 0.f : total[0];  // NaN stays
  }
}

template <class Tile>
void launch_gram_tile(const GramNormParams& params, const GramNormPlan& plan, void* workspace,
                      cudaStream_t stream) {
  const auto rows = [&](const GramOperand& x, int columns, int copy) {
    const int64_t row_stride = params.T > 1 ? x.stride_t : x.stride_n;
    return GramRows{x.data, x.stride_n, x.stride_t, x.stride_c, columns, copy, row_stride < x.stride_c};
  };
  char* const bytes = static_cast<char*>(workspace);
  GramJob job{};
  job.x[0] = rows(params.a, params.I, plan.copy_a);
  job.x[1] = rows(params.b, params.O, plan.copy_b);
  job.N = params.N;
  job.T = params.T;
  job.slot = plan.slot;
  job.pairs = plan.pairs;
  for (int operand = 0; operand < 2; ++operand) {
    job.slabs[operand] = (job.x[operand].columns + Tile::kSlab - 1) / Tile::kSlab;
  }
  job.splits = plan.splits;
  job.stage_bytes = (plan.pairs == 1 ? 1 : 2) * Tile::kTile * kGramSlabBytes;
  job.norms = plan.pairs == 1 ? params.out : reinterpret_cast<float*>(bytes + plan.norms_at);
  job.parts = reinterpret_cast<float4*>(bytes + plan.parts_at);

  const auto kernel = &gram_norm_kernel<Tile>;
  const size_t shared_bytes = Tile::kStages * job.stage_bytes;
  check(allow_dynamic_shared(kernel, shared_bytes), "gram_norm");
  const unsigned units = static_cast<unsigned>(plan.units);
  KERNEL_LAUNCH(dim3(units, static_cast<unsigned>(plan.splits)), dim3(Tile::kThreads), shared_bytes, stream,
                kernel, job);
  check(cudaGetLastError(), "gram_norm");
  if (plan.splits > 1) {
    const auto merge_kernel = &gram_merge_kernel<Tile>;
    KERNEL_LAUNCH(dim3(units), dim3(Tile::kThreads), 0, stream, merge_kernel, job);
    check(cudaGetLastError(), "gram_norm, merging");
  }
  if (plan.pairs > 1) {
    constexpr int64_t kMaxBlocks = 1 << 16;
    const int64_t wanted = (params.N + kGramSumThreads / 32 - 1) / (kGramSumThreads / 32);
    const auto blocks = static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
    KERNEL_LAUNCH(dim3(blocks), dim3(kGramSumThreads), 0, stream, gram_sum_kernel, job.norms, params.out,
                  params.N, plan.pairs);
    check(cudaGetLastError(), "gram_norm, sums");
  }
}

// Blocks per multiprocessor, the last argument, go with the plan's.
template <class Element, int kTerms>
void launch_gram_norm(const GramNormParams& params, const GramNormPlan& plan, void* workspace,
                      cudaStream_t stream) {
  if (plan.tile == 32) {
    launch_gram_tile<GramTile<Element, kTerms, 32, 16, 16, 6, 6>>(params, plan, workspace, stream);
  } else if (plan.tile == 64) {
    launch_gram_tile<GramTile<Element, kTerms, 64, 32, 32, 4, 3>>(params, plan, workspace, stream);
  } else {
    launch_gram_tile<GramTile<Element, kTerms, 128, 32, 64, 4, 1>>(params, plan, workspace, stream);
  }
}

}  // namespace backpack_cuda::cuda
