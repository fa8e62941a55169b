// batch_l2 alone, without the per-sample gradients: |sum_t b_t a_t^T|^2 = sum_{t,s} <a_t, a_s> <b_t, b_s>.
// Two Gram matrices of T x T instead of a product of O x I: cheaper than `contract` where T is small against
// I and O. Tensor cores of sm_80 and up. Results are deterministic.
//
// Accuracy. Every entry of both Gram matrices is a float32 sum over the columns: of exact products for
// bfloat16 and float16, of operands rounded to TF32 for float32 with `tf32`, of float32-accurate products
// without. Sums go in steps of 64 bytes of columns (32 for three products), one rounded addition each; the
// truncation of the tensor cores takes about 2^-24 of each step, whatever their number. Where the terms of a
// norm cancel, as they do when a sample's gradient is much smaller than its parts, the error is relative to
// the sum of the |terms|; a result below zero becomes zero. Entries must fit into float32: rows whose squared
// length overflows or underflows it give Inf, NaN or too small a norm, even if the norm itself would fit. A
// NaN or Inf stays within its sample.
//
// Cost. A unit of work is one pair of row blocks (p <= q) of a sample, `tile` rows each: N R (R + 1) / 2
// units with R = ceil(T / tile); or, if T <= 16, N / (32 / slot) units with slot = T rounded up to a power of
// two, since samples then share a block. With C = I + O, each rounded up to slabs of 128 bytes:
//   flops  2 tile^2 C per unit, that is N T^2 (I + O) when T fills its tiles; float32 without `tf32` needs
//          three times as many TF32 flops
//   bytes  tile C elements per unit with p = q, twice that elsewhere, from the L2 cache; from memory
//          N T (I + O) elements, once if R = 1 or if a sample's rows stay in the L2 cache
// The plan states the sums of both. Small T is a matter of bytes: 6 blocks of 32 rows per multiprocessor keep
// 120 KB of loads on their way.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/options.h"
#include "cuda/common/outer_problem.h"

namespace backpack_cuda::cuda {

// Rows [N, T, columns]; strides in elements, any.
struct GramOperand {
  const void* data;
  int64_t stride_n, stride_t, stride_c;
};

struct GramNormParams {
  Element element;
  bool tf32;      // float32 operands: one TF32 pass instead of three (float32-accurate)
  int64_t N;      // samples, at least 1
  int T, I, O;    // at least 1
  GramOperand a;  // [N, T, I]
  GramOperand b;  // [N, T, O]
  float* out;     // [N]
};

struct GramNormPlan {
  int tile;            // rows of a block: 32, 64 or 128
  int slot;            // rows of a block that one sample takes: `tile`, or a power of two from T on
  int pairs;           // pairs of row blocks of one sample, p <= q
  int64_t units;       // of work: pairs of all samples or groups of samples
  int splits;          // of a unit's columns over blocks, where units alone leave the chip idle
  int copy_a, copy_b;  // bytes per copy of a row: 16 or 4, or 0 for single elements
  // Parts of the workspace, in bytes from its begin: partial norms, 4 N pairs bytes if pairs > 1; and, if
  // splits > 1, parts of both Gram matrices, 8 tile^2 bytes for each block that fits on the chip at a time:
  // at most 128 KB per multiprocessor, 17 MB on 132.
  int64_t norms_at, parts_at, workspace_bytes;
  double flops, bytes;  // see above; bytes are those read from the L2 cache
};

// Options: tile 1 for 64, 2 for 128, 3 for 32; splits.
GramNormPlan plan_gram_norm(const GramNormParams& params, int sm_count, const Options& options);

// Asynchronous; throws when a launch fails. `workspace`: plan.workspace_bytes, aligned to 16.
void launch_gram_norm(const GramNormParams& params, const GramNormPlan& plan, void* workspace,
                      cudaStream_t stream);

// The same for one kind of product.
void gram_norm_tf32(const GramNormParams& params, const GramNormPlan& plan, void* workspace,
                    cudaStream_t stream);
void gram_norm_tf32x3(const GramNormParams& params, const GramNormPlan& plan, void* workspace,
                      cudaStream_t stream);
void gram_norm_bfloat16(const GramNormParams& params, const GramNormPlan& plan, void* workspace,
                        cudaStream_t stream);
void gram_norm_float16(const GramNormParams& params, const GramNormPlan& plan, void* workspace,
                       cudaStream_t stream);

}  // namespace backpack_cuda::cuda
