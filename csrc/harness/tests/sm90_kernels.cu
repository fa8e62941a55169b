// Kernels that test the harness' sm_90 instructions: correct ones, whose results test_harness_sm90.py
// compares with numpy, and ones with a planted fault each. nvcc compiles them too.
#include <cstring>

#include "cuda/common/cuda_check.h"
#include "cuda/contract_sm90/contract_sm90_params.h"
#include "cuda/contract_sm90/dense_rows.h"
#include "cuda/contract_sm90/ptx_sm90.cuh"
#include "harness/guarded_call.h"

namespace {

using namespace backpack_cuda::cuda;
using Half = __nv_bfloat16;

constexpr int kBoxElements = kSm90SlabRows * kSm90BoxColumns, kBoxBytes = 2 * kBoxElements;
constexpr size_t kSharedBytes = 64 << 10;  // above 48 KiB the harness aligns to 1024 bytes

__device__ unsigned char* aligned_shared() {
  KERNEL_DYNAMIC_SHARED(unsigned char, raw);
  return raw + (1024 - sm90::shared_address(raw) % 1024) % 1024;
}

__device__ void start_barrier(uint64_t* barrier, int arrivals) {
  if (threadIdx.x == 0) {
    sm90::init_barrier(barrier, arrivals);
    sm90::fence_barrier_init();
  }
  __syncthreads();
}

// ---- correct ----

// One block of 96. Warp 0 hands 8 numbers to the others, one at a time; they hand back their squares.
// out [2 warps, 8].
__global__ void ping_pong(float* out) {
  KERNEL_SHARED(full, uint64_t);
  KERNEL_SHARED(empty, uint64_t);
  KERNEL_SHARED(value, float);
  start_barrier(&full, 1);
  start_barrier(&empty, 2);
  const int warp = threadIdx.x / 32;
  for (int round = 0; round < 8; ++round) {
    if (warp == 0) {
      if (threadIdx.x == 0) {
        sm90::wait(&empty, round % 2 ^ 1);
        value = float(round + 1);
        sm90::arrive(&full);
      }
    } else {
      sm90::wait(&full, round % 2);
      __syncwarp();  // all lanes have waited: a slower one would find the phase after the next
      if (threadIdx.x % 32 == 0) {
        out[(warp - 1) * 8 + round] = value * value;
        sm90::arrive(&empty);
      }
    }
  }
}

// One block of 128. The box at (x, y, z) -> out [64 rows, 64 columns], as it lies in shared memory.
__global__ void copy_one_box(const __grid_constant__ CUtensorMap map, int x, int y, int z, uint16_t* out) {
  unsigned char* const box = aligned_shared();
  KERNEL_SHARED(full, uint64_t);
  start_barrier(&full, 1);
  if (threadIdx.x == 0) {
    sm90::prefetch_map(&map);
    sm90::arrive_and_expect(&full, kBoxBytes);
    sm90::copy_box(box, &map, &full, x, y, z);
  }
  sm90::wait(&full, 0);
  for (int e = threadIdx.x; e < kBoxElements; e += 128) out[e] = reinterpret_cast<uint16_t*>(box)[e];
}

// One warp: 1 in the lane that elect.sync chose, plus 2 where all agree on a lane. out [32].
__global__ void elections(int* out) {
  uint32_t chosen, leader;
  asm volatile(
      "{\n"
      "  .reg .pred p;\n"
      "  elect.sync %0|p, %2;\n"
      "  selp.b32 %1, 1, 0, p;\n"
      "}\n"
      : "=r"(leader), "=r"(chosen)
      : "r"(0xffffffffu));
  out[threadIdx.x] = int(chosen) + 2 * int(leader < 32);
}

// One warp: a jump in PTX, taken by one lane. out [32].
__global__ void branches(int* out) {
  int flag;
  asm volatile(
      "{\n"
      "  .reg .pred p;\n"
      "  mov.b32 %0, 3;\n"
      "  setp.eq.s32 p, %1, 5;\n"
      "  @p bra SKIP;\n"
      "  mov.b32 %0, 4;\n"
      "SKIP:\n"
      "}\n"
      : "=r"(flag)
      : "r"(static_cast<int>(threadIdx.x)));
  out[threadIdx.x] = flag;
}

// ---- faulty: in [64, 64] of ones, out [128] becomes 64 per thread where all is right ----

// What most of them vary: fills two boxes, multiplies once, stores one accumulator per thread.
enum Fault {
  kNone,
  kNoCopyWait,
  kFewerBytes,
  kMoreBytes,
  kWrongParity,
  kNoProductWait,
  kNoFence,
  kTouchedAccumulator,
  kRefill,
  kDifferentDescriptors,
  kReservedBits,
  kExitInFlight,
};
template <Fault kFault>
__global__ void __launch_bounds__(128) product(const __grid_constant__ CUtensorMap map, float* out) {
  unsigned char* const boxes = aligned_shared();
  KERNEL_SHARED(full, uint64_t);
  start_barrier(&full, 1);
  if (threadIdx.x == 0) {
    const int bytes = 2 * kBoxBytes;
    sm90::arrive_and_expect(&full, kFault == kFewerBytes  ? bytes - 16
                                   : kFault == kMoreBytes ? bytes + 16
                                                          : bytes);
    sm90::copy_box(boxes, &map, &full, 0, 0, 0);
    sm90::copy_box(boxes + kBoxBytes, &map, &full, 0, 0, 0);
  }
  if (kFault != kNoCopyWait) sm90::wait(&full, kFault == kWrongParity ? 1 : 0);
  float g[64] = {};
  uint64_t a = sm90::matrix_descriptor(sm90::shared_address(boxes), 0);
  if (kFault == kDifferentDescriptors && threadIdx.x == 77) a += 128;
  if (kFault == kReservedBits) a |= 1ull << 14;
  // The box is 64 columns wide; both halves of the 128 columns are the same one.
  if (kFault != kNoFence) sm90::fence_registers(g);
  for (int k = 0; k < 4; ++k) sm90::wgmma<Half>(g, a + 128 * k, a + 128 * k, true);
  sm90::commit_products();
  if (kFault == kTouchedAccumulator) g[5] = 1.f;
  if (kFault == kExitInFlight) return;
  if (kFault == kRefill) {
    if (threadIdx.x == 0) {
      sm90::arrive_and_expect(&full, kBoxBytes);
      sm90::copy_box(boxes, &map, &full, 0, 64, 0);  // zeros
    }
    sm90::wait(&full, 1);
  }
  if (kFault != kNoProductWait) sm90::wait_for_accumulators(g);
  out[threadIdx.x] = g[threadIdx.x % 64];
  if (kFault == kNoProductWait) sm90::wait_for_products<0>();
}

__global__ void barrier_not_initialised(float*) {
  KERNEL_SHARED(full, uint64_t);
  if (threadIdx.x == 0) sm90::arrive(&full);
}

__global__ void too_many_arrivals(float*) {
  KERNEL_SHARED(full, uint64_t);
  start_barrier(&full, 2);
  if (threadIdx.x == 0) {
    for (int k = 0; k < 2; ++k) sm90::arrive(&full);
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], 3;" ::"r"(sm90::shared_address(&full)) : "memory");
  }
}

__global__ void misaligned_barrier(float*) {
  KERNEL_SHARED(full, uint64_t[2]);
  sm90::init_barrier(reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(full) + 4), 1);
}

__global__ void barrier_overwritten(float* out) {
  KERNEL_SHARED(full, uint64_t);
  start_barrier(&full, 1);
  full = ~uint64_t{0};
  sm90::wait(&full, 0);
  out[0] = 1;
}

__global__ void fence_forgotten(const __grid_constant__ CUtensorMap map, float*) {
  unsigned char* const box = aligned_shared();
  KERNEL_SHARED(full, uint64_t);
  if (threadIdx.x != 0) return;
  sm90::init_barrier(&full, 1);
  sm90::arrive_and_expect(&full, kBoxBytes);
  sm90::copy_box(box, &map, &full, 0, 0, 0);
  sm90::wait(&full, 0);
}

__global__ void box_misaligned(const __grid_constant__ CUtensorMap map, float*) {
  unsigned char* const box = aligned_shared();
  KERNEL_SHARED(full, uint64_t);
  start_barrier(&full, 1);
  if (threadIdx.x == 0) sm90::copy_box(box + 64, &map, &full, 0, 0, 0);
}

__global__ void box_past_shared_memory(const __grid_constant__ CUtensorMap map, float*) {
  unsigned char* const box = aligned_shared();
  KERNEL_SHARED(full, uint64_t);
  start_barrier(&full, 1);
  if (threadIdx.x == 0) sm90::copy_box(box + kSharedBytes - 1024, &map, &full, 0, 0, 0);
}

__global__ void block_ends_before_its_copy(const __grid_constant__ CUtensorMap map, float*) {
  unsigned char* const box = aligned_shared();
  KERNEL_SHARED(full, uint64_t);
  start_barrier(&full, 1);
  if (threadIdx.x == 0) {
    sm90::arrive_and_expect(&full, 20 * kBoxBytes);
    for (int k = 0; k < 20; ++k) sm90::copy_box(box, &map, &full, 0, 0, 0);
  }
}

__global__ void no_tensor_map(float*) {
  unsigned char* const box = aligned_shared();
  KERNEL_SHARED(full, uint64_t);
  KERNEL_SHARED(zeros, CUtensorMap);
  start_barrier(&full, 1);
  if (threadIdx.x == 0) sm90::copy_box(box, &zeros, &full, 0, 0, 0);
}

#if !defined(__CUDACC__)  // which refuses it
__global__ void wrong_register_count(float*) { asm volatile("setmaxnreg.inc.sync.aligned.u32 100;"); }
#endif

__global__ void half_a_warpgroup(float*) {
  float g[64] = {};
  sm90::fence_registers(g);
  const uint64_t a = sm90::matrix_descriptor(sm90::shared_address(aligned_shared()), 0);
  sm90::wgmma<Half>(g, a, a, true);
}

// The instruction may give up: without a loop what it waits for need not be there.
__global__ void wait_without_a_loop(const __grid_constant__ CUtensorMap map, float* out) {
  unsigned char* const box = aligned_shared();
  KERNEL_SHARED(full, uint64_t);
  start_barrier(&full, 1);
  if (threadIdx.x == 0) {
    sm90::arrive_and_expect(&full, kBoxBytes);
    sm90::copy_box(box, &map, &full, 0, 0, 0);
  }
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; }" ::"r"(
                   sm90::shared_address(&full))
               : "memory");
  const Half one = reinterpret_cast<const Half*>(box)[threadIdx.x];
  out[threadIdx.x] = 64.f * static_cast<float>(one);
  if (threadIdx.x == 0) sm90::wait(&full, 0);
}

}  // namespace

// Runs one kernel by name; 2: there is no such kernel. `sizes`: N, T, channels, then x, y, z of a box.
extern "C" int run_sm90_kernel(const char* name, const void* in, const int* sizes, void* out) {
  CUtensorMap map;
  make_tensor_map({in, sizes[0], sizes[1], sizes[2], int64_t{sizes[1]} * sizes[2], sizes[2]},
                  Element::kBFloat16, &map);
  float* const floats = static_cast<float*>(out);
#define CASE(kernel, block, ...)                                                       \
  if (!strcmp(name, #kernel)) {                                                        \
    return cuda_on_cpu::guarded([&] {                                                  \
      check(allow_dynamic_shared(kernel, kSharedBytes), #kernel);                      \
      KERNEL_LAUNCH(dim3(1), dim3(block), kSharedBytes, nullptr, kernel, __VA_ARGS__); \
    });                                                                                \
  }
  CASE(ping_pong, 96, floats)
  CASE(copy_one_box, 128, map, sizes[3], sizes[4], sizes[5], static_cast<uint16_t*>(out))
  CASE(elections, 32, static_cast<int*>(out))
  CASE(branches, 32, static_cast<int*>(out))
  CASE(product<kNone>, 128, map, floats)
  CASE(product<kNoCopyWait>, 128, map, floats)
  CASE(product<kFewerBytes>, 128, map, floats)
  CASE(product<kMoreBytes>, 128, map, floats)
  CASE(product<kWrongParity>, 128, map, floats)
  CASE(product<kNoProductWait>, 128, map, floats)
  CASE(product<kNoFence>, 128, map, floats)
  CASE(product<kTouchedAccumulator>, 128, map, floats)
  CASE(product<kRefill>, 128, map, floats)
  CASE(product<kDifferentDescriptors>, 128, map, floats)
  CASE(product<kReservedBits>, 128, map, floats)
  CASE(product<kExitInFlight>, 128, map, floats)
  CASE(barrier_not_initialised, 32, floats)
  CASE(too_many_arrivals, 32, floats)
  CASE(misaligned_barrier, 32, floats)
  CASE(barrier_overwritten, 32, floats)
  CASE(fence_forgotten, 32, map, floats)
  CASE(box_misaligned, 32, map, floats)
  CASE(box_past_shared_memory, 32, map, floats)
  CASE(block_ends_before_its_copy, 32, map, floats)
  CASE(no_tensor_map, 32, floats)
#if !defined(__CUDACC__)
  CASE(wrong_register_count, 32, floats)
#endif
  CASE(half_a_warpgroup, 64, floats)
  CASE(wait_without_a_loop, 128, map, floats)
#undef CASE
  return 2;
}

// The status of cuTensorMapEncodeTiled for a bfloat16 tensor; element strides are 1.
extern "C" int encode_sm90_map(const void* data, int rank, const uint64_t* sizes, const uint64_t* strides,
                               const uint32_t* box, int swizzle) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  const uint32_t steps[] = {1, 1, 1, 1, 1};
  CUtensorMap map;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank, const_cast<void*>(data),
      reinterpret_cast<const cuuint64_t*>(sizes), reinterpret_cast<const cuuint64_t*>(strides), box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle),
      CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}
