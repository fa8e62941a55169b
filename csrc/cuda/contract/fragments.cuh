// How one warp turns two slabs into tensor-core products, and which element (o, i) each accumulator is.
//
// Interface: kM, kN; step(acc, slab_b, slab_a, lane), where the slabs point at the step's first row and the
// warp's first column; row(lane, m, r). A lane's accumulators of one row form kRuns runs of kRun adjacent
// columns: run_column(lane, run) and value(acc, m, r, run, e) undo the layout.
//
// lane = 4 g + q; acc[m][n][2 r + c] is element (g + 8 r, 2 q + c) of mma tile (m, n), as the PTX ISA
// numbers.
#pragma once

#include "cuda/common/ptx.cuh"
#include "cuda/contract/slab.cuh"

namespace backpack_cuda::cuda {

// A lane group's v-th column of a slab. The product does not mind a permutation, so with row-major slabs one
// lane takes four adjacent columns by one 16-byte load, instead of columns eight apart.
template <bool kAlongT>
__device__ __forceinline__ constexpr int tf32_column(int group, int v) {
  return kAlongT ? 8 * v + group : 32 * (v / 4) + 4 * group + v % 4;
}

// values[v][half]: element (q + 4 half, column v) for v in [v0, v0 + kCount).
template <class Slab, int kCount>
__device__ __forceinline__ void load_tf32_values(float (&values)[kCount][2], const float* slab, int v0,
                                                 int lane) {
  static_assert(kCount % 4 == 0);
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int v = 0; v < kCount; v += 4) {
      const float* const from = slab + Slab::at(q + 4 * half, tf32_column<Slab::kAlongT>(g, v0 + v));
      if constexpr (Slab::kAlongT) {
#pragma unroll
        for (int j = 0; j < 4; ++j) values[v + j][half] = from[Slab::at(0, 8 * j)];
      } else {
        const float4 x = *reinterpret_cast<const float4*>(from);
        values[v][half] = x.x;
        values[v + 1][half] = x.y;
        values[v + 2][half] = x.z;
        values[v + 3][half] = x.w;
      }
    }
  }
}

// float32 operands: one TF32 product, or three for float32 accuracy (kTerms).
template <class SlabB, class SlabA, int kWarpO, int kWarpI, int kTerms>
struct Tf32Fragments {
  static constexpr int kM = kWarpO / 16, kN = kWarpI / 8;
  static constexpr int kRun = SlabA::kAlongT ? 2 : 4, kRuns = 2 * kN / kRun;
  using Accumulator = float[kM][kN][4];

  static __device__ __forceinline__ int row(int lane, int m, int r) {
    return tf32_column<SlabB::kAlongT>(lane / 4, 2 * m + r);
  }
  static __device__ __forceinline__ int run_column(int lane, int run) {
    if constexpr (SlabA::kAlongT) return 8 * run + 2 * (lane % 4);
    return tf32_column<false>(2 * (lane % 4) + run % 2, run / 2 * 4);
  }
  static __device__ __forceinline__ float value(const Accumulator& acc, int m, int r, int run, int e) {
    if constexpr (SlabA::kAlongT) return acc[m][run][2 * r + e];
    return acc[m][run / 2 * 4 + e][2 * r + run % 2];
  }

  static __device__ __forceinline__ void step(Accumulator& acc, const float* slab_b, const float* slab_a,
                                              int lane) {
    uint32_t b_hi[kM][4];
    [[maybe_unused]] uint32_t b_lo[kM][4];
    float values[2 * kM][2];
    load_tf32_values<SlabB>(values, slab_b, 0, lane);
#pragma unroll
    for (int v = 0; v < 2 * kM; ++v) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if constexpr (kTerms == 1) {
          b_hi[v / 2][v % 2 + 2 * half] = to_tf32(values[v][half]);
        } else {
          const Tf32Split split(values[v][half]);
          b_hi[v / 2][v % 2 + 2 * half] = split.hi;
          b_lo[v / 2][v % 2 + 2 * half] = split.lo;
        }
      }
    }
#pragma unroll
    for (int n0 = 0; n0 < kN; n0 += 4) {  // few fragments of a at a time: registers
      float columns[4][2];
      load_tf32_values<SlabA>(columns, slab_a, n0, lane);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if constexpr (kTerms == 1) {
          const uint32_t a_hi[2] = {to_tf32(columns[j][0]), to_tf32(columns[j][1])};
#pragma unroll
          for (int m = 0; m < kM; ++m) mma_tf32(acc[m][n0 + j], b_hi[m], a_hi);
        } else {  // as mma_tf32x3, but with independent products between dependent ones
          const Tf32Split split[2] = {Tf32Split(columns[j][0]), Tf32Split(columns[j][1])};
          const uint32_t a_hi[2] = {split[0].hi, split[1].hi}, a_lo[2] = {split[0].lo, split[1].lo};
          float product[kM][4] = {};
#pragma unroll
          for (int m = 0; m < kM; ++m) mma_tf32(product[m], b_lo[m], a_hi);
#pragma unroll
          for (int m = 0; m < kM; ++m) mma_tf32(product[m], b_hi[m], a_lo);
#pragma unroll
          for (int m = 0; m < kM; ++m) mma_tf32(product[m], b_hi[m], a_hi);
#pragma unroll
          for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int r = 0; r < 4; ++r) acc[m][n0 + j][r] += product[m][r];
          }
        }
      }
    }
  }
};

// bfloat16 or float16 operands: ldmatrix, transposing row-major slabs on the way.
template <class SlabB, class SlabA, int kWarpO, int kWarpI>
struct HalfFragments {
  using Element = typename SlabB::Element;
  static constexpr int kM = kWarpO / 16, kN = kWarpI / 8;
  static constexpr int kRun = 2, kRuns = kN;
  using Accumulator = float[kM][kN][4];

  static __device__ __forceinline__ int row(int lane, int m, int r) { return 16 * m + lane / 4 + 8 * r; }
  static __device__ __forceinline__ int run_column(int lane, int run) { return 8 * run + 2 * (lane % 4); }
  static __device__ __forceinline__ float value(const Accumulator& acc, int m, int r, int run, int e) {
    return acc[m][run][2 * r + e];
  }

  static __device__ __forceinline__ void step(Accumulator& acc, const Element* slab_b, const Element* slab_a,
                                              int lane) {
    // Lanes 8 j to 8 j + 7 address the rows of the j-th 8x8 matrix.
    const int matrix = lane / 8, line = lane % 8;
    uint32_t b[kM][4], a[kN / 2][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {  // in the order (o, t), (o + 8, t), (o, t + 8), (o + 8, t + 8)
      load<SlabB>(b[m], slab_b, matrix / 2 * 8, 16 * m + matrix % 2 * 8, line);
    }
#pragma unroll
    for (int n = 0; n < kN / 2; ++n) {  // (t, i), (t + 8, i), (t, i + 8), (t + 8, i + 8)
      load<SlabA>(a[n], slab_a, matrix % 2 * 8, 16 * n + matrix / 2 * 8, line);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const uint32_t column[2] = {a[n / 2][n % 2 * 2], a[n / 2][n % 2 * 2 + 1]};
#pragma unroll
      for (int m = 0; m < kM; ++m) mma_half<Element>(acc[m][n], b[m], column);
    }
  }

 private:
  // Four matrices; (t, column) is the corner of this lane's.
  template <class Slab>
  static __device__ __forceinline__ void load(uint32_t (&r)[4], const Element* slab, int t, int column,
                                              int line) {
    const int at = Slab::kAlongT ? Slab::at(t, column + line) : Slab::at(t + line, column);
    ldmatrix_x4<!Slab::kAlongT>(r, slab + at);
  }
};

}  // namespace backpack_cuda::cuda
