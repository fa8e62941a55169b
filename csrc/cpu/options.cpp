#include "cpu/options.h"

#include <string>
#include <utility>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/kernels.h"

namespace backpack_cuda::cpu {

Options& options() {
  static Options options;
  return options;
}

namespace {

enum Isa { kPortable, kAvx2, kAvx512 };

Isa widest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kPortable;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return avx512 ? kAvx512 : kAvx2;
#else
  return kPortable;
#endif
}

Isa isa() {
  static const Isa widest = widest_isa();
  const int64_t limit = options().isa;
  const Isa wanted = limit == 0 || limit == 512 ? kAvx512 : limit == 256 ? kAvx2 : kPortable;
  return wanted < widest ? wanted : widest;
}

int64_t set_option(std::string name, int64_t value) {
  if (name == "isa") {
    STD_TORCH_CHECK(value == 0 || value == 512 || value == 256 || value == 128,
                    "isa must be 0, 512, 256 or 128, got ", value);
    return std::exchange(options().isa, value);
  }
  if (name == "chunk_bytes") {
    STD_TORCH_CHECK(value >= 0, "chunk_bytes must not be negative, got ", value);
    return std::exchange(options().chunk_bytes, value);
  }
  if (name == "kron") {
    STD_TORCH_CHECK(value >= 0 && value <= 8, "kron must be 0 to 8, got ", value);
    return std::exchange(options().kron, value);
  }
  STD_TORCH_CHECK(name == "method", "unknown option ", name, "; known: isa, chunk_bytes, kron, method");
  STD_TORCH_CHECK(value >= kAutomatic && value <= kProducts, "method must be 0 to ", int64_t(kProducts),
                  ", got ", value);
  return std::exchange(options().method, value);
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
#if defined(__x86_64__)
  if (isa() == kAvx512) return *avx512_float_kernels();
  if (isa() == kAvx2) return *avx2_float_kernels();
#endif
  return *portable_float_kernels();
}

template <>
const Kernels<double>& kernels<double>() {
#if defined(__x86_64__)
  if (isa() == kAvx512) return *avx512_double_kernels();
  if (isa() == kAvx2) return *avx2_double_kernels();
#endif
  return *portable_double_kernels();
}

}  // namespace backpack_cuda::cpu

STABLE_TORCH_LIBRARY_IMPL(backpack_cuda, CompositeExplicitAutograd, m) {
  m.impl("_cpu_option", TORCH_BOX(&backpack_cuda::cpu::set_option));
}
