// What CuTe, NVIDIA's own library, knows of sm_90 against what the harness and contract_sm90 make of it: no
// GPU is at hand to ask. Operands are placed by CuTe's layouts, described by CuTe's matrix descriptors and
// read by the harness's wgmma; CuTe's TMA copies are made through the harness's tensor maps; and the
// descriptors and maps of contract_sm90 must be CuTe's, bit for bit. Compiled for the harness only.
#include <vector>

#include "cuda/common/kernel.h"
// After the device language, and in this order.
#include <cute/tensor.hpp>

#include <cute/atom/copy_atom.hpp>
#include <cute/atom/mma_atom.hpp>

#include <cutlass/arch/barrier.h>
#include <cute/arch/copy_sm90_tma.hpp>

#include "cuda/contract_sm90/contract_sm90.cuh"
#include "cuda/contract_sm90/dense_rows.h"
#include "harness/guarded_call.h"
#include "harness/instructions_sm90.h"

namespace {

using namespace cute;
using backpack_cuda::cuda::DenseRows;
using backpack_cuda::cuda::Element;
using cuda_on_cpu::Site;

constexpr int kDepth = 64;                 // k of the operands: four wgmmas
constexpr size_t kSharedBytes = 96 << 10;  // enough for all, and above the size from which it is 1024-aligned

uint32_t shared_number(const void* pointer) { return uint32_t(__cvta_generic_to_shared(pointer)); }

// How many of the elements [mn, 16] of the k-th wgmma the harness finds elsewhere than CuTe put them.
template <class Tensor>
int misplaced(const Tensor& operand, uint64_t descriptor, bool mn_major, int k0) {
  int count = 0;
  for (int mn = 0; mn < int(size<0>(operand)); ++mn) {
    for (int k = 0; k < 16; ++k) {
      const int along = mn_major ? mn % 8 : k % 8;  // within 16 bytes
      const uint32_t chunk =
          cuda_on_cpu::descriptor_address(descriptor, mn_major, mn_major ? mn - along : mn,
                                          mn_major ? k : k - along, 2, Site{__FILE__, __LINE__});
      count += chunk + 2 * along != shared_number(&operand(mn, k0 + k));
    }
  }
  return count;
}

// One block of 128. a [64, 64], b [kN, 64] -> out [64, kN] = a b^T; report: elements misplaced in A and in B.
template <class Half, int kN, class AtomA, GMMA::Major kMajorA, class AtomB, GMMA::Major kMajorB, class Order>
__global__ void product(const Half* a, const Half* b, float* out, int* report) {
  KERNEL_DYNAMIC_SHARED(unsigned char, raw);
  using LayoutA = decltype(tile_to_shape(AtomA{}, Shape<_64, Int<kDepth>>{}, Order{}));
  using LayoutB = decltype(tile_to_shape(AtomB{}, Shape<Int<kN>, Int<kDepth>>{}, Order{}));
  auto sA = make_tensor(make_smem_ptr(reinterpret_cast<Half*>(raw)), LayoutA{});
  auto sB = make_tensor(make_smem_ptr(reinterpret_cast<Half*>(raw + 2 * 64 * kDepth)), LayoutB{});
  for (int e = threadIdx.x; e < 64 * kDepth; e += 128) sA(e / kDepth, e % kDepth) = a[e];
  for (int e = threadIdx.x; e < kN * kDepth; e += 128) sB(e / kDepth, e % kDepth) = b[e];
  cutlass::arch::fence_view_async_shared();
  __syncthreads();

  auto mma =
      make_tiled_mma(GMMA::ss_op_selector<Half, Half, float, Shape<_64, Int<kN>, _16>, kMajorA, kMajorB>());
  auto mine = mma.get_slice(threadIdx.x);
  auto rA = mine.make_fragment_A(mine.partition_A(sA));
  auto rB = mine.make_fragment_B(mine.partition_B(sB));
  static_assert(size<1>(rA) == 1 && size<1>(rB) == 1, "one instruction covers all rows and columns");
  auto accumulators = partition_fragment_C(mma, Shape<_64, Int<kN>>{});
  clear(accumulators);
  warpgroup_fence_operand(accumulators);
  warpgroup_arrive();
  gemm(mma, rA, rB, accumulators);
  warpgroup_commit_batch();
  warpgroup_wait<0>();
  warpgroup_fence_operand(accumulators);

  auto places = mine.partition_C(make_identity_tensor(Shape<_64, Int<kN>>{}));
  for (int r = 0; r < int(size(accumulators)); ++r) {
    out[get<0>(places(r)) * kN + get<1>(places(r))] = accumulators(r);
  }
  if (threadIdx.x != 0) return;
  report[0] = report[1] = 0;
  for (int k = 0; k < kDepth / 16; ++k) {
    report[0] += misplaced(sA, rA(0, 0, k).desc_, kMajorA == GMMA::Major::MN, 16 * k);
    report[1] += misplaced(sB, rB(0, 0, k).desc_, kMajorB == GMMA::Major::MN, 16 * k);
  }
}

template <class Half, int kN, class AtomA, GMMA::Major kMajorA, class AtomB, GMMA::Major kMajorB, class Order>
void run_product(const void* a, const void* b, float* out, int* report) {
  auto* const kernel = &product<Half, kN, AtomA, kMajorA, AtomB, kMajorB, Order>;
  KERNEL_LAUNCH(dim3(1), dim3(128), kSharedBytes, nullptr, kernel, static_cast<const Half*>(a),
                static_cast<const Half*>(b), out, report);
}

// ---- contract_sm90: its operand is [128 columns, 64 t] of boxes [64 columns, 64 t] ----

template <class Half>
using BoxedLayout =
    decltype(tile_to_shape(GMMA::Layout_MN_SW128_Atom<Half>{}, Shape<_128, _64>{}, Step<_2, _1>{}));

// One block of 128. report: bits that differ between our descriptors and CuTe's, for the two halves of A, for
// B, and for the boxes' own addresses.
template <class Half>
__global__ void descriptors(int* report) {
  namespace ours = backpack_cuda::cuda::sm90;
  KERNEL_DYNAMIC_SHARED(unsigned char, raw);
  auto tile = make_tensor(make_smem_ptr(reinterpret_cast<Half*>(raw)), BoxedLayout<Half>{});
  auto mma = make_tiled_mma(
      GMMA::ss_op_selector<Half, Half, float, Shape<_64, _128, _16>, GMMA::Major::MN, GMMA::Major::MN>());
  auto mine = mma.get_slice(threadIdx.x);
  auto rA = mine.make_fragment_A(mine.partition_A(tile));  // (1, 2 halves, 4)
  auto rB = mine.make_fragment_B(mine.partition_B(tile));  // (1, 1, 4)
  if (threadIdx.x != 0) return;
  for (int k = 0; k < 4; ++k) {
    const uint64_t b =
        ours::matrix_descriptor(ours::shared_address(raw), ours::kBoxBytes) + k * ours::kDepthBytes;
    report[0] += __builtin_popcountll(b ^ rB(0, 0, k).desc_);
    for (int half = 0; half < 2; ++half) {
      const uint32_t address = ours::shared_address(raw + half * ours::kBoxBytes);
      const uint64_t a = ours::matrix_descriptor(address, ours::kBoxBytes) + k * ours::kDepthBytes;
      // With 64 rows there is no next box, and the field for its distance is unused.
      constexpr uint64_t kUnused = 0x3fffull << 16;
      report[1] += __builtin_popcountll((a ^ rA(0, half, k).desc_) & ~kUnused);
    }
  }
  for (int c = 0; c < 128; ++c) {
    for (int t = 0; t < 64; ++t) {
      const uint32_t plain = ours::shared_address(raw) + c / 64 * ours::kBoxBytes + t * 128 + c % 64 * 2;
      report[2] += shared_number(&tile(c, t)) != cuda_on_cpu::swizzled(plain, 128);
    }
  }
}

// One block of 32. The tile [128 columns, 64 t] at (c0, t0, n) through CuTe's copy -> out [128, 64].
template <class Half, class Map>
__global__ void tensor_copy(const __grid_constant__ Map map, int C, int T, int N, int c_tile, int t_tile,
                            int n, Half* out) {
  using Barrier = cutlass::arch::ClusterTransactionBarrier;
  KERNEL_DYNAMIC_SHARED(unsigned char, raw);
  KERNEL_SHARED(full, uint64_t);
  auto tile = make_tensor(make_smem_ptr(reinterpret_cast<Half*>(raw)), BoxedLayout<Half>{});
  auto tensor = map.get_tma_tensor(make_shape(C, T, N));
  auto box = local_tile(tensor, Shape<_128, _64>{}, make_coord(c_tile, t_tile, n));
  auto [from, to] =
      tma_partition(map, Int<0>{}, Layout<_1>{}, group_modes<0, 2>(tile), group_modes<0, 2>(box));
  if (threadIdx.x == 0) {
    Barrier::init(&full, 1);
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();
  if (cute::elect_one_sync()) {
    Barrier::arrive_and_expect_tx(&full, 128 * 64 * 2);
    copy(map.with(full), from, to);
  }
  Barrier::wait(&full, 0);
  for (int e = threadIdx.x; e < 128 * 64; e += 32) out[e] = tile(e / 64, e % 64);
}

template <class Half>
void run_tensor_copy(const void* data, const int* sizes, int* report, void* out) {
  const int C = sizes[0], T = sizes[1], N = sizes[2], row = sizes[3], sample = sizes[4];
  auto tensor = make_tensor(make_gmem_ptr(static_cast<const Half*>(data)), make_shape(C, T, N),
                            make_stride(_1{}, row, sample));
  auto map = make_tma_copy(SM90_TMA_LOAD{}, tensor, BoxedLayout<Half>{});
  const DenseRows rows{data, N, T, C, sample, row};
  CUtensorMap ours;
  backpack_cuda::cuda::make_tensor_map(
      rows, std::is_same_v<Half, half_t> ? Element::kFloat16 : Element::kBFloat16, &ours);
  report[0] = memcmp(&ours, map.get_tma_descriptor(), sizeof ours) != 0;
  auto* const kernel = &tensor_copy<Half, decltype(map)>;
  KERNEL_LAUNCH(dim3(1), dim3(32), kSharedBytes, nullptr, kernel, map, C, T, N, sizes[5], sizes[6], sizes[7],
                static_cast<Half*>(out));
}

}  // namespace

// Runs a product by name; 2: there is no such.
extern "C" int run_cute_product(const char* name, const void* a, const void* b, float* out, int* report) {
  using MnFirst = Step<_1, _2>;
  using KFirst = Step<_2, _1>;
#define PRODUCT(Half, N, atom_a, major_a, atom_b, major_b, Order)                                         \
  if (!strcmp(name, #Half "_" #N "_" #major_a "_" #atom_a "_" #major_b "_" #atom_b "_" #Order)) {         \
    return cuda_on_cpu::guarded([&] {                                                                     \
      run_product<Half, N, GMMA::Layout_##major_a##_##atom_a##_Atom<Half>, GMMA::Major::major_a,          \
                  GMMA::Layout_##major_b##_##atom_b##_Atom<Half>, GMMA::Major::major_b, Order>(a, b, out, \
                                                                                               report);   \
    });                                                                                                   \
  }
  PRODUCT(bfloat16_t, 128, SW128, MN, SW128, MN, KFirst)
  PRODUCT(half_t, 128, SW128, MN, SW128, MN, KFirst)
  PRODUCT(bfloat16_t, 256, SW128, MN, SW128, MN, MnFirst)
  PRODUCT(half_t, 64, SW64, MN, SW32, MN, KFirst)
  PRODUCT(bfloat16_t, 96, SW32, MN, SW64, K, MnFirst)
  PRODUCT(bfloat16_t, 32, INTER, MN, INTER, MN, MnFirst)
  PRODUCT(half_t, 64, INTER, MN, INTER, K, KFirst)
  PRODUCT(bfloat16_t, 128, SW128, K, SW128, MN, KFirst)
  PRODUCT(half_t, 128, SW128, K, SW128, K, MnFirst)
  PRODUCT(bfloat16_t, 8, SW64, K, SW32, K, KFirst)
  PRODUCT(half_t, 32, INTER, K, SW128, K, MnFirst)
#undef PRODUCT
  return 2;
}

extern "C" int compare_descriptors(int is_half, int* report) {
  return cuda_on_cpu::guarded([&] {
    auto* const kernel = is_half ? &descriptors<half_t> : &descriptors<bfloat16_t>;
    KERNEL_LAUNCH(dim3(1), dim3(128), kSharedBytes, nullptr, kernel, report);
  });
}

extern "C" int run_cute_tensor_copy(int is_half, const void* data, const int* sizes, int* report, void* out) {
  return cuda_on_cpu::guarded([&] {
    is_half ? run_tensor_copy<half_t>(data, sizes, report, out)
            : run_tensor_copy<bfloat16_t>(data, sizes, report, out);
  });
}
