// Test switches of the CPU kernels (operator _cpu_option).
#pragma once
#include <cstdint>

namespace backpack_cuda::cpu {

// Ways to compute; the automatic choice is described where each is made. A way that does not apply is
// ignored.
enum Method : int64_t {
  kAutomatic = 0,
  kContract = 1,  // linear: the one-pass contraction, for T = 1 too
  kGram = 2,      // linear: batch_l2 from inner products of rows
  kRows = 3,      // convolution: operand packed channels last, a column vector lies in a kernel row
  kBlocked = 4,   // convolution: operand packed in blocks of channels, a column vector is one block at one
                  // kernel position
  kPatches = 5,   // convolution: patches gathered, chunk by chunk
  kGrouped = 6,   // convolution: vector lanes run over groups
  kProducts = 7,  // linear, T = 1: own products instead of torch's
};

struct Options {
  int64_t isa = 0;          // vector bits: 512, 256, 128; 0: the widest that this CPU has
  int64_t chunk_bytes = 0;  // packed operands per chunk; 0: kChunkBytes
  int64_t method = kAutomatic;
  int64_t kron = 0;  // Kronecker factors of convolutions: 1 to 4 unfold the last 0 to 3 dims, 5 to 8 do so
                     // with lanes over groups; 0: the cheapest
};
Options& options();

}  // namespace backpack_cuda::cpu
