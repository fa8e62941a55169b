// batch_l2 alone, without the per-sample gradients: |sum_t b_t a_t^T|^2 = sum_{t,s} <a_t, a_s> <b_t, b_s>.
// Two Gram matrices of T x T instead of a product of O x I: cheaper than `contract` where T is small against
// I and O. Tensor cores of sm_80 and up. Results are deterministic.
//
// Accuracy. Every entry of both Gram matrices is a float32 sum: of exact products for bfloat16 and float16,
// of products rounded to TF32 for float32 with `tf32`, of float32-accurate ones without. Where the terms of a
// norm cancel, as they do when a sample's gradient is much smaller than its parts, the error is relative to
// the sum of the |terms|; a result below zero becomes zero. Entries must fit into float32: rows whose squared
// length overflows or underflows it give Inf, NaN or too small a norm, even if the norm itself would fit.
//
// Cost, with P the padded samples below and C = I + O, each rounded up to whole slabs of 128 bytes:
//   flops  2 tile^2 C units, three times as many TF32 products for float32 without `tf32`
//   bytes  tile C units per operand row block that a unit reads (one on the diagonal, two elsewhere), of
//   which the
//          first read of each element comes from memory, N T C elements, and the rest from the L2 cache
// where a unit is one pair of row blocks (p <= q) of a sample: N ceil(T / tile) (ceil(T / tile) + 1) / 2 of
// them, or N / (32 / P) with P = T rounded up to a power of two when T <= 16 and samples share a block. That
// is N T^2 (I + O) flops when T fills its tiles. The plan states both numbers.
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
  // Partial norms, 4 N pairs bytes if pairs > 1; and, with splits, parts of the Gram matrices: no more than
  // fit on the chip at a time, 16 KB per multiprocessor and KB of ... see kGramPartBytes in
  // gram_norm_plan.cpp.
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
