// Integer arithmetic of sizes.
#pragma once

#include <cstdint>

namespace backpack_cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The smallest power of two from x on, at most 2^30.
inline int power_of_two_from(int64_t x) {
  int power = 1;
  while (power < x && power < (1 << 30)) power *= 2;
  return power;
}

}  // namespace backpack_cuda
