// Any CPU: vectors of 16 bytes, which every x86-64 and ARMv8 has.
#define VECTOR_BYTES 16
#define DENSE_TILES TILE(6, 2), TILE(4, 2), TILE(4, 3)
#define GROUPED_TILES GROUPED_TILE(1, 7), GROUPED_TILE(2, 4)
#define PRODUCT_TILES PRODUCT_TILE(4, 2)
#define GROUPED_PRODUCT_TILES \
  GROUPED_PRODUCT_TILE(1, 1), GROUPED_PRODUCT_TILE(2, 2), GROUPED_PRODUCT_TILE(3, 3)
#include "cpu/kernels_impl.h"

namespace backpack_cuda::cpu {
const Kernels<float>* portable_float_kernels() { return &kFloatKernels; }
const Kernels<double>* portable_double_kernels() { return &kDoubleKernels; }
}  // namespace backpack_cuda::cpu
