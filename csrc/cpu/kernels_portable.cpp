// Any CPU: vectors of 16 bytes, which every x86-64 and ARMv8 has.
#define VECTOR_BYTES 16
#define DENSE_TILES TILE(6, 2), TILE(4, 2), TILE(4, 3)
#define GROUPED_TILES GROUPED_TILE(1, 7), GROUPED_TILE(2, 4)
#include "cpu/kernels_impl.h"

namespace backpack_cuda::cpu {
const Kernels<float>* portable_float_kernels() { return &kFloatKernels; }
const Kernels<double>* portable_double_kernels() { return &kDoubleKernels; }
}  // namespace backpack_cuda::cpu
