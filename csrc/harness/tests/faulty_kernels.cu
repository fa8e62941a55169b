// Kernels with one planted fault each: test_harness.py checks that the harness catches every one of them, and
// how.
#include <cstdint>
#include <cstring>

#include "cuda/common/kernel.h"
#include "harness/guarded_call.h"

namespace {

// ---- reported as errors ----

__global__ void divergent_barrier(float*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void exit_before_barrier(float*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void barrier_in_one_warp(float*) {  // warp 1 meanwhile waits at another barrier
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    asm volatile("bar.sync 3, 64;" ::: "memory");
  }
}

__global__ void shuffle_with_absent_lanes(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffffffu, 1.f, 0);
  __syncthreads();
}

__global__ void shuffle_outside_own_mask(float* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.f, 0); }

__global__ void mma_with_half_a_warp(float* out) {
  float d[4] = {};
  asm volatile(
      "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %4}, {%4}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(0));
  out[threadIdx.x] = d[0];
}

__global__ void mma_with_a_missing_register(float* out) {
  float d[4] = {};
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %4}, {%4}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(0));
  out[threadIdx.x] = d[0];
}

__global__ void mma_of_floats(float* out) {  // operands must be "r", as the hardware's registers
  float d[4] = {};
  asm volatile(
      "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %4}, {%4}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "f"(1.f));
  out[threadIdx.x] = d[0];
}

__global__ void unknown_instruction(float*) { asm volatile("sub.rn.f64x7 %0, %0, %0;" ::"r"(0)); }

__global__ void written_input(float*) { asm volatile("mov.b32 %0, 1;" ::"r"(0)); }

__global__ void undefined_register(float* out) {
  uint32_t x;
  asm volatile("mov.b32 %0, never_set;" : "=r"(x));
  out[0] = float(x);
}

__global__ void unknown_literal(float* out) {
  uint32_t x;
  asm volatile("mov.b32 %0, 0f3F800000;" : "=r"(x));
  out[0] = float(x);
}

__global__ void misaligned_async_copy(float* out) {
  KERNEL_DYNAMIC_SHARED(float, staged);
  const uint32_t address = uint32_t(__cvta_generic_to_shared(staged + 1));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(out));
}

__global__ void async_copy_to_global_memory(float* out) {
  const uint32_t address = uint32_t(__cvta_generic_to_shared(out));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(out));
}

__global__ void async_copy_past_shared_memory(float* out) {
  KERNEL_DYNAMIC_SHARED(float, staged);
  const uint32_t address = uint32_t(__cvta_generic_to_shared(staged)) + 128;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(out));
}

__global__ void misaligned_matrix_row(float* out) {
  KERNEL_DYNAMIC_SHARED(float, staged);
  uint32_t x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(x)
               : "r"(uint32_t(__cvta_generic_to_shared(staged + 1))));
  out[0] = float(x);
}

__global__ void too_much_static_shared_memory(float* out) {
  KERNEL_SHARED(large, float[13000]);
  out[0] = large[0];
}

// ---- a wrong result ----

__global__ void uninitialised_dynamic(float* out) {
  KERNEL_DYNAMIC_SHARED(float, staged);
  out[threadIdx.x] = staged[threadIdx.x];
}

__global__ void uninitialised_static(float* out) {
  KERNEL_SHARED(staged, float[32]);
  out[threadIdx.x] = staged[threadIdx.x];
}

__global__ void missing_syncwarp(float* out) {
  KERNEL_SHARED(staged, float[32]);
  staged[threadIdx.x] = 1.f;
  out[threadIdx.x] = staged[31 - threadIdx.x];
}

__global__ void missing_syncthreads(float* out) {
  KERNEL_SHARED(staged, float[128]);
  staged[threadIdx.x] = 1.f;
  out[threadIdx.x] = staged[127 - threadIdx.x];
}

__global__ void missing_syncthreads_before_reuse(float* out) {
  KERNEL_SHARED(staged, float[128]);
  float sum = 0;
  for (int k = 0; k < 4; ++k) {
    staged[threadIdx.x] = float(k);
    __syncthreads();
    sum += staged[127 - threadIdx.x];
  }
  out[threadIdx.x] = sum / 6;  // 1 when correct
}

__global__ void missing_async_wait(const float* in, float* out) {
  KERNEL_DYNAMIC_SHARED(float, staged);
  const uint32_t address = uint32_t(__cvta_generic_to_shared(staged + threadIdx.x));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(in + threadIdx.x));
  asm volatile("cp.async.commit_group;");
  asm volatile("cp.async.wait_group 1;");
  out[threadIdx.x] = staged[threadIdx.x];
}

__global__ void missing_syncthreads_before_refill(const float* in, float* out) {
  KERNEL_DYNAMIC_SHARED(float, staged);
  const uint32_t address = uint32_t(__cvta_generic_to_shared(staged + threadIdx.x));
  float difference = 0;
  for (int k = 0; k < 4; ++k) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address),
                 "l"(in + (threadIdx.x + k) % 128));
    asm volatile("cp.async.wait_all;");
    __syncthreads();
    difference += staged[127 - threadIdx.x] - in[(127 - threadIdx.x + k) % 128];
  }
  out[threadIdx.x] = 1 + difference;
}

// ---- a report of a sanitizer, or a fault ----

__global__ void unsynchronised_add(float* out) {
  if (threadIdx.x == 0) out[0] += 1.f;
}

__global__ void shared_index_too_far(float* out) {
  KERNEL_DYNAMIC_SHARED(float, staged);
  staged[threadIdx.x + 1] = 1.f;
  out[threadIdx.x] = 1.f;
}

__global__ void static_index_too_far(float* out) {
  KERNEL_SHARED(staged, float[32]);
  float* const second =
      &staged[1];  // an array's own bounds would already be checked by UndefinedBehaviorSanitizer
  second[threadIdx.x] = 1.f;
  out[threadIdx.x] = 1.f;
}

__global__ void global_index_too_far(float* out) { out[threadIdx.x + 1] = 1.f; }  // out [128], 128 threads

__global__ void async_copy_reads_too_far(float* out) {  // out [128], 128 threads
  KERNEL_DYNAMIC_SHARED(float, staged);
  const uint32_t address = uint32_t(__cvta_generic_to_shared(staged + threadIdx.x));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(out + threadIdx.x + 1));
  asm volatile("cp.async.wait_all;");
  out[threadIdx.x] = staged[threadIdx.x];
}

}  // namespace

// Runs one kernel by name; in and out hold 128 floats, out all ones; ones are also
// the right result. 2: there is no such kernel.
extern "C" int run_faulty_kernel(const char* name, const float* in, float* out) {
#define CASE(kernel, grid, block, shared_bytes, ...)                                                        \
  if (!strcmp(name, #kernel)) {                                                                             \
    return cuda_on_cpu::guarded([&] { KERNEL_LAUNCH(grid, block, shared_bytes, 0, kernel, __VA_ARGS__); }); \
  }
  CASE(divergent_barrier, 1, 64, 0, out)
  CASE(exit_before_barrier, 1, 64, 0, out)
  CASE(barrier_in_one_warp, 1, 64, 0, out)
  CASE(shuffle_with_absent_lanes, 1, 32, 0, out)
  CASE(shuffle_outside_own_mask, 1, 32, 0, out)
  CASE(mma_with_half_a_warp, 1, 16, 0, out)
  CASE(mma_with_a_missing_register, 1, 32, 0, out)
  CASE(mma_of_floats, 1, 32, 0, out)
  CASE(unknown_instruction, 1, 32, 0, out)
  CASE(written_input, 1, 32, 0, out)
  CASE(undefined_register, 1, 32, 0, out)
  CASE(unknown_literal, 1, 32, 0, out)
  CASE(misaligned_async_copy, 1, 32, 128, out)
  CASE(async_copy_to_global_memory, 1, 32, 0, out)
  CASE(async_copy_past_shared_memory, 1, 32, 128, out)
  CASE(misaligned_matrix_row, 1, 32, 128, out)
  CASE(too_much_static_shared_memory, 1, 32, 0, out)
  CASE(uninitialised_dynamic, 1, 128, 512, out)
  CASE(uninitialised_static, 1, 32, 0, out)
  CASE(missing_syncwarp, 1, 32, 0, out)
  CASE(missing_syncthreads, 1, 128, 0, out)
  CASE(missing_syncthreads_before_reuse, 1, 128, 0, out)
  CASE(missing_async_wait, 1, 128, 512, in, out)
  CASE(missing_syncthreads_before_refill, 1, 128, 512, in, out)
  CASE(unsynchronised_add, 3, 32, 0, out)
  CASE(shared_index_too_far, 1, 128, 512, out)
  CASE(static_index_too_far, 1, 32, 0, out)
  CASE(global_index_too_far, 1, 128, 0, out)
  CASE(async_copy_reads_too_far, 1, 128, 512, out)
  return 2;
}

// A launch of this size; the kernel does nothing.
__global__ void empty_kernel() {}
extern "C" int run_empty_kernel(unsigned grid, unsigned grid_y, unsigned block, size_t shared_bytes) {
  return cuda_on_cpu::guarded(
      [&] { KERNEL_LAUNCH(dim3(grid, grid_y), block, shared_bytes, 0, empty_kernel); });
}
