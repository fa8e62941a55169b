// One kernel source for two compilers. A kernel file includes this header and is then compiled
// by nvcc, for the GPU, where the header defines three KERNEL_* macros and little else; or by a plain C++
// compiler, for tests on machines without a GPU, where csrc/harness supplies the device side of the language,
// the same macros among it, and executes it on the CPU.
#pragma once

#include <cuda_runtime.h>

#if defined(__CUDACC__)

// Declares `T* const name`, the dynamic shared memory of the launch.
#define KERNEL_DYNAMIC_SHARED(T, name)                                            \
  extern __shared__ __align__(128) unsigned char kernel_dynamic_shared_memory_[]; \
  T* const name = reinterpret_cast<T*>(kernel_dynamic_shared_memory_)

// Declares a static shared variable: KERNEL_SHARED(partial, float[32]).
#define KERNEL_SHARED(name, ...)    \
  using name##_type_ = __VA_ARGS__; \
  __shared__ name##_type_ name

// Launches a kernel. A kernel with several template arguments goes through a pointer to it, because the
// preprocessor would cut the argument list at their commas.
#define KERNEL_LAUNCH(grid, block, shared_bytes, stream, kernel, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)

#else

#include "harness/device_language.h"

#endif

namespace backpack_cuda::cuda {

// To be called before launches with more than 48 KiB of dynamic shared memory; no operation of the stream.
template <class... Arguments>
cudaError_t allow_dynamic_shared(void (*kernel)(Arguments...), size_t bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

}  // namespace backpack_cuda::cuda
