// outer_norm: squared norms of the per-sample weight gradients of a Linear layer with one position per
// sample. There G_n = grad_output_n input_n^T, an outer product, so
//   out[n] = sum_oi G_n[o, i]^2 = |input_n|^2 * |grad_output_n|^2.
// Cost: one read of both operands, N (I + O) elements, and 2 flop per element: bound by memory bandwidth.
//
// Range: each factor is summed in float32, and once more in float64 when it leaves [2^-80, 2^127], so that
// only a result outside float32's range overflows or underflows. NaN gives NaN. Inf gives Inf, or NaN where
// the other row is zero; G_n itself would hold NaN wherever Inf meets a single zero.
#pragma once

#include <cstdint>

namespace backpack_cuda {

struct OuterNormParams {
  const void* input;        // [N, I]
  const void* grad_output;  // [N, O]
  void* out;                // [N], dense; float32, float64 for float64 operands
  int64_t N, I, O;
  int64_t input_strides[2], grad_output_strides[2];  // in elements, any
};

// A float32 sum of squares in this range has lost nothing to overflow or underflow.
constexpr float kOuterNormSmallest = 0x1p-80f, kOuterNormLargest = 0x1p127f;

}  // namespace backpack_cuda
