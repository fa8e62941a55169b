// The instructions behind the PTX interpreter: asynchronous copies and matrix operations of sm_80. `name` is
// the instruction's text: lanes meet only in the same instruction.
#pragma once

#include "harness/runtime.h"

namespace cuda_on_cpu {

// cp.async: copies `source_size` bytes and zero-fills up to `size`, at the wait for its group.
void async_copy(void* destination, const void* source, uint32_t size, uint32_t source_size, Site site);
void async_commit_group();
void async_wait_group(unsigned pending_groups);
void async_wait_all();

// ldmatrix: `matrices` 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l /
// 8.
void load_matrices(const char* name, uint32_t* out, int matrices, bool transpose, const void* row, Site site);

enum class MmaElement { kTf32, kBFloat16, kFloat16 };
// mma.sync m16n8k{depth}, row-major A times column-major B, float32 accumulator.
void multiply_accumulate(const char* name, MmaElement element, int depth, float* d, const uint32_t* a,
                         const uint32_t* b, const float* c, Site site);
// Element `index` of a 32-bit operand register.
float unpack(MmaElement element, uint32_t bits, int index);
float truncate(double sum);  // to float32, towards zero

uint32_t round_to_tf32(float x);  // cvt.rna: to nearest, ties away from zero

}  // namespace cuda_on_cpu
