// ldmatrix and mma.sync, with the fragment layouts of the PTX ISA.
#include <cuda_fp16.h>

#include <cmath>

#include "harness/instructions.h"
#include "harness/sanitizers.h"

namespace cuda_on_cpu {
namespace {

struct LoadSlot {
  int matrices;
  bool transpose;
  uint32_t row[4];
  uint32_t out[4];
};

void load_body(void** slots, uint32_t) {
  auto slot = [&](int lane) { return static_cast<LoadSlot*>(slots[lane]); };
  auto half_word = [&](int lane, int column) {
    return uint32_t{reinterpret_cast<const uint16_t*>(slot(lane)->row)[column]};
  };
  for (int lane = 0; lane < int(kWarpSize); ++lane) {
    for (int m = 0; m < slot(lane)->matrices; ++m) {
      if (slot(lane)->transpose) {
        const int row = 8 * m + 2 * (lane % 4), column = lane / 4;
        slot(lane)->out[m] = half_word(row, column) | half_word(row + 1, column) << 16;
      } else {
        slot(lane)->out[m] = slot(8 * m + lane / 4)->row[lane % 4];
      }
    }
  }
}

struct MmaSlot {
  MmaElement element;
  int depth;
  uint32_t a[4], b[2];
  float c[4], d[4];
};

}  // namespace

float unpack(MmaElement element, uint32_t bits, int index) {
  const uint16_t half_word = uint16_t(index ? bits >> 16 : bits);
  switch (element) {
    case MmaElement::kTf32:
      bits &= 0xffffe000u;  // the hardware ignores the low 13 bits
      break;
    case MmaElement::kBFloat16:
      bits = uint32_t{half_word} << 16;
      break;
    case MmaElement::kFloat16:
      return __half2float(__half(__half_raw{half_word}));
  }
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The PTX ISA leaves the rounding of an mma open. Studies of the hardware (Fasi et al., "Numerical behavior
// of NVIDIA tensor cores", 2021) found exact products, added with a few spare bits and truncated: here the
// sum is exact and truncated once, which is as biased as the hardware.
float truncate(double sum) {
  const float nearest = static_cast<float>(sum);
  const bool rounded_up = std::isfinite(nearest) && std::abs(double{nearest}) > std::abs(sum);
  return rounded_up ? std::nextafter(nearest, 0.f) : nearest;
}

namespace {

// With g = lane / 4, t = lane % 4 and E elements per register:
//   A register r, element e: row g + 8 (r & 1), column t E + e + 4 E (r >> 1)
//   B register r, element e: row t E + e + 4 E r, column g
//   C register r:            row g + 8 (r >> 1), column 2 t + (r & 1)
void mma_body(void** slots, uint32_t) {
  auto slot = [&](int lane) { return static_cast<MmaSlot*>(slots[lane]); };
  const MmaElement element = slot(0)->element;
  const int depth = slot(0)->depth, per_register = element == MmaElement::kTf32 ? 1 : 2;
  const int b_registers = depth / (4 * per_register), a_registers = 2 * b_registers;
  float a[16][16], b[16][8];
  for (int lane = 0; lane < int(kWarpSize); ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < per_register; ++e) {
      for (int r = 0; r < a_registers; ++r) {
        const int column = t * per_register + e + 4 * per_register * (r >> 1);
        a[g + 8 * (r & 1)][column] = unpack(element, slot(lane)->a[r], e);
      }
      for (int r = 0; r < b_registers; ++r) {
        b[t * per_register + e + 4 * per_register * r][g] = unpack(element, slot(lane)->b[r], e);
      }
    }
  }
  for (int lane = 0; lane < int(kWarpSize); ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r) {
      const int row = g + 8 * (r >> 1), column = 2 * t + (r & 1);
      double sum = slot(lane)->c[r];
      for (int k = 0; k < depth; ++k) sum += double{a[row][k]} * b[k][column];
      slot(lane)->d[r] = truncate(sum);
    }
  }
}

}  // namespace

void load_matrices(const char* name, uint32_t* out, int matrices, bool transpose, const void* row,
                   Site site) {
  LoadSlot slot{matrices, transpose, {}, {}};
  if (int(current_thread->lane) < 8 * matrices) {  // the other lanes' addresses are ignored
    Quiet quiet;
    if (uintptr_t(row) % 16) fail("ldmatrix: the row address is not 16-byte aligned", site);
    announce_read(row, 16, site);
    memcpy(slot.row, row, 16);
  }
  warp_collective(name, ~0u, true, &slot, load_body, site);
  for (int m = 0; m < matrices; ++m) out[m] = slot.out[m];
}

void multiply_accumulate(const char* name, MmaElement element, int depth, float* d, const uint32_t* a,
                         const uint32_t* b, const float* c, Site site) {
  const int b_registers = depth / (element == MmaElement::kTf32 ? 4 : 8);
  MmaSlot slot{element, depth, {}, {}, {}, {}};
  for (int r = 0; r < 2 * b_registers; ++r) slot.a[r] = a[r];
  for (int r = 0; r < b_registers; ++r) slot.b[r] = b[r];
  for (int r = 0; r < 4; ++r) slot.c[r] = c[r];
  warp_collective(name, ~0u, true, &slot, mma_body, site);
  for (int r = 0; r < 4; ++r) d[r] = slot.d[r];
}

uint32_t round_to_tf32(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return (finite ? bits + 0x1000u : bits) & 0xffffe000u;
}

}  // namespace cuda_on_cpu
