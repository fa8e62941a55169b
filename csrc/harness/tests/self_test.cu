// Correct kernels that test the harness: each uses one part of the language, and test_harness.py compares
// what it writes with numpy. nvcc compiles this file too, which proves that ptxas accepts the PTX.
#include <cstdint>
#include <cstring>

#include "cuda/common/kernel.h"
#include "harness/guarded_call.h"

namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// ---- the language ----

// One block of 32. out [10, 32]: each row the result of one shuffle of in [32].
__global__ void shuffles(const float* in, float* out) {
  const int lane = threadIdx.x;
  const float x = in[lane];
  out[0 * 32 + lane] = __shfl_sync(kAllLanes, x, 5);
  out[1 * 32 + lane] = __shfl_sync(kAllLanes, x, lane + 3, 8);
  out[2 * 32 + lane] = __shfl_xor_sync(kAllLanes, x, 16);
  out[3 * 32 + lane] = __shfl_xor_sync(kAllLanes, x, 3, 4);
  out[4 * 32 + lane] = __shfl_down_sync(kAllLanes, x, 7);
  out[5 * 32 + lane] = __shfl_down_sync(kAllLanes, x, 2, 8);
  out[6 * 32 + lane] = __shfl_up_sync(kAllLanes, x, 7);
  out[7 * 32 + lane] = __shfl_up_sync(kAllLanes, x, 2, 8);
  if (lane < 16) {  // the halves of the warp diverge
    out[8 * 32 + lane] = __shfl_xor_sync(0x0000ffffu, x, 1);
  } else {
    out[8 * 32 + lane] = __shfl_xor_sync(0xffff0000u, x, 2);
  }
  out[9 * 32 + lane] = static_cast<float>(__shfl_xor_sync(kAllLanes, static_cast<double>(x), 1));
}

// One block of 96. out [6, 96]: votes of the warp, then of the block, on in [96] > 0.
__global__ void votes(const int* in, unsigned* out) {
  const int t = threadIdx.x, yes = in[t] > 0;
  out[0 * 96 + t] = __ballot_sync(kAllLanes, yes);
  out[1 * 96 + t] = __any_sync(kAllLanes, yes);
  out[2 * 96 + t] = __all_sync(kAllLanes, yes);
  out[3 * 96 + t] = __syncthreads_count(yes);
  out[4 * 96 + t] = __syncthreads_and(yes);
  out[5 * 96 + t] = __syncthreads_or(yes);
}

// Grid (2, 3, 2), block (4, 3, 5). out [12, 60, 4]: block number, thread number, lane's own y and z.
__global__ void indices(int* out) {
  const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int* const mine = out + (block * 60 + thread) * 4;
  mine[0] = block;
  mine[1] = thread;
  mine[2] = threadIdx.y;
  mine[3] = threadIdx.z;
}

// Reverses in [blocks, 128] per block through static shared memory, then in [blocks, 32] per warp through
// dynamic.
__global__ void reverse(const float* in, float* out) {
  KERNEL_SHARED(staged, float[128]);
  KERNEL_DYNAMIC_SHARED(float, per_warp);
  const int t = threadIdx.x;
  staged[t] = in[blockIdx.x * 128 + t];
  __syncthreads();
  per_warp[t] = staged[127 - t];
  __syncwarp();
  out[blockIdx.x * 128 + t] = per_warp[t ^ 31];
}

// Any grid. Every thread adds one to seven counters of as many types.
__global__ void atomics(void* out) {
  const int t = blockIdx.x * blockDim.x + threadIdx.x;
  double* const doubles = static_cast<double*>(out);
  atomicAdd(doubles, 1.0);
  atomicAdd(reinterpret_cast<unsigned long long*>(doubles + 1), 1ull << 33);
  float* const words = reinterpret_cast<float*>(doubles + 2);
  atomicAdd(words, 0.5f);
  atomicAdd(reinterpret_cast<int*>(words + 1), -1);
  atomicAdd(reinterpret_cast<unsigned*>(words + 2), 3u);
  atomicMax(reinterpret_cast<int*>(words + 3), t);
  atomicMax(reinterpret_cast<unsigned*>(words + 4), 0x80000000u + t);
  int* const lock_free = reinterpret_cast<int*>(words + 5);
  for (int seen = 0;;) {
    const int before = atomicCAS(lock_free, seen, seen + 2);
    if (before == seen) break;
    seen = before;
  }
}

// One block of 32, one value per thread. out [16, 32].
__global__ void intrinsics(const int* in, int* out) {
  const int t = threadIdx.x, x = __ldg(in + t), y = in[31 - t];
  const unsigned u = x, v = y;
  const float f = __uint_as_float(0x3f800000u + (u & 0xffffu)), g = 1.25f;
  const int results[] = {__popc(u),
                         __clz(x),
                         __ffs(x),
                         static_cast<int>(__float_as_uint(f)),
                         min(x, y),
                         max(x, y),
                         static_cast<int>(min(u, v)),
                         static_cast<int>(max(u, v)),
                         static_cast<int>(__float_as_uint(min(f, g))),
                         static_cast<int>(__float_as_uint(max(f, g))),
                         static_cast<int>(min(long{x}, long{y})),
                         static_cast<int>(max(long{x}, long{y})),
                         static_cast<int>(1e6f * rsqrtf(f)),
                         warpSize,
#if __CUDA_ARCH__ >= 800
                         800
#else
                         0
#endif
  };
  for (int k = 0; k < 15; ++k) out[k * 32 + t] = results[k];
}

// One block of 128: warps 0, 2 and warps 1, 3 exchange values at barriers of their own. out = in [128],
// swapped.
__global__ void named_barriers(const float* in, float* out) {
  KERNEL_SHARED(staged, float[128]);
  const int t = threadIdx.x, pair = t / 32 % 2;
  staged[t] = in[t];
  if (pair == 0) {
    asm volatile("bar.sync 1, 64;" ::: "memory");
  } else {
    asm volatile("barrier.sync %0, %1;" ::"r"(2), "r"(64) : "memory");
  }
  out[t] = staged[t ^ 64];
}

// The order in which the first threads of 8 warps pass. out [1 + 8].
__global__ void schedule(int* out) {
  if (threadIdx.x % 32 == 0) out[1 + atomicAdd(out, 1)] = threadIdx.x / 32;
}

// ---- PTX ----

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One block of 32; in [32 lanes, 8 words] -> out [32, 8 words]: copies of 4, 8 and 16 bytes, whole, cut and
// not at all; a predicated one; two groups.
__global__ void async_copies(const uint32_t* in, uint32_t* out) {
  KERNEL_DYNAMIC_SHARED(uint32_t, staged);
  const int lane = threadIdx.x;
  const uint32_t* const source = in + lane * 8;
  uint32_t* const mine = staged + lane * 8;
  const uint32_t address = shared_address(mine);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(source), "r"(lane % 5)
               : "memory");
  asm volatile("cp.async.ca.shared.global [%0+8], [%1+8], 8, %2;" ::"r"(address), "l"(source), "r"(lane % 9)
               : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  asm volatile("cp.async.cg.shared.global.L2::128B [%0+16], [%1+16], 16;" ::"r"(address), "l"(source)
               : "memory");
  asm volatile("cp.async.commit_group;\n" ::: "memory");
  asm volatile("cp.async.wait_group %0;" ::"n"(1) : "memory");
  out[lane * 8] = mine[0];
  out[lane * 8 + 2] = mine[2];
  out[lane * 8 + 3] = mine[3];
  mine[1] = 7;
  asm volatile(
      "{\n"
      "  .reg .pred p;\n"
      "  setp.ne.b32 p, %2, 0;\n"
      "  @p cp.async.ca.shared.global [%0], [%1], 4;\n"
      "  @!p cp.async.ca.shared.global [%0], [%1], 4, 0;\n"
      "}\n" ::"r"(address + 4),
      "l"(source + 1), "r"(lane % 2)
      : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  out[lane * 8 + 1] = mine[1];
  __syncwarp();
  for (int k = 4; k < 8; ++k) out[lane * 8 + k] = staged[(31 - lane) * 8 + k];
}

// One block of 32; matrices in [32 rows, 8 halves] -> out [14, 32 lanes]: x4, x2, x1, then the same
// transposed.
__global__ void matrix_loads(const uint4* in, uint32_t* out) {
  KERNEL_SHARED(rows, uint4[32]);
  const int lane = threadIdx.x;
  rows[lane] = in[lane];
  __syncthreads();
  const uint32_t row = shared_address(&rows[lane]);
  uint32_t r[14];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[4]), "=r"(r[5])
               : "r"(row)
               : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[6]) : "r"(row) : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[7]), "=r"(r[8]), "=r"(r[9]), "=r"(r[10])
               : "r"(row)
               : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[11]), "=r"(r[12])
               : "r"(row)
               : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[13])
               : "r"(row)
               : "memory");
  for (int k = 0; k < 14; ++k) out[k * 32 + lane] = r[k];
}

// Fragments of one warp: in [32 lanes, 4 words of A, 2 words of B, 4 words of C] -> out [32 lanes, 4 floats].
// The larger shapes accumulate in place, the smaller ones take C from registers of its own.
__global__ void mma_tf32_k4(const uint32_t* in, float* out) {
  const uint32_t* const a = in + threadIdx.x * 10;
  const uint32_t* const b = a + 4;
  float c[4], d[4];
  memcpy(c, b + 2, 16);
  asm volatile(
      "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, "
      "%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  memcpy(out + threadIdx.x * 4, d, 16);
}
__global__ void mma_tf32_k8(const uint32_t* in, float* out) {
  const uint32_t* const a = in + threadIdx.x * 10;
  const uint32_t* const b = a + 4;
  float d[4];
  memcpy(d, b + 2, 16);
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  memcpy(out + threadIdx.x * 4, d, 16);
}
__global__ void mma_bf16_k8(const uint32_t* in, float* out) {
  const uint32_t* const a = in + threadIdx.x * 10;
  const uint32_t* const b = a + 4;
  float c[4], d[4];
  memcpy(c, b + 2, 16);
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, "
      "%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  memcpy(out + threadIdx.x * 4, d, 16);
}
__global__ void mma_bf16_k16(const uint32_t* in, float* out) {
  const uint32_t* const a = in + threadIdx.x * 10;
  const uint32_t* const b = a + 4;
  float d[4];
  memcpy(d, b + 2, 16);
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  memcpy(out + threadIdx.x * 4, d, 16);
}
__global__ void mma_f16_k8(const uint32_t* in, float* out) {
  const uint32_t* const a = in + threadIdx.x * 10;
  const uint32_t* const b = a + 4;
  float c[4], d[4];
  memcpy(c, b + 2, 16);
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  memcpy(out + threadIdx.x * 4, d, 16);
}
__global__ void mma_f16_k16(const uint32_t* in, float* out) {
  const uint32_t* const a = in + threadIdx.x * 10;
  const uint32_t* const b = a + 4;
  float d[4];
  memcpy(d, b + 2, 16);
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  memcpy(out + threadIdx.x * 4, d, 16);
}

// One block of 32; in [32] -> out [6, 32]: rounding to tf32, comparisons, selection, moves through a
// register.
__global__ void scalar_ptx(const float* in, uint32_t* out) {
  const int lane = threadIdx.x, x = lane - 16;
  uint32_t rounded, less, at_most, unsigned_greater, moved;
  uint64_t wide;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(in[lane]));
  asm volatile("{ .reg .pred p; setp.lt.s32 p, %1, -3; selp.b32 %0, 11, 22, p; }" : "=r"(less) : "r"(x));
  asm volatile("{ .reg .pred p; setp.le.s32 p, %1, 0x3; selp.b32 %0, 1, 0, p; }" : "=r"(at_most) : "r"(x));
  asm volatile("{ .reg .pred p; setp.gt.u32 p, %1, 3; selp.b32 %0, 1, 0, p; }"
               : "=r"(unsigned_greater)
               : "r"(x));
  asm volatile("{ .reg .b32 %%r; mov.b32 %%r, %1; mov.u32 %0, %%r; }" : "=r"(moved) : "r"(x));
  asm volatile("mov.b64 %0, %1;" : "=l"(wide) : "l"(in + lane));
  const uint32_t results[] = {rounded,          less,  at_most,
                              unsigned_greater, moved, wide == reinterpret_cast<uint64_t>(in + lane)};
  for (int k = 0; k < 6; ++k) out[k * 32 + lane] = results[k];
}

}  // namespace

// Runs one kernel by name; 2: there is no such kernel.
extern "C" int run_self_test(const char* name, const void* in, void* out) {
#define CASE(kernel, grid, block, shared_bytes, ...)                                                        \
  if (!strcmp(name, #kernel)) {                                                                             \
    return cuda_on_cpu::guarded([&] { KERNEL_LAUNCH(grid, block, shared_bytes, 0, kernel, __VA_ARGS__); }); \
  }
  const float* const floats = static_cast<const float*>(in);
  const int* const ints = static_cast<const int*>(in);
  const uint32_t* const words = static_cast<const uint32_t*>(in);
  float* const float_out = static_cast<float*>(out);
  int* const int_out = static_cast<int*>(out);
  uint32_t* const word_out = static_cast<uint32_t*>(out);
  CASE(shuffles, 1, 32, 0, floats, float_out)
  CASE(votes, 1, 96, 0, ints, word_out)
  CASE(indices, dim3(2, 3, 2), dim3(4, 3, 5), 0, int_out)
  CASE(reverse, 7, 128, 512, floats, float_out)
  CASE(atomics, 5, 64, 0, out)
  CASE(intrinsics, 1, 32, 0, ints, int_out)
  CASE(named_barriers, 1, 128, 0, floats, float_out)
  CASE(schedule, 1, 256, 0, int_out)
  CASE(async_copies, 1, 32, 1024, words, word_out)
  CASE(matrix_loads, 1, 32, 0, static_cast<const uint4*>(in), word_out)
  CASE(mma_tf32_k4, 1, 32, 0, words, float_out)
  CASE(mma_tf32_k8, 1, 32, 0, words, float_out)
  CASE(mma_bf16_k8, 1, 32, 0, words, float_out)
  CASE(mma_bf16_k16, 1, 32, 0, words, float_out)
  CASE(mma_f16_k8, 1, 32, 0, words, float_out)
  CASE(mma_f16_k16, 1, 32, 0, words, float_out)
  CASE(scalar_ptx, 1, 32, 0, floats, word_out)
  return 2;
}
