// The C entry point through which tests run one launcher of outer_norm: compiled with
// -DLAUNCHER=outer_norm_float32 or another, and linked with its .cu file.
#include "cuda/outer_norm/outer_norm.h"
#include "harness/guarded_call.h"

extern "C" int run_outer_norm(const backpack_cuda::OuterNormParams* params) {
  return cuda_on_cpu::guarded([&] { backpack_cuda::cuda::LAUNCHER(*params, nullptr); });
}
