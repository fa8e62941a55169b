// A block's tile: its share of warps, its slabs and its products, by precision.
#pragma once

#include <type_traits>

#include "cuda/contract/fragments.cuh"

namespace backpack_cuda::cuda {

template <ContractPrecision kPrecision, ContractTile kTile, bool kAlongT>
struct TensorTile {
  static constexpr bool kHalf =
      kPrecision == ContractPrecision::kBFloat16 || kPrecision == ContractPrecision::kFloat16;
  using Element = std::conditional_t<
      !kHalf, float, std::conditional_t<kPrecision == ContractPrecision::kBFloat16, __nv_bfloat16, __half>>;
  // A warp's 64x32 or 32x32 share: with the sum and the squares, three such tiles fit its registers.
  static constexpr int kEdge = kTile == ContractTile::k64 ? 64 : 128, kWarpO = kEdge / 2, kWarpI = 32;
  static constexpr int kWarpsI = kEdge / kWarpI, kWarps = 2 * kWarpsI, kThreads = 32 * kWarps;
  static constexpr int kBlocks = kTile == ContractTile::k64 ? 3 : 1;  // per multiprocessor
  static constexpr int kDepth = kHalf ? 16 : 8, kRows = 2 * kDepth;   // positions of an mma, of a slab

  static __device__ __forceinline__ int warp_o(int warp) { return warp / kWarpsI * kWarpO; }
  static __device__ __forceinline__ int warp_i(int warp) { return warp % kWarpsI * kWarpI; }

  using TileSlab = Slab<Element, kRows, kEdge, kAlongT>;
  template <class B, class A>
  struct Select {
    using type = Tf32Fragments<B, A, kWarpO, kWarpI, kPrecision == ContractPrecision::kTf32 ? 1 : 3>;
  };
  template <class B, class A>
    requires(sizeof(typename B::Element) == 2)
  struct Select<B, A> {
    using type = HalfFragments<B, A, kWarpO, kWarpI>;
  };
  using Fragments = typename Select<TileSlab, TileSlab>::type;
};

}  // namespace backpack_cuda::cuda
