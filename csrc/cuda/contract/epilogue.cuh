// What happens to a warp's share of the tile G_n[o, i] when sample n is complete, and at the end.
#pragma once

#include "cuda/common/moments.cuh"
#include "cuda/common/ptx.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/contract/slab.cuh"

namespace backpack_cuda::cuda {

template <class T, int kCount>
struct alignas(kCount * sizeof(T)) Run {
  T values[kCount];
};

// Stores value(m, r, run, e), a warp's share of the tile, into out [R, I]. (row0, column0): of the warp in
// the tile. weight_columns: of the tile's columns, -1 past the edge, where they are not in order; else null.
template <class Fragments, bool kOwnOrder, class T, class Value>
__device__ __forceinline__ void store_tile(const ContractParams& params, const ContractBlock& block, int row0,
                                           int column0, const int* weight_columns, T* out,
                                           const Value& value) {
  constexpr int kRun = Fragments::kRun;
  const int lane = compute_late(threadIdx.x) % 32;
  out += static_cast<int64_t>(block.group) * params.O * params.I;
#pragma unroll
  for (int m = 0; m < Fragments::kM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int o = block.row + row0 + Fragments::row(lane, m, r);
      if (o >= params.O) continue;
      T* const row = out + static_cast<int64_t>(o) * params.I;
#pragma unroll
      for (int run = 0; run < Fragments::kRuns; ++run) {
        const int column = column0 + Fragments::run_column(lane, run), i = block.column + column;
        if constexpr (kOwnOrder) {
#pragma unroll
          for (int e = 0; e < kRun; ++e) {
            const int weight_column = weight_columns[column + e];
            if (weight_column >= 0) row[weight_column] = static_cast<T>(value(m, r, run, e));
          }
        } else if (params.vector_stores && i + kRun <= params.I) {
          Run<T, kRun> values;
#pragma unroll
          for (int e = 0; e < kRun; ++e) values.values[e] = static_cast<T>(value(m, r, run, e));
          *reinterpret_cast<Run<T, kRun>*>(row + i) = values;
        } else {
#pragma unroll
          for (int e = 0; e < kRun; ++e) {
            if (i + e < params.I) row[i + e] = static_cast<T>(value(m, r, run, e));
          }
        }
      }
    }
  }
}

// What the epilogues share: the block's tile of the weight, and a walk over a warp's share of it.
template <class Traits>
class TileEpilogue {
 public:
  using Element = typename Traits::Element;
  using Fragments = typename Traits::Fragments;
  using Accumulator = typename Fragments::Accumulator;

 protected:
  __device__ __forceinline__ TileEpilogue(const ContractParams& params, const typename Traits::Shared& shared)
      : params_(params), shared_(shared) {}

  __device__ __forceinline__ int64_t elements() const {
    return static_cast<int64_t>(params_.groups) * params_.O * params_.I;
  }
  template <class T, class Value>
  __device__ __forceinline__ void store(T* out, const Value& value) const {
    const int warp = threadIdx.x / 32;
    store_tile<Fragments, Traits::kOwnOrder>(params_, shared_.block, Traits::warp_o(warp),
                                             Traits::warp_i(warp), shared_.weight_columns, out, value);
  }
  template <class Do>
  static __device__ __forceinline__ void each(const Do& apply) {
#pragma unroll
    for (int m = 0; m < Fragments::kM; ++m) {
#pragma unroll
      for (int c = 0; c < Fragments::kN; ++c) {
#pragma unroll
        for (int r = 0; r < 4; ++r) apply(m, c, r);
      }
    }
  }

  const ContractParams& params_;
  const typename Traits::Shared& shared_;
};

// First order.
template <class Traits>
class StatsEpilogue : public TileEpilogue<Traits> {
  using Base = TileEpilogue<Traits>;
  using Base::each, Base::elements, Base::params_, Base::shared_, Base::store;

 public:
  using typename Base::Accumulator, typename Base::Element, typename Base::Fragments;

  __device__ __forceinline__ StatsEpilogue(const ContractParams& params,
                                           const typename Traits::Shared& shared)
      : Base(params, shared) {}

  // G_n is complete. The warp's share of its squared norm goes to *norm.
  __device__ __forceinline__ void sample(const Accumulator& g, int n, float* norm) {
    if constexpr (kSquares) {
      if (params_.centered) {
        const SampleWeights weights(n - shared_.block.n_begin);
        each(
            [&](int m, int c, int r) { add_centered(g[m][c][r], weights, sum_[m][c][r], square_[m][c][r]); });
      } else {
        each([&](int m, int c, int r) {
          sum_[m][c][r] += g[m][c][r];
          square_[m][c][r] = fmaf(g[m][c][r], g[m][c][r], square_[m][c][r]);
        });
      }
    } else {
      const float weight = params_.weights ? params_.weights[n] : 1.f;
      each([&](int m, int c, int r) { sum_[m][c][r] = fmaf(weight, g[m][c][r], sum_[m][c][r]); });
    }
    if (params_.norms) {  // zeros past the edge add nothing
      float parts[4] = {};
      each([&](int m, int c, int r) { parts[r] = fmaf(g[m][c][r], g[m][c][r], parts[r]); });
      const float total = sum_over_warp((parts[0] + parts[1]) + (parts[2] + parts[3]));
      if (threadIdx.x % 32 == 0) *norm = total;
    }
    if (params_.batch_grad) {
      Element* const out = static_cast<Element*>(params_.batch_grad) + n * elements();
      store(out, [&](int m, int r, int run, int e) { return Fragments::value(g, m, r, run, e); });
    }
  }

  // `part` is this block's of the partial sums.
  __device__ __forceinline__ void finish(int part) const {
    const auto sum = [&](int m, int r, int run, int e) { return Fragments::value(sum_, m, r, run, e); };
    if (params_.partial_sums) {
      store(params_.partial_sums + part * elements(), sum);
    } else if (params_.grad) {
      store(static_cast<Element*>(params_.grad), sum);
    }
    if constexpr (kSquares) {
      const auto square = [&](int m, int r, int run, int e) {
        return Fragments::value(square_, m, r, run, e);
      };
      if (params_.partial_squares) {
        store(params_.partial_squares + part * elements(), square);
        return;
      }
      if (params_.centered) {
        store(params_.sum_grad_centered_squared, square);
      }
      if (params_.sum_grad_squared) {
        const float inverse_N = 1.f / static_cast<float>(params_.N);
        store(params_.sum_grad_squared, [&](int m, int r, int run, int e) {
          return params_.centered ? uncentered(square(m, r, run, e), sum(m, r, run, e), inverse_N)
                                  : square(m, r, run, e);
        });
      }
    }
  }

 private:
  static constexpr bool kSquares = Traits::kMode == ContractMode::kSquares;

  Accumulator sum_ = {}, square_ = {};  // unused ones cost nothing
};

// Second order. Squares are added up for each n, and only then to those of the others: the sums stay short.
template <class Traits>
class ColumnsEpilogue : public TileEpilogue<Traits> {
  using Base = TileEpilogue<Traits>;
  using Base::each, Base::elements, Base::params_, Base::shared_, Base::store;

 public:
  using typename Base::Accumulator, typename Base::Element, typename Base::Fragments;

  __device__ __forceinline__ ColumnsEpilogue(const ContractParams& params,
                                             const typename Traits::Shared& shared)
      : Base(params, shared) {}

  // G_vn is complete, or with splits of the positions a part of it.
  __device__ __forceinline__ void sample(const Accumulator& g, int sample, float*) {
    const unsigned V = params_.V, n = static_cast<unsigned>(sample) / V, v = sample - n * V;
    const int64_t row = int64_t{v} * params_.N + n;
    if (params_.factor) {
      Element* const out = static_cast<Element*>(params_.factor) + row * elements();
      store(out, [&](int m, int r, int run, int e) { return Fragments::value(g, m, r, run, e); });
    }
    if (params_.parts) {
      const int part = blockIdx.x / (params_.tiles_i * params_.tiles_o * params_.groups);
      store(params_.parts + part * elements(),
            [&](int m, int r, int run, int e) { return Fragments::value(g, m, r, run, e); });
    }
    if (!params_.squares) return;
    const float sign = params_.signs ? params_.signs[row] : 1.f;
    each([&](int m, int c, int r) {
      square_[m][c][r] = fmaf(sign * g[m][c][r], g[m][c][r], square_[m][c][r]);
    });
    if (v + 1 < V && sample + 1 < shared_.block.n_end) return;
    if (params_.batch_diag) {
      store(params_.batch_diag + n * elements(),
            [&](int m, int r, int run, int e) { return Fragments::value(square_, m, r, run, e); });
    }
    each([&](int m, int c, int r) {
      diag_[m][c][r] += square_[m][c][r];
      square_[m][c][r] = 0.f;
    });
  }

  // `part` is this block's of the partial sums.
  __device__ __forceinline__ void finish(int part) const {
    float* const out = params_.partial_sums ? params_.partial_sums + part * elements() : params_.diag;
    if (out) store(out, [&](int m, int r, int run, int e) { return Fragments::value(diag_, m, r, run, e); });
  }

 private:
  Accumulator square_ = {}, diag_ = {};
};

template <class Traits>
using Epilogue = std::conditional_t<Traits::kColumns, ColumnsEpilogue<Traits>, StatsEpilogue<Traits>>;

}  // namespace backpack_cuda::cuda
