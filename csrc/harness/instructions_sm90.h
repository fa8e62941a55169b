// The instructions of sm_90 behind the PTX interpreter: memory barriers, tensor copies (TMA) and warpgroup
// products (wgmma). `name` is the instruction's text, as in instructions.h.
#pragma once

#include <vector>

#include "harness/instructions.h"
#include "harness/state.h"

namespace cuda_on_cpu {

// ---- mbarrier: 8 bytes of shared memory that count arrivals and bytes; a
// phase ends when both have come ----

void init_memory_barrier(uint64_t* barrier, unsigned arrivals, Site site);
void invalidate_memory_barrier(uint64_t* barrier, Site site);
void fence_memory_barrier_init();  // fence.mbarrier_init and fence.proxy.async
void expect_bytes(uint64_t* barrier, int64_t bytes, Site site);
void arrive(uint64_t* barrier, unsigned count, Site site);
// try_wait: whether the phase of this parity has ended. Waits for that as a rule, but now and then returns
// false early, as the hardware may.
bool wait_for_phase(uint64_t* barrier, unsigned parity, Site site);
// Orders what ThreadSanitizer knows of a copy, at its issue, before the end of the barrier's phase.
void release_copy(uint64_t* barrier);
// What a copy does when its bytes have come; from outside the kernel.
void complete_bytes(Block& block, uint64_t* barrier, int64_t bytes, Site site);

// ---- TMA: boxes of a tensor of up to 5 dims, zeros outside it, swizzled into
// shared memory ----

// cuTensorMapEncodeTiled.
int encode_tensor_map(void* map, int type, unsigned rank, void* address, const uint64_t* sizes,
                      const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                      int interleave, int swizzle, int l2_promotion, int out_of_bounds);
// cp.async.bulk.tensor: the box whose first element is `corner`, the fastest dim first.
void copy_tensor(uint32_t destination, const void* map, const std::vector<int32_t>& corner, uint64_t* barrier,
                 Site site);
void check_tensor_map(const void* map, Site site);

// ---- wgmma: D[64, columns] += A[64, depth] * B[depth, columns], operands in
// shared memory ----

struct WarpgroupProduct {
  MmaElement element;
  int columns, depth;           // n and k of the shape
  uint64_t a, b;                // matrix descriptors
  bool accumulate;              // scale-d
  int scale_a, scale_b;         // 1 or -1
  bool a_mn_major, b_mn_major;  // tnspA, tnspB
  std::vector<float*> d;        // this thread's accumulators
};
void warpgroup_product(const char* name, WarpgroupProduct& product, Site site);
void warpgroup_fence();
void warpgroup_commit_group();
void warpgroup_wait_group(const char* name, unsigned pending_groups, Site site);

// Where the descriptor finds an operand of wgmma: the shared address of the 16 bytes that begin at element
// (mn, k), mn or k (whichever is contiguous) a multiple of what they hold.
uint32_t descriptor_address(uint64_t descriptor, bool mn_major, int mn, int k, int element_bytes, Site site);
// Moves the 16-byte chunks of `address` as the swizzle over `span` bytes (128, 64, 32, or 16: none) does.
uint32_t swizzled(uint32_t address, int span);

}  // namespace cuda_on_cpu
