// How the work of square_gemm is cut.
#include <algorithm>
#include <stdexcept>

#include "common/integers.h"
#include "cuda/square_gemm/square_gemm.h"

namespace backpack_cuda::cuda {
namespace {

int64_t align(int64_t bytes) { return round_up(bytes, 256); }

int copy_bytes(const SquareOperand& x, const SquareGemmParams& p, int columns) {
  const int size = element_size(p.element);
  if (x.stride_c != 1 && columns > 1) return 0;
  const auto divides = [&](int bytes) {
    return columns * size % bytes == 0 && reinterpret_cast<uintptr_t>(x.data) % bytes == 0 &&
           (p.N == 1 || x.stride_n * size % bytes == 0);
  };
  return divides(16) ? 16 : divides(4) ? 4 : 0;
}

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Clocks of the chip on a model of an H100 (assumptions, not measurements): per multiprocessor and clock,
// mma.sync does 1300 TF32 or 2600 16-bit flops, 24 bytes come from the L2 cache and 12 go there; a load takes
// 1000 clocks, and three slabs of a block are on their way.
struct Model {
  const SquareGemmParams& p;
  int sm_count;
  bool sums;

  int blocks_per_multiprocessor(int tile) const { return tile == 128 ? 1 : 3; }  // registers: square_gemm.cuh
  int64_t places(int tile) const { return int64_t{sm_count} * blocks_per_multiprocessor(tile); }
  int64_t tiles(int tile) const { return ceil_div(p.O, tile) * ceil_div(p.I, tile); }
  int slab_rows() const { return p.element == Element::kFloat32 ? 16 : 32; }
  int64_t slabs() const { return ceil_div(p.N, slab_rows()); }

  double clocks(int tile, int64_t splits) const {
    const double area = double(tile) * tile, terms = p.element == Element::kFloat32 && !p.tf32 ? 3 : 1;
    const double sum_share = !sums ? 0 : p.element == Element::kFloat32 ? 1 : 0.5;
    const double products = 2 * area * slab_rows() * terms * (1 + sum_share) / 1300;
    const double loads = 2.0 * tile * slab_rows() * element_size(p.element) / 24;
    const int64_t blocks = tiles(tile) * splits;
    const int64_t at_a_time = std::min<int64_t>(blocks_per_multiprocessor(tile), ceil_div(blocks, sm_count));
    const double rounds = double(ceil_div(blocks, at_a_time * sm_count));
    const double slab = std::max(double(at_a_time) * std::max(products, loads), 330.);
    const double results = double(at_a_time) * 4 * area * (1 + sums) / 12;
    // Partial sums are written and read again.
    const double merge =
        splits == 1 ? 0 : 5000 + double(splits) * p.O * p.I * 4 * (1 + sums) / (12.0 * sm_count);
    return rounds * (double(ceil_div(slabs(), splits)) * slab + results + 1500) + merge;
  }
};

}  // namespace

SquareGemmPlan plan_square_gemm(const SquareGemmParams& p, const StatsOutputs& outputs, int sm_count,
                                const Options& options) {
  if (!outputs.squares()) throw std::invalid_argument("square_gemm: no sum of squares is wanted");
  if (std::max(p.I, p.O) > INT32_MAX - 128) throw std::invalid_argument("square_gemm: too many columns");
  if (options.sm_count > 0) sm_count = static_cast<int>(options.sm_count);
  SquareGemmPlan plan{};
  plan.sums = outputs.grad || outputs.sum_grad_centered_squared;
  const Model model{p, sm_count, plan.sums};
  if (model.slabs() > INT32_MAX) throw std::invalid_argument("square_gemm: too many samples");
  plan.slabs = static_cast<int>(model.slabs());

  // Not with the gradient, whose sums would not fit the registers; nor with three products per step, where
  // the tensor cores are the limit with either tile.
  const bool large_applies = !plan.sums && (p.element != Element::kFloat32 || p.tf32);
  double least = 0;
  for (const int tile : {64, 128}) {
    if (tile == 128 ? !large_applies || options.tile == 1 : large_applies && options.tile == 2) continue;
    // At most two rounds of blocks, which bounds the workspace, and two slabs per block.
    const int64_t most =
        std::min(std::max<int64_t>(1, 2 * model.places(tile) / model.tiles(tile)), ceil_div(plan.slabs, 2));
    const auto consider = [&](int64_t splits) {
      if (splits > most || splits < 1) return;
      const double cost = model.clocks(tile, splits);
      if (plan.tile != 0 && cost >= least) return;
      least = cost;
      plan.tile = tile;
      plan.splits = static_cast<int>(splits);
    };
    // A plan is made at every call: few candidates, those that fill the multiprocessors evenly among them.
    for (int64_t splits = 1; splits <= most; splits *= 2) consider(splits);
    for (int blocks = 1; blocks <= 2 * model.blocks_per_multiprocessor(tile); ++blocks) {
      consider(std::min(most, int64_t{sm_count} * blocks / model.tiles(tile)));
    }
  }
  if (options.splits > 0) plan.splits = static_cast<int>(std::clamp<int64_t>(options.splits, 1, plan.slabs));
  plan.tiles = model.tiles(plan.tile);
  if (plan.tiles > INT32_MAX || plan.splits > 65535)
    throw std::invalid_argument("square_gemm: too many tiles");
  plan.copy_a = copy_bytes(p.a, p, p.I);
  plan.copy_b = copy_bytes(p.b, p, p.O);
  plan.vector_store = p.I % 4 == 0 && aligned(outputs.grad) && aligned(outputs.sum_grad_squared) &&
                      aligned(outputs.sum_grad_centered_squared);

  const int64_t count = plan.splits > 1 ? int64_t{plan.splits} * p.O * p.I * 4 : 0;  // bytes
  plan.squares_at = 0;
  plan.sums_at = align(count);
  plan.workspace_bytes = plan.sums_at + (plan.sums ? align(count) : 0);

  const double area = double(plan.tile) * plan.tile * double(plan.tiles);
  const double rows = double(plan.slabs) * model.slab_rows();
  plan.flops = 2 * rows * area * (1 + plan.sums);
  plan.bytes = 2 * rows * area / plan.tile * element_size(p.element);
  return plan;
}

}  // namespace backpack_cuda::cuda
