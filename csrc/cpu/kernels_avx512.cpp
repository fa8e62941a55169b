// AVX-512 with 32 registers of 64 bytes.
#define VECTOR_BYTES 64
#define DENSE_TILES                                                                                  \
  TILE(14, 2), TILE(12, 2), TILE(10, 2), TILE(8, 2), TILE(9, 3), TILE(8, 3), TILE(7, 4), TILE(5, 5), \
      TILE(16, 1)
#define GROUPED_TILES GROUPED_TILE(1, 9), GROUPED_TILE(2, 8), GROUPED_TILE(4, 5)
#define PRODUCT_TILES PRODUCT_TILE(8, 1), PRODUCT_TILE(8, 2), PRODUCT_TILE(8, 3)
#define GROUPED_PRODUCT_TILES                                                         \
  GROUPED_PRODUCT_TILE(1, 1), GROUPED_PRODUCT_TILE(2, 2), GROUPED_PRODUCT_TILE(3, 3), \
      GROUPED_PRODUCT_TILE(4, 4)
#include "cpu/kernels_impl.h"

namespace backpack_cuda::cpu {
const Kernels<float>* avx512_float_kernels() { return &kFloatKernels; }
const Kernels<double>* avx512_double_kernels() { return &kDoubleKernels; }
}  // namespace backpack_cuda::cpu
