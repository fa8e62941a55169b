// Kronecker factors: out = decay * out + scale * sum over rows of x x^T, with a row x per sample and
// position.
//
//   x[n, p][c, k] = input[n, c, p * step + k * dilation - padding]      (0 outside of the input)
//
// per group, p over the positions and k over the kernel, three dims each; a Linear layer has kernel 1 and its
// leading dims as samples and positions. D = channels * kernel volume columns (c, k), and with `homogeneous`
// one more that is 1 in every row. Only tiles on or above the diagonal are formed, on the tensor cores of
// sm_80 and up; of `out` the upper triangle is read, and both are written, equal to the last bit. The matrix
// of rows exists in shared memory only, one slab at a time. Results are deterministic.
//
// There are two ways.
//
// Patches: one product, of all columns with all columns.
//
// Lags: sum_p x[c, k] x[c', k'] depends on k' - k alone, but for the first and last positions. It is a sum
// over coordinates u = p * step + k * dilation - padding of input[c, u] input[c', u + lag]. Each dim is cut
// into the segments of u that belong to the same pairs (k, k') of one lag. For each lag, up to transposition,
// and each cell of segments there is one product, of channels with channels; blocks of the factor are sums of
// cells. So every position is counted once, and nothing is subtracted. A 3x3 kernel of stride 1 has 13 lags
// instead of 45 pairs of places; with a stride there are such lags for each residue of u.
//
// Precision: products as in `contract` (float32: one TF32 product with `tf32`, else three). Sums are float32.
// Those of the tensor cores, which truncate, end after 64 rows (128 of 2-byte types; 8 with three products)
// and are added with rounding, in two levels. The homogeneous column sums entries before they are rounded to
// TF32. A non-finite entry makes those entries of `out` non-finite that it is a factor of; by patches also
// those in which it meets zeros outside of the input.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/common/options.h"
#include "cuda/common/outer_problem.h"
#include "cuda/contract/contract.h"

namespace backpack_cuda::cuda {

struct KronProblem {
  Element element;
  bool tf32;         // float32 operands: one TF32 pass instead of three (float32-accurate)
  int64_t N;         // samples
  int groups;        // at least 1
  int channels;      // of one group
  int positions[3];  // their product below 2^31
  int size[3];       // of the input
  int kernel[3], step[3], padding[3], dilation[3];  // padding may be negative
  Operand x;
  bool homogeneous;
  float scale, decay;
  float* out;  // [groups, D', D']; not read where decay is 0

  int kernel_volume() const { return kernel[0] * kernel[1] * kernel[2]; }
  int columns() const { return channels * kernel_volume(); }
  int64_t T() const { return int64_t{positions[0]} * positions[1] * positions[2]; }
};

// Values of the test switch "way".
enum class KronWay : int { kPatches = 1, kLags = 2 };

constexpr int kKronKernel = 7;      // the largest kernel of the lags
constexpr int kKronSegments = 32;   // of one dim
constexpr int kKronProducts = 512;  // segments of all dims, multiplied

// Coordinates of one dim: segments of u with a lag, and which of them a pair (k, k') consists of.
struct KronAxis {
  int segments;
  int begin[kKronSegments], count[kKronSegments];  // u = begin + step * (0 ... count - 1)
  int lag[kKronSegments];                          // (k' - k) * dilation
  // [k, k']: segments [first, end)
  uint8_t first[kKronKernel * kKronKernel], end[kKronKernel * kKronKernel];
};

struct KronPlan {
  ContractPrecision precision;
  ContractLoader loader;  // kChannelsLast: 16-byte copies of adjacent channels; kPositions, kElements: single
                          // elements, lanes along the positions or mostly along the columns
  ContractTile tile;
  bool lags;
  bool final;           // the kernel writes `out` itself; else partial tiles, which a second kernel adds
  int ways;             // threads that add the splits of an entry in that: a power of two up to 32
  int groups_per_tile;  // small groups side by side, as one: what they have in common is left out at the end
  int groups, columns;  // of the products, after that
  bool whole_copies;    // kPositions: copies of 16 bytes, where a Linear layer or a 1x1 kernel allows them
  KronAxis axes[3];
  // Products, numbered (segment of dim 0, of dim 1, of dim 2), have tiles and splits of their rows; an item
  // is one split of one tile, and a block's work. Product j has the items [first_item[j], first_item[j + 1]),
  // of (group, tile, split).
  int products;
  int first_item[kKronProducts + 1];
  double slabs;  // times tiles: the work of all items
  // A partial tile per item, unless `final`: with S blocks on the chip at a time (sm_count, or three times
  // that for 64x64) at most 2 S, 17 MB on 132 multiprocessors, and one for each tile of each product (of a
  // 3x3 kernel with padding 1: 28 / 81 of the size of `out`).
  int64_t workspace_bytes;
};

// Options: way, tile (as in `contract`), loader (2 to 4, as in `contract`), splits of every product.
KronPlan plan_kron_factor(const KronProblem& problem, int sm_count, const Options& options);

// Asynchronous; throws when a launch fails. `workspace`: plan.workspace_bytes, aligned to 16.
void launch_kron_factor(const KronProblem& problem, const KronPlan& plan, void* workspace,
                        cudaStream_t stream);

}  // namespace backpack_cuda::cuda
