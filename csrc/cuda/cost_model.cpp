#include "cuda/cost_model.h"

#include <algorithm>

#include "common/integers.h"

namespace backpack_cuda::cuda {
namespace {

// Flops per second of our mma.sync kernels: about 60 % of the chip's wgmma peak.
constexpr double kTf32Rate = 300e12, kTf32x3Rate = kTf32Rate / 3, kHalfRate = 600e12;
// Of the library's matrix product; float32 without TF32 runs outside of the tensor cores.
constexpr double kLibraryTf32Rate = 400e12, kLibraryFloat32Rate = 50e12, kLibraryHalfRate = 650e12;
constexpr double kBandwidth = 3e12;         // bytes per second
constexpr double kLaneOperations = 2.9e13;  // float32 instructions per second, all lanes
constexpr double kCachedLoads = 7e12;       // elements per second from the L1 caches, all lanes
constexpr double kLaunch = 3e-6;            // seconds

double product_rate(const OuterProblem& p) {
  return p.element != Element::kFloat32 ? kHalfRate : p.tf32 ? kTf32Rate : kTf32x3Rate;
}

double library_rate(const OuterProblem& p) {
  return p.element != Element::kFloat32 ? kLibraryHalfRate : p.tf32 ? kLibraryTf32Rate : kLibraryFloat32Rate;
}

double operand_bytes(const OuterProblem& p) {
  const double image = double(p.size[0]) * p.size[1] * p.size[2] * p.channels, pixels = double(p.T()) * p.O;
  return double(p.N) * p.groups * (image + pixels) * element_size(p.element);
}

double batch_grad_bytes(const OuterProblem& p, const StatsOutputs& out) {
  return out.batch_grad ? double(p.N) * p.groups * p.O * p.I() * element_size(p.element) : 0;
}

// One pass; tiles of 64 rows and columns, samples padded to the depth of one mma.
Cost contract_cost(const OuterProblem& p, const StatsOutputs& out) {
  const double tiles = double(p.N) * p.groups * round_up(p.O, 64) * round_up(p.I(), 64);  // elements of G_n
  const int depth = p.element == Element::kFloat32 ? 8 : 16;
  const int operations = 2 +
                         (out.sum_grad_centered_squared ? 4
                          : out.sum_grad_squared        ? 1
                                                        : 0) +
                         (out.batch_l2 != nullptr);
  Cost cost;
  cost.products = 2 * tiles * round_up(p.T(), depth) / product_rate(p);
  cost.bytes = operand_bytes(p) + batch_grad_bytes(p, out);
  cost.epilogue = tiles * operations / kLaneOperations;
  cost.launches = 2 + (out.batch_l2 != nullptr);
  return cost;
}

Cost separate_cost(const OuterProblem& p, const StatsOutputs& out) {
  const double N = double(p.N), T = p.T(), I = p.I(), O = p.O, product = 2 * N * T * I * O;
  Cost cost;
  if (out.squares()) {  // square_gemm: both products from the same slabs
    const double square_rate = p.element == Element::kFloat32 && !p.tf32 ? kTf32x3Rate : kTf32Rate;
    cost.products += product / square_rate + product / product_rate(p);
    cost.bytes += operand_bytes(p);
    cost.launches += 2 + (out.sum_grad_centered_squared != nullptr);
  } else if (out.grad) {
    cost.products += product / library_rate(p);
    cost.bytes += operand_bytes(p);
    cost.launches += 1;
  }
  if (out.batch_l2) {
    cost.bytes += operand_bytes(p);
    cost.launches += 1;
    if (p.T() >
        1) {  // gram_norm: tiles of both Gram matrices, upper triangle; several small samples share one
      const int edge = p.T() <= 32 ? 32 : p.T() <= 64 ? 64 : 128;
      const double blocks = double(ceil_div(p.T(), edge));
      const double tiles = p.T() <= 16 ? 1. / (32 / p.T()) : blocks * (blocks + 1) / 2;
      cost.products += 2 * N * tiles * edge * edge * (I + O) / product_rate(p);
      cost.launches += 1;
    }
  }
  return cost;
}

// One multiplication per cached load.
Cost depthwise_cost(const OuterProblem& p, const StatsOutputs& out) {
  Cost cost;
  cost.products = double(p.N) * p.groups * p.O * p.I() * p.T() / kCachedLoads;
  cost.bytes = operand_bytes(p) + batch_grad_bytes(p, out);
  cost.launches = 2 + (out.batch_l2 != nullptr);
  return cost;
}

// Whether all rows (n, t) have one stride, so that the library takes them without a copy.
bool rows_merge(const OuterProblem& p, const Operand& operand) {
  return p.T() == 1 || p.N == 1 || operand.stride_n == p.T() * operand.stride[2];
}

}  // namespace

double Cost::seconds() const {
  return std::max(products, bytes / kBandwidth) + epilogue + launches * kLaunch;
}

Cost cost_of(Way way, const OuterProblem& problem, const StatsOutputs& out) {
  switch (way) {
    case Way::kContract:
    case Way::kContractSm90:
      return contract_cost(problem, out);
    case Way::kSeparate:
      return separate_cost(problem, out);
    case Way::kDepthwise:
      return depthwise_cost(problem, out);
  }
  return {};
}

bool applies(Way way, const OuterProblem& problem, const StatsOutputs& out, bool linear) {
  switch (way) {
    case Way::kContract:
    case Way::kContractSm90:
      return true;
    case Way::kSeparate: {  // squares of sums over t need the one pass, weighted ones too
      const bool one_stride = problem.positions[0] == 1 && problem.positions[1] == 1;
      return linear && one_stride && !out.batch_grad &&
             (problem.T() == 1 || (!out.squares() && !out.weights)) &&
             (!out.grad || (rows_merge(problem, problem.a) && rows_merge(problem, problem.b)));
    }
    case Way::kDepthwise:
      return !linear;
  }
  return false;
}

Way choose_way(const OuterProblem& problem, const StatsOutputs& out, bool linear, const Options& options) {
  if (options.way == int64_t(Way::kContractSm90)) return Way::kContract;
  Way best = Way::kContract;
  for (const Way way : {Way::kContract, Way::kSeparate, Way::kDepthwise}) {
    if (!applies(way, problem, out, linear)) continue;
    if (options.way == int64_t(way)) return way;
    if (cost_of(way, problem, out).seconds() < cost_of(best, problem, out).seconds()) best = way;
  }
  return best;
}

Way choose_way(const OuterProblem& problem, const ColumnOutputs& columns, const Options& options) {
  OuterProblem samples = problem;  // squares of as many, with G_vn in the place of G_n
  samples.N *= columns.V;
  StatsOutputs out{};
  out.batch_grad = columns.factor;
  out.sum_grad_squared = columns.diag ? columns.diag : columns.batch_diag;
  return choose_way(samples, out, false, options);
}

bool wants_sm90(const OuterProblem& problem, const Options& options) {
  constexpr bool kProven = false;
  if (options.way == int64_t(Way::kContractSm90)) return true;
  // Its slabs are 64 positions, its tiles 128 x 128.
  return kProven && options.way == 0 && problem.T() >= 64 && problem.O >= 128 && problem.channels >= 128;
}

}  // namespace backpack_cuda::cuda
