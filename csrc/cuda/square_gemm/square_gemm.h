// The sums over samples of a Linear layer with one row per sample (T = 1), where G_n[o, i] = b[n, o] a[n, i]:
//   grad                        sum_n G_n = b^T a
//   sum_grad_squared            sum_n G_n^2 = (b * b)^T (a * a), squares formed in registers after the load
//   sum_grad_centered_squared   sum_n (G_n - mean G)^2
// from one pass over both operands, two accumulator tiles per block. Tensor cores of sm_80 and up. Results
// are deterministic.
//
// Accuracy. All sums are float32, whatever the element type, in steps of 16 samples (8 with three products),
// one rounded addition each; the truncation of the tensor cores takes about 2^-24 of each step.
//   float32                both products float32-accurate, by three TF32 products each: an error of at most
//                          2^-21.5 per product, seen only in sums of few samples
//   float32 with `tf32`    one TF32 product each; squares are taken in float32, then rounded
//   bfloat16, float16      grad from exact products; squares are taken in float32 and rounded to TF32: a
//                          relative error of at most 2^-11 per product of two
// The centered sum is sum_n G_n^2 - (sum_n G_n)^2 / N from the float32 sums. Where less than 1/64 of the
// squares is left (1/4 with one TF32 product, for its errors), a second kernel computes the element anew by
// deviations from the mean over the samples, from exact products. It is never negative; 0 if N = 1.
//
// Cost, with O' and I' rounded up to tiles (64 or 128) and N' to slabs (32 rows, 16 for float32):
//   flops  2 N' O' I' for each of the two products: three times as many TF32 flops for float32 without
//          `tf32`, 16-bit ones for the gradient of 16-bit elements, else TF32 ones
//   bytes  2 N' O' I' / tile elements from the L2 cache; from memory N (O + I) elements at least, and 4 O I
//          bytes per result; splits write and read 8 O I bytes per sum each, mostly in the L2 cache
//   second kernel: 4 O I bytes; where elements cancelled, 1300 N float32 instructions and 600 N loads from
//          the L1 cache for each block of 8 x 32 that has one
// The plan states flops and bytes of the products.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/options.h"
#include "cuda/common/outer_problem.h"

namespace backpack_cuda::cuda {

// Rows [N, columns]; strides in elements, any.
struct SquareOperand {
  const void* data;
  int64_t stride_n, stride_c;
};

struct SquareGemmParams {
  Element element;
  bool tf32;        // float32 operands: one TF32 pass instead of three (float32-accurate)
  int64_t N;        // samples, at least 1
  int O, I;         // at least 1
  SquareOperand a;  // [N, I]
  SquareOperand b;  // [N, O]
};

struct SquareGemmPlan {
  int tile;            // 64 or 128 rows and columns; 64 for float32 without `tf32`
  bool sums;           // forms grad besides the squares
  int64_t tiles;       // of the result
  int splits;          // of the samples, with partial sums in the workspace if above 1
  int slabs;           // of samples
  int copy_a, copy_b;  // bytes per copy of a row: 16 or 4, or 0 for single elements
  bool vector_store;   // four adjacent results at a time
  // Partial sums [splits, O, I] of the squares and of the gradient. Only if splits > 1: at most 2 S tile^2
  // floats each, with S blocks on the chip at a time (sm_count, or three times that for tiles of 64): 17 MB
  // each on 132 multiprocessors.
  int64_t squares_at, sums_at, workspace_bytes;
  double flops, bytes;  // see above, TF32 products for both, bytes from the L2 cache
};

// outputs: sum_grad_squared or sum_grad_centered_squared or both, with or without grad; the other results are
// not looked at. Nothing is read or written through the pointers while planning. Options: tile 1 for 64, 2
// for 128; splits.
SquareGemmPlan plan_square_gemm(const SquareGemmParams& params, const StatsOutputs& outputs, int sm_count,
                                const Options& options);

// Asynchronous; throws when a launch fails. `workspace`: plan.workspace_bytes, aligned to 16.
void launch_square_gemm(const SquareGemmParams& params, const StatsOutputs& outputs,
                        const SquareGemmPlan& plan, void* workspace, cudaStream_t stream);

// The same for one kind of product.
void square_gemm_tf32(const SquareGemmParams& params, const StatsOutputs& outputs, const SquareGemmPlan& plan,
                      void* workspace, cudaStream_t stream);
void square_gemm_tf32x3(const SquareGemmParams& params, const StatsOutputs& outputs,
                        const SquareGemmPlan& plan, void* workspace, cudaStream_t stream);
void square_gemm_bfloat16(const SquareGemmParams& params, const StatsOutputs& outputs,
                          const SquareGemmPlan& plan, void* workspace, cudaStream_t stream);
void square_gemm_float16(const SquareGemmParams& params, const StatsOutputs& outputs,
                         const SquareGemmPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace backpack_cuda::cuda
