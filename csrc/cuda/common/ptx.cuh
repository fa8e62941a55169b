// Thin wrappers over the PTX of sm_80 and up that the tensor-core kernels use. (That of sm_90a alone:
// contract_sm90/ptx_sm90.cuh.)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/common/kernel.h"

namespace backpack_cuda::cuda {

// ---- asynchronous copies from global to shared memory ----

// Copies kBytes (4, 8 or 16, both addresses aligned to it); only the first `valid_bytes` are read, zeros fill
// the rest.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared_to, const void* global_from, int valid_bytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared_to));
  if constexpr (kBytes == 16) {  // past the L1 cache: rows are read once per block
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global_from), "r"(valid_bytes)
                 : "memory");
  } else if constexpr (kBytes == 8) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global_from), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global_from), "r"(valid_bytes)
                 : "memory");
  }
}

// Closes this thread's group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending groups of this thread are in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// x again, but what follows from it is computed where it is used: values that the compiler would compute
// ahead of a loop would occupy registers all through it.
__device__ __forceinline__ int compute_late(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- products of fragments ----

// x as an operand of mma_tf32, which drops the last 13 bits of it: an error of up to a whole unit in the last
// place that is kept, always towards zero. Adding about half a unit first, by one multiply-add, leaves an
// error of at most 0.69 units that is zero on average. (cvt.rna.tf32 rounds to half a unit, but takes four
// instructions, more than the tensor cores leave time for.) Values of up to 11 bits stay exact, NaN and Inf
// stay.
__device__ __forceinline__ uint32_t to_tf32(float x) { return __float_as_uint(fmaf(x, 0x1.6p-12f, x)); }

// d[16, 8] += a[16, 8] * b[8, 8]; the hardware ignores the low 13 mantissa bits of the operands.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d[16, 8] += a[16, 16] * b[16, 8], two operands of Half (__nv_bfloat16 or __half) per register.
template <class Half>
__device__ __forceinline__ void mma_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<Half, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<Half, __half>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Four 8x8 matrices of 16-bit elements; lanes 8 m to 8 m + 7 give the 16-byte rows of matrix m. kTranspose
// turns each on the way.
template <bool kTranspose>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(from)
                 : "memory");
  }
}

// x as the sum of two TF32 values, hi and the rest lo, of either sign: within 2^-21 |x|.
struct Tf32Split {
  uint32_t hi, lo;
  __device__ __forceinline__ explicit Tf32Split(float x) {
    // Not by initialisers: nvcc shows those to the host.
    hi = to_tf32(x) & 0xffffe000u;
    lo = to_tf32(x - __uint_as_float(hi));
  }
};

// d += b^T a to float32 accuracy by three TF32 products, the small ones first. The tensor cores truncate
// their sums, so each step starts at zero and is added outside, where additions round to nearest (Ootomo and
// Yokota, "Recovering single precision accuracy from Tensor Cores", 2022).
__device__ __forceinline__ void mma_tf32x3(float (&d)[4], const uint32_t (&a_hi)[4],
                                           const uint32_t (&a_lo)[4], const uint32_t (&b_hi)[2],
                                           const uint32_t (&b_lo)[2]) {
  float step[4] = {};
  mma_tf32(step, a_lo, b_hi);
  mma_tf32(step, a_hi, b_lo);
  mma_tf32(step, a_hi, b_hi);
#pragma unroll
  for (int r = 0; r < 4; ++r) d[r] += step[r];
}

}  // namespace backpack_cuda::cuda
