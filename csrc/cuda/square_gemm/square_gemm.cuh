// The square_gemm kernel. A block owns a tile of the result and a range of the samples. Slabs of samples
// [rows, tile] of both operands stream through a ring in shared memory, and feed two accumulator tiles, b^T a
// and (b * b)^T (a * a).
//
// The contracted index runs down the columns of both slabs, which mma.sync wants along rows. Since the order
// of the contracted index, of the rows and of the columns does not matter as long as it is one order, every
// lane loads four adjacent columns of its own rows at once, which become the same column of four fragments:
// value v of lane group g is element 4 g + v of 32. With slabs 32 bytes wider than the tile these loads meet
// no bank conflicts. Pairs of 16-bit elements for native products come from two rows of the same lane.
//
// The tensor cores truncate their sums. Sums of squares only grow, and thousands of truncations downwards
// would show: every step of 16 samples (8 with three terms) starts at zero, and is added outside of the
// tensor cores, rounding to nearest.
//
// Own fragments instead of those of `contract`, which form one product: here 16-bit elements give native and
// TF32 fragments from one load, and squares are taken between load and rounding.
#pragma once

#include <type_traits>

#include "cuda/common/cuda_check.h"
#include "cuda/common/ptx.cuh"
#include "cuda/square_gemm/square_gemm.h"

namespace backpack_cuda::cuda {

constexpr int kSquareMergeThreads = 256;
constexpr int kSquareDeviationRows = 8;  // outputs per thread where elements are computed anew
constexpr float kSquareCancelled = -1;   // in place of a centered sum that has to be computed anew

// How rows reach shared memory.
struct SquareRows {
  const void* data;  // [N, columns]
  int64_t stride_n, stride_c;
  int columns;
  int copy;         // bytes: 16, 4, or 0 for single elements
  bool along_rows;  // single elements: adjacent threads read adjacent samples, not columns
};

struct SquareJob {
  SquareRows x[2];  // a and b
  int64_t N;
  int O, I, tiles_i, slabs, splits;
  bool vector_store;
  float smallest_share;             // of the squares that may be left after centering
  float *squares_part, *sums_part;  // [splits, O, I] if splits > 1
  // Results, or null.
  void* grad;       // [O, I]
  float* squares;   // [O, I]
  float* centered;  // [O, I]
};

// kCount adjacent values.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) SquareVector {
  T values[kCount];
};
template <class T, int kCount>
__device__ __forceinline__ void store_vector(void* to, int64_t at, const float (&x)[kCount]) {
  SquareVector<T, kCount> vector;
#pragma unroll
  for (int j = 0; j < kCount; ++j) vector.values[j] = static_cast<T>(x[j]);
  *reinterpret_cast<SquareVector<T, kCount>*>(static_cast<T*>(to) + at) = vector;
}

// The results of kCount adjacent elements from their sums over all samples.
template <class Element, int kCount>
__device__ __forceinline__ void store_results(const SquareJob& job, int64_t at, const float (&sum)[kCount],
                                              const float (&square)[kCount]) {
  if (job.grad) store_vector<Element>(job.grad, at, sum);
  if (job.squares) store_vector<float>(job.squares, at, square);
  if (job.centered) {
    const float inverse_N = 1.f / static_cast<float>(job.N);
    float centered[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const float left = fmaf(-sum[j] * inverse_N, sum[j], square[j]);
      centered[j] = left < job.smallest_share * square[j] ? kSquareCancelled : left;  // NaN stays
    }
    store_vector<float>(job.centered, at, centered);
  }
}

// kTerms: 3 for float32-accurate products of float, else 1. kSums: forms the gradient too. Warps own 32 rows
// o and kWarpColumns columns i.
template <class Element_, int kTerms_, bool kSums_, int kTile_, int kWarpColumns_, int kMinBlocks_>
struct SquareTile {
  using Element = Element_;
  static constexpr int kTerms = kTerms_, kTile = kTile_, kWarpColumns = kWarpColumns_,
                       kMinBlocks = kMinBlocks_;
  static constexpr bool kSums = kSums_, kFloat = sizeof(Element) == 4;
  static constexpr int kWarpsAcross = kTile / kWarpColumns, kWarps = kTile / 32 * kWarpsAcross;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kM = 2, kN = kWarpColumns / 8;
  static constexpr int kRows = kFloat ? 16 : 32;      // samples per slab
  static constexpr int kStages = 4;                   // up to 104 KB for 128 x 128, 55 KB for 64 x 64
  static constexpr int kStep = kTerms == 3 ? 8 : 16;  // samples between additions outside
  static constexpr int kStride = kTile + 32 / sizeof(Element);  // of a slab's rows
  static constexpr int kSlab = kRows * kStride;                 // elements
  using Sums = float[kM][kN][4];
  struct Shared {
    alignas(16) Element slabs[kStages][2][kSlab];  // of a and of b
  };

  // ---- from global to shared memory: kRows samples from n on, kTile columns from `column` on; zeros
  // elsewhere

  template <int kBytes>
  static __device__ __forceinline__ void copy_pieces(const SquareRows& x, int64_t N, Element* slab, int64_t n,
                                                     int column) {
    constexpr int kElements = kBytes / int(sizeof(Element)), kPieces = kTile / kElements;
    const int piece = threadIdx.x % kPieces, first = column + piece * kElements;
    const bool inside = first < x.columns;  // wholly: the plan sees to it, as copies in part cost more
#pragma unroll 2
    for (int index = 0; index < kRows * kPieces; index += kThreads) {
      const int row = (index + static_cast<int>(threadIdx.x)) / kPieces;
      const bool valid = n + row < N && inside;
      const Element* from =
          static_cast<const Element*>(x.data) + (valid ? (n + row) * x.stride_n + first : 0);
      cp_async<kBytes>(slab + row * kStride + piece * kElements, from, valid ? kBytes : 0);
    }
  }

  static __device__ __forceinline__ void copy_elements(const SquareRows& x, int64_t N, Element* slab,
                                                       int64_t n, int column) {
    constexpr int kBatch = kFloat ? 2 : 4;  // loads in flight; cp.async does not copy 2 bytes
    static_assert(kTile * kRows % (kBatch * kThreads) == 0);
#pragma unroll 1
    for (int index = threadIdx.x; index < kTile * kRows; index += kBatch * kThreads) {
      Element values[kBatch];
      Element* to[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int e = index + j * kThreads;
        const int row = x.along_rows ? e % kRows : e / kTile, c = x.along_rows ? e / kRows : e % kTile;
        const bool valid = n + row < N && column + c < x.columns;
        const Element* from = static_cast<const Element*>(x.data) +
                              (valid ? (n + row) * x.stride_n + (column + c) * x.stride_c : 0);
        to[j] = slab + row * kStride + c;
        if constexpr (kFloat) {
          cp_async<4>(to[j], from, valid ? 4 : 0);
        } else {
          values[j] = valid ? __ldg(from) : Element(0.f);
        }
      }
      if constexpr (!kFloat) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) *to[j] = values[j];
      }
    }
  }

  static __device__ __forceinline__ void copy_rows(const SquareRows& x, int64_t N, Element* slab, int64_t n,
                                                   int column) {
    if (x.copy == 16) {
      copy_pieces<16>(x, N, slab, n, column);
    } else if (!kFloat && x.copy == 4) {
      copy_pieces<4>(x, N, slab, n, column);
    } else {
      copy_elements(x, N, slab, n, column);
    }
  }

  // ---- fragments ----

  // The row of o and the column of i within the warp's tile of accumulator [m][n][2 r + c].
  static __device__ __forceinline__ int row(int lane, int m, int r) { return lane / 4 * 4 + 2 * m + r; }
  static __device__ __forceinline__ int column(int lane, int n, int c) {
    return n / 4 * 32 + (lane % 4 * 2 + c) * 4 + n % 4;
  }

  using Four = SquareVector<Element, 4>;  // adjacent columns
  // This lane's columns of one sample; `slab` is that of the first sample of a step, at the warp's columns.
  static __device__ __forceinline__ Four load(const Element* slab, int lane, int j, int block) {
    return *reinterpret_cast<const Four*>(slab + (lane % 4 + 4 * j) * kStride + 32 * block + lane / 4 * 4);
  }

  template <bool kSquare>
  static __device__ __forceinline__ float value(Element x) {
    const float y = static_cast<float>(x);
    return kSquare ? y * y : y;
  }
  template <bool kSquare>
  static __device__ __forceinline__ uint32_t tf32(Element x) {
    return to_tf32(value<kSquare>(x));
  }

  // The same columns of two samples in one register each, for native products of 16-bit elements.
  static __device__ __forceinline__ void pairs_of(uint32_t (&pairs)[4], const Four& low, const Four& high) {
    const uint2 x = *reinterpret_cast<const uint2*>(&low), y = *reinterpret_cast<const uint2*>(&high);
    pairs[0] = (x.x & 0xffffu) | y.x << 16;
    pairs[1] = x.x >> 16 | (y.x & 0xffff0000u);
    pairs[2] = (x.y & 0xffffu) | y.y << 16;
    pairs[3] = x.y >> 16 | (y.y & 0xffff0000u);
  }

  static __device__ __forceinline__ void add(float (&sum)[4], const float (&step)[4]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) sum[r] += step[r];
  }

  // ---- products of kStep samples ----

  // float: one of the two sums at a time. Fragments of both would not fit into the registers; shared memory
  // has time for the second load.
  template <bool kSquare>
  static __device__ __forceinline__ void multiply_floats(Sums& sums, const Element* slab_b,
                                                         const Element* slab_a, int lane) {
    constexpr int kEights = kStep / 8;  // mma steps
    uint32_t b_hi[kEights][kM][4], b_lo[kEights][kM][4];
#pragma unroll
    for (int j = 0; j < 2 * kEights; ++j) {
      const Four x = load(slab_b, lane, j, 0);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const Tf32Split split(value<kSquare>(x.values[v]));
        b_hi[j / 2][v / 2][v % 2 + j % 2 * 2] = split.hi;
        b_lo[j / 2][v / 2][v % 2 + j % 2 * 2] = split.lo;
      }
    }
#pragma unroll
    for (int block = 0; block < kN / 4; ++block) {
      uint32_t a_hi[kEights][4][2], a_lo[kEights][4][2];
#pragma unroll
      for (int j = 0; j < 2 * kEights; ++j) {
        const Four x = load(slab_a, lane, j, block);
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const Tf32Split split(value<kSquare>(x.values[v]));
          a_hi[j / 2][v][j % 2] = split.hi;
          a_lo[j / 2][v][j % 2] = split.lo;
        }
      }
#pragma unroll
      for (int v = 0; v < 4; ++v) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          float(&sum)[4] = sums[m][4 * block + v];
          if constexpr (kTerms == 3) {
            mma_tf32x3(sum, b_hi[0][m], b_lo[0][m], a_hi[0][v], a_lo[0][v]);
          } else {
            float step[4] = {};
#pragma unroll
            for (int k = 0; k < kEights; ++k) mma_tf32(step, b_hi[k][m], a_hi[k][v]);
            add(sum, step);
          }
        }
      }
    }
  }

  // 16-bit elements: native products for the gradient, TF32 ones for the squares.
  static __device__ __forceinline__ void multiply_halves(Sums& sums, Sums& squares, const Element* slab_b,
                                                         const Element* slab_a, int lane) {
    uint32_t b_pair[2][4], b_square[2][kM][4];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const Four low = load(slab_b, lane, 2 * k, 0), high = load(slab_b, lane, 2 * k + 1, 0);
      pairs_of(b_pair[k], low, high);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        b_square[k][v / 2][v % 2] = tf32<true>(low.values[v]);
        b_square[k][v / 2][v % 2 + 2] = tf32<true>(high.values[v]);
      }
    }
#pragma unroll
    for (int block = 0; block < kN / 4; ++block) {
      uint32_t a_pair[2][4];
      Four x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = load(slab_a, lane, j, block);
#pragma unroll
      for (int k = 0; k < 2; ++k) pairs_of(a_pair[k], x[2 * k], x[2 * k + 1]);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const uint32_t a_square[2][2] = {{tf32<true>(x[0].values[v]), tf32<true>(x[1].values[v])},
                                         {tf32<true>(x[2].values[v]), tf32<true>(x[3].values[v])}};
        const uint32_t a[2] = {a_pair[0][v], a_pair[1][v]};
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          float step[4] = {};
          mma_tf32(step, b_square[0][m], a_square[0]);
          mma_tf32(step, b_square[1][m], a_square[1]);
          add(squares[m][4 * block + v], step);
          if constexpr (kSums) {
            const uint32_t b[4] = {b_pair[0][2 * m], b_pair[0][2 * m + 1], b_pair[1][2 * m],
                                   b_pair[1][2 * m + 1]};
            float sum_step[4] = {};
            mma_half<Element>(sum_step, b, a);
            add(sums[m][4 * block + v], sum_step);
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void multiply_slab(Sums& sums, Sums& squares, const Element* slab_b,
                                                       const Element* slab_a, int lane) {
#pragma unroll 1  // unrolled, fragments of two steps would be alive
    for (int k = 0; k < kRows; k += kStep) {
      const Element *b = slab_b + k * kStride, *a = slab_a + k * kStride;
      if constexpr (kFloat) {
        if constexpr (kSums) multiply_floats<false>(sums, b, a, lane);
        multiply_floats<true>(squares, b, a, lane);
      } else {
        multiply_halves(sums, squares, b, a, lane);
      }
    }
  }

  // ---- results ----

  template <int kCount>
  static __device__ __forceinline__ void store(const SquareJob& job, int64_t at, const float (&sum)[kCount],
                                               const float (&square)[kCount]) {
    if (job.splits == 1) {
      store_results<Element>(job, at, sum, square);
    } else {
      const int64_t part = int64_t{blockIdx.y} * job.O * job.I + at;
      store_vector<float>(job.squares_part, part, square);
      if constexpr (kSums) store_vector<float>(job.sums_part, part, sum);
    }
  }

  // o and i: the first of this warp's tile.
  static __device__ __forceinline__ void finish(const SquareJob& job, const Sums& sums, const Sums& squares,
                                                int o, int i, int lane) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t output = o + row(lane, m, r);
        if (output >= job.O) continue;
#pragma unroll
        for (int n = 0; n < kN; n += 4) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int64_t input = i + column(lane, n, c), at = output * job.I + input;
            float sum[4], square[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              sum[j] = kSums ? sums[m][n + j][2 * r + c] : 0.f;
              square[j] = squares[m][n + j][2 * r + c];
            }
            if (job.vector_store) {  // then four fit or none
              if (input < job.I) store(job, at, sum, square);
            } else {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const float one_sum[1] = {sum[j]}, one_square[1] = {square[j]};
                if (input + j < job.I) store(job, at + j, one_sum, one_square);
              }
            }
          }
        }
      }
    }
  }
};

// Grid (tiles, splits), tiles of one row side by side: neighbours share their slabs of b.
template <class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kMinBlocks)
    square_gemm_kernel(const __grid_constant__ SquareJob job) {
  KERNEL_DYNAMIC_SHARED(typename Tile::Shared, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int o = static_cast<int>(blockIdx.x / job.tiles_i) * Tile::kTile;
  const int i = static_cast<int>(blockIdx.x % job.tiles_i) * Tile::kTile;
  const int warp_o = warp / Tile::kWarpsAcross * 32, warp_i = warp % Tile::kWarpsAcross * Tile::kWarpColumns;
  const int begin = static_cast<int>(int64_t{job.slabs} * blockIdx.y / job.splits);
  const int end = static_cast<int>(int64_t{job.slabs} * (blockIdx.y + 1) / job.splits);

  int load_slab = begin, load_stage = 0;
  const auto load_next = [&] {
    if (load_slab < end) {
#pragma unroll 1  // fewer addresses alive
      for (int operand = 0; operand < 2; ++operand) {
        Tile::copy_rows(job.x[operand], job.N, shared->slabs[load_stage][operand],
                        int64_t{load_slab} * Tile::kRows, operand ? o : i);
      }
      ++load_slab;
      load_stage = load_stage + 1 == Tile::kStages ? 0 : load_stage + 1;
    }
    cp_async_commit();  // past the end too: the waits count groups
  };
#pragma unroll 1
  for (int s = 0; s < Tile::kStages - 1; ++s) load_next();

  typename Tile::Sums sums = {}, squares = {};
  int stage = 0;
#pragma unroll 1
  for (int slab = begin; slab < end; ++slab) {
    cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // this slab is there for all threads, and all have left the one that is refilled now
    load_next();
    Tile::multiply_slab(sums, squares, shared->slabs[stage][1] + warp_o, shared->slabs[stage][0] + warp_i,
                        lane);
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }
  Tile::finish(job, sums, squares, o + warp_o, i + warp_i, lane);
}

// Second pass of split samples: adds the partial sums, in the order of the splits. kCount adjacent elements
// per thread.
template <class Element, int kCount>
__global__ void __launch_bounds__(kSquareMergeThreads)
    square_merge_kernel(const __grid_constant__ SquareJob job) {
  const int64_t count = int64_t{job.O} * job.I, step = int64_t{gridDim.x} * kSquareMergeThreads * kCount;
  for (int64_t at = (int64_t{blockIdx.x} * kSquareMergeThreads + threadIdx.x) * kCount; at < count;
       at += step) {
    float sum[kCount] = {}, square[kCount] = {};
#pragma unroll 4
    for (int s = 0; s < job.splits; ++s) {
      using Values = SquareVector<float, kCount>;
      const Values squares = *reinterpret_cast<const Values*>(job.squares_part + s * count + at);
#pragma unroll
      for (int j = 0; j < kCount; ++j) square[j] += squares.values[j];
      if (job.sums_part) {
        const Values sums = *reinterpret_cast<const Values*>(job.sums_part + s * count + at);
#pragma unroll
        for (int j = 0; j < kCount; ++j) sum[j] += sums.values[j];
      }
    }
    store_results<Element>(job, at, sum, square);
  }
}

// Computes centered sums anew where the difference of sums cancelled, by deviations from the mean over the
// samples: fmaf takes the mean from the exact product. A thread has one column and several rows, so that
// loads of `a` are adjacent and serve all of them; a warp without cancelled elements leaves at once.
// Grid (blocks of 32 columns x blocks of 8 warps' rows).
template <class Element>
__global__ void __launch_bounds__(kSquareMergeThreads)
    square_deviations_kernel(const __grid_constant__ SquareJob job) {
  constexpr int kRows = kSquareDeviationRows, kWarps = kSquareMergeThreads / 32;
  const int64_t blocks_i = (int64_t{job.I} + 31) / 32;
  const int64_t i = blockIdx.x % blocks_i * 32 + threadIdx.x % 32;
  const int64_t o = (blockIdx.x / blocks_i * kWarps + threadIdx.x / 32) * kRows;
  bool cancelled[kRows], any = false;
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    cancelled[k] = i < job.I && o + k < job.O && job.centered[(o + k) * job.I + i] < 0;
    any = any || cancelled[k];
  }
  if (!__any_sync(0xffffffffu, any)) return;

  const Element* const a =
      static_cast<const Element*>(job.x[0].data) + (i < job.I ? i : 0) * job.x[0].stride_c;
  const Element* b[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    b[k] = static_cast<const Element*>(job.x[1].data) + (o + k < job.O ? o + k : 0) * job.x[1].stride_c;
  }
  const float inverse_N = 1.f / static_cast<float>(job.N);
  // Sums over blocks of samples, then of the blocks: of one long sum of small terms, too much is lost.
  constexpr int kBlock = 32;
  float mean[kRows] = {}, sum[kRows] = {}, square[kRows] = {};
  for (int64_t first = 0; first < job.N; first += kBlock) {
    const int64_t end = first + kBlock < job.N ? first + kBlock : job.N;
    float part[kRows] = {};
#pragma unroll 2
    for (int64_t n = first; n < end; ++n) {
      const float x = static_cast<float>(__ldg(a + n * job.x[0].stride_n));
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        part[k] = fmaf(static_cast<float>(__ldg(b[k] + n * job.x[1].stride_n)), x, part[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) mean[k] += part[k];
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) mean[k] *= inverse_N;
  for (int64_t first = 0; first < job.N; first += kBlock) {
    const int64_t end = first + kBlock < job.N ? first + kBlock : job.N;
    float part[kRows] = {}, square_part[kRows] = {};
#pragma unroll 2
    for (int64_t n = first; n < end; ++n) {
      const float x = static_cast<float>(__ldg(a + n * job.x[0].stride_n));
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const float deviation = fmaf(static_cast<float>(__ldg(b[k] + n * job.x[1].stride_n)), x, -mean[k]);
        part[k] += deviation;
        square_part[k] = fmaf(deviation, deviation, square_part[k]);
      }
    }
#pragma unroll
    for (int k = 0; k < kRows; ++k) sum[k] += part[k], square[k] += square_part[k];
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    if (!cancelled[k]) continue;
    const float centered = fmaf(-sum[k] * inverse_N, sum[k], square[k]);  // the mean is rounded
    job.centered[(o + k) * job.I + i] = job.N == 1 || centered < 0 ? 0.f : centered;
  }
}

template <class Tile>
void launch_square_tile(const SquareJob& job, const SquareGemmPlan& plan, cudaStream_t stream) {
  const auto kernel = &square_gemm_kernel<Tile>;
  constexpr size_t kSharedBytes = sizeof(typename Tile::Shared);
  check(allow_dynamic_shared(kernel, kSharedBytes), "square_gemm");
  KERNEL_LAUNCH(dim3(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.splits)),
                dim3(Tile::kThreads), kSharedBytes, stream, kernel, job);
  check(cudaGetLastError(), "square_gemm");
}

template <class Element, int kTerms>
void launch_square_gemm(const SquareGemmParams& params, const StatsOutputs& outputs,
                        const SquareGemmPlan& plan, void* workspace, cudaStream_t stream) {
  const auto rows = [](const SquareOperand& x, int columns, int copy) {
    return SquareRows{x.data, x.stride_n, x.stride_c, columns, copy, x.stride_n < x.stride_c};
  };
  char* const bytes = static_cast<char*>(workspace);
  SquareJob job{};
  job.x[0] = rows(params.a, params.I, plan.copy_a);
  job.x[1] = rows(params.b, params.O, plan.copy_b);
  job.N = params.N;
  job.slabs = plan.slabs;
  job.O = params.O;
  job.I = params.I;
  job.tiles_i = (params.I + plan.tile - 1) / plan.tile;
  job.splits = plan.splits;
  job.vector_store = plan.vector_store;
  job.smallest_share = kTerms == 3 ? 1.f / 64 : 1.f / 4;
  if (plan.splits > 1) {
    job.squares_part = reinterpret_cast<float*>(bytes + plan.squares_at);
    if (plan.sums) job.sums_part = reinterpret_cast<float*>(bytes + plan.sums_at);
  }
  job.grad = outputs.grad;
  job.squares = outputs.sum_grad_squared;
  job.centered = outputs.sum_grad_centered_squared;

  // Blocks per multiprocessor, the last argument, go with the plan's.
  if (plan.sums) {
    launch_square_tile<SquareTile<Element, kTerms, true, 64, 32, 3>>(job, plan, stream);
  } else if (plan.tile == 64) {
    launch_square_tile<SquareTile<Element, kTerms, false, 64, 32, 3>>(job, plan, stream);
  } else if constexpr (kTerms == 1) {
    launch_square_tile<SquareTile<Element, kTerms, false, 128, 64, 1>>(job, plan, stream);
  }
  if (plan.splits > 1) {
    constexpr int64_t kMaxBlocks = 1 << 16;
    const int64_t per_block = kSquareMergeThreads * (plan.vector_store ? 4 : 1);
    const int64_t wanted = (int64_t{params.O} * params.I + per_block - 1) / per_block;
    const auto blocks = static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
    const auto merge =
        plan.vector_store ? &square_merge_kernel<Element, 4> : &square_merge_kernel<Element, 1>;
    KERNEL_LAUNCH(dim3(blocks), dim3(kSquareMergeThreads), 0, stream, merge, job);
    check(cudaGetLastError(), "square_gemm, merging");
  }
  if (job.centered) {
    constexpr int64_t kRows = kSquareMergeThreads / 32 * kSquareDeviationRows;
    const int64_t blocks = (int64_t{params.I} + 31) / 32 * ((params.O + kRows - 1) / kRows);
    const auto deviations = &square_deviations_kernel<Element>;
    KERNEL_LAUNCH(dim3(static_cast<unsigned>(blocks)), dim3(kSquareMergeThreads), 0, stream, deviations, job);
    check(cudaGetLastError(), "square_gemm, deviations");
  }
}

}  // namespace backpack_cuda::cuda
