// What the instruction-set specific files offer: plain structs and function pointers, no torch header, no
// std:: template.
#pragma once
#include <cstdint>

namespace backpack_cuda::cpu {

// Element types of operands; arithmetic is in `Acc`: double for kFloat64, float for the rest.
enum Storage : int { kFloat32, kFloat64, kBFloat16, kFloat16, kStorages };

// How a strip in tile order [blocks, mr, nv, lanes] becomes columns [column_begin, column_begin + columns) of
// rows of a weight [all rows, row_length].
template <class Acc>
struct StripStore {
  int64_t mr, tile_width;  // nv * lanes
  int64_t rows, columns, column_begin, row_length, panels, lanes_are_groups;
  const int32_t* source;  // [columns] where column k of a strip's first row lies; null: columns in order
  void (*convert)(const Acc* from, int64_t count, void* to, int64_t to_offset);  // null: the weight holds Acc
};

// The contraction G_n[o, k] = sum_t b[n, t, o] * a[n, t, k] of one chunk of packed samples, cut into units:
//   unit = (group, panel of mr rows o, block of nv column vectors), the block fastest; strip = all units of
//   one panel.
// Column vector v of row t of sample n is `lanes` consecutive elements at
//   a + n * a_sample + group * a_group + row_offset[t] + column_offset[v],
// so a convolution needs no im2col matrix. Lanes past column_lanes[v] hold anything: they reach no result.
// With lanes_are_groups > 0 (depthwise convolutions) the lanes of both operands run over that many groups
// instead of over columns.
//
// A sample may have V output gradients, whose G_nv are contracted like those of V samples: here "sample" is
// (n, v) = q / V, q % V. One operand has V copies per sample and the other has one, whose *_v is 0.
template <class Acc>
struct ContractJob {
  const Acc* a;
  int64_t a_sample, a_v, a_group;
  const int32_t* row_offset;     // [T]
  const int64_t* column_offset;  // [blocks * nv]
  const int32_t* column_lanes;   // [blocks * nv]
  const Acc* b;  // [samples, strips, T, mr] or [samples, strips, T, mr, lanes]; rows past `rows` are zero
  int64_t b_sample, b_v;
  int64_t V, v_begin, v_end;  // of the v_end output gradients of a sample, V from v_begin on
  const Acc* signs;           // [samples]: factors of G_nv^2 in sums of squares; null: 1
  int64_t T, rows, panels, blocks, lanes_are_groups;
  int64_t unit_begin, units;  // range of this pass; `a` and `b` begin at its first group and strip

  // Accumulators in tile order [splits, units, mr, nv, lanes]; null: not wanted.
  Acc* sum;
  Acc* square;         // sum_n G_n^2, or with `centered` sum_n (G_n - mean)^2
  int64_t split_size;  // elements between the accumulators of two splits
  bool centered;
  // A sample too large to pack at once arrives in slabs of rows t: its tiles so far.
  Acc* partial;  // [samples, units, mr, nv, lanes]
  bool load_partial, store_partial;

  double* norm;  // [samples, units] sums of G_n^2 per tile, or null

  void*
      batch_grad;  // rows of length store.row_length, n * batch_rows + v * batch_v of them before G_nv; null
  int64_t batch_rows, batch_v;
  // sum_v signs G_nv^2, [samples n, batch_rows, store.row_length], or null. Then `square` is that of the
  // current n alone, and `total` the sum over n.
  Acc* batch_square;
  Acc* total;  // as `square`, or null
  StripStore<Acc> store;
};

// The part of a job that one thread does: units [unit_begin, unit_end) for samples [sample_begin,
// sample_end).
template <class Acc>
struct ContractRange {
  int64_t unit_begin, unit_end, sample_begin, sample_end;
  int64_t split, split_count;  // accumulators to use, and how many samples (with batch_square: n) they hold
  Acc* strip;                  // scratch [blocks, mr, nv, lanes] plus [columns] when batch_grad is wanted
};

template <class Acc>
struct Tile {
  int mr, nv;
  void (*run)(const ContractJob<Acc>&, const ContractRange<Acc>&);
};

// A tile of a sum of outer products: sum[m, v] += sum over positions p of left[p][m] * right[p][v], where p
// runs over four nested dims.
template <class Acc>
struct ProductJob {
  const Acc *left, *right;          // of the first position
  int64_t left_pitch, right_pitch;  // elements between positions
  int64_t count[4], stride[4];      // of positions, the innermost dim last
  Acc* sum;                         // [mr, nv, lanes]
  bool add;                         // to what `sum` holds
};

// Where a finished tile goes: out[r, c] = out[c, r] = scale * sum[r, c] + decay * out[r, c] for c >= r. Out
// is not read where decay is 0.
template <class Acc>
struct ProductStore {
  Acc scale, decay;
  Acc* out;  // [size, size]
  int64_t size;
};

template <class Acc>
struct ProductTile {
  int mr, nv;  // mr numbers, or vectors where lanes are groups, times nv vectors; rows and columns share the
               // panels of a pack, which mr divides
  void (*run)(const ProductJob<Acc>&);
  // Stores the part of a tile [mr, nv, lanes] that begins at row `row` and column `column` of out and has
  // this many of them; null where lanes are groups.
  void (*store)(const ProductStore<Acc>&, const Acc* sum, int64_t row, int64_t rows, int64_t column,
                int64_t columns);
};

// Some columns of a strided matrix: `valid` columns at these element offsets, zeros from there to `width`.
struct PackColumns {
  const int64_t* offset;  // [valid]
  int64_t valid, width;
  bool contiguous;  // offset[c] == offset[0] + c
};

constexpr int64_t kDeviationColumns = 64;
constexpr int kCancelled = -1;

template <class Acc>
struct Kernels {
  int lanes;
  const Tile<Acc>* dense;
  int dense_count;
  const Tile<Acc>* grouped;  // for lanes_are_groups
  int grouped_count;
  const ProductTile<Acc>* dense_products;
  int dense_product_count;
  const ProductTile<Acc>* grouped_products;  // lanes are groups
  int grouped_product_count;
  // Copies rows of `columns` to dst[row * pitch + column], squared on request.
  void (*pack[kStorages])(const void* src, int64_t src_offset, int64_t row_stride, int64_t rows,
                          const PackColumns& columns, bool square, Acc* dst, int64_t pitch);
  // Writes the rows of one strip to `weight`, whose row 0 is row `first_row` of `to`; scratch: [columns].
  void (*store_strip)(const StripStore<Acc>& store, const Acc* strip, int64_t strip_index, Acc* scratch,
                      void* to, int64_t first_row);
  // Sum of `count` elements `stride` apart.
  double (*sum[kStorages])(const void* src, int64_t src_offset, int64_t stride, int64_t count);
  // sums[c] += sum over rows, for `count` consecutive columns.
  void (*column_sums[kStorages])(const void* src, int64_t src_offset, int64_t row_stride, int64_t rows,
                                 int64_t count, double* sums);
  double (*sum_squares)(const Acc* x, int64_t count);
  // sum_{t, s} <a_t, a_s> <b_t, b_s> = |sum_t b_t a_t^T|^2, for rows padded with zeros to `a_width`,
  // `b_width` (multiples of lanes).
  double (*gram_norm)(const Acc* a, int64_t a_width, const Acc* b, int64_t b_width, int64_t T);
  // Column means and sums of squared deviations of the rows b[r] * a[r, c], for kDeviationColumns columns.
  void (*deviation)(const Acc* a, const Acc* b, int64_t rows, Acc* mean, Acc* squares);
  // square[i] - sum[i]^2 * inverse_count, or kCancelled where less than 1/64 of square[i] is left; in place.
  void (*center)(const Acc* sum, Acc inverse_count, int64_t count, Acc* square);
  bool (*any_negative)(const Acc* x, int64_t count);
  // out[i] = scale * x[i]
  void (*scale)(const Acc* x, Acc scale, int64_t count, Acc* out);
};

// The kernels for this CPU, as limited by the option "isa".
template <class Acc>
const Kernels<Acc>& kernels();

// One function per instruction set and type, defined in kernels_<isa>.cpp.
const Kernels<float>* avx512_float_kernels();
const Kernels<double>* avx512_double_kernels();
const Kernels<float>* avx2_float_kernels();
const Kernels<double>* avx2_double_kernels();
const Kernels<float>* portable_float_kernels();
const Kernels<double>* portable_double_kernels();

}  // namespace backpack_cuda::cpu
