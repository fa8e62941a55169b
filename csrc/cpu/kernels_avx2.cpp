// AVX2 and FMA with 16 registers of 32 bytes.
#define VECTOR_BYTES 32
#define DENSE_TILES TILE(6, 2), TILE(5, 2), TILE(4, 2), TILE(4, 3), TILE(8, 1)
#define GROUPED_TILES GROUPED_TILE(1, 7), GROUPED_TILE(2, 4), GROUPED_TILE(3, 3)
#define PRODUCT_TILES PRODUCT_TILE(4, 1), PRODUCT_TILE(4, 2), PRODUCT_TILE(4, 3)
#define GROUPED_PRODUCT_TILES \
  GROUPED_PRODUCT_TILE(1, 1), GROUPED_PRODUCT_TILE(2, 2), GROUPED_PRODUCT_TILE(3, 3)
#include "cpu/kernels_impl.h"

namespace backpack_cuda::cpu {
const Kernels<float>* avx2_float_kernels() { return &kFloatKernels; }
const Kernels<double>* avx2_double_kernels() { return &kDoubleKernels; }
}  // namespace backpack_cuda::cpu
