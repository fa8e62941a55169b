// The CPU micro-kernels, written once on GCC vector types. Each kernels_<isa>.cpp includes this file with its
// own compiler flags after defining VECTOR_BYTES and the tile lists. Everything is in an anonymous namespace
// and no std:: template is used: an inline function that the linker merged across these files would run with
// the wrong instruction set.
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

namespace backpack_cuda::cpu {
namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))

// A tile's sums over t are added to a second accumulator after this many rows, which keeps the rounding error
// of long sums small.
constexpr int64_t kRowsPerBlock = 256;
// Likewise for plain sums, whose second accumulator is a double.
constexpr int64_t kTermsPerBlock = 64;

template <class Acc>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t index;
  typedef int32_t mask __attribute__((vector_size(VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t index;
  typedef int64_t mask __attribute__((vector_size(VECTOR_BYTES)));
};
template <class Acc>
using Vector = typename VectorOf<Acc>::type;
template <class Acc>
constexpr int kLanes = VECTOR_BYTES / sizeof(Acc);

template <class Acc>
ALWAYS_INLINE Vector<Acc> load(const Acc* p) {
  Vector<Acc> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class Acc>
ALWAYS_INLINE void store_vector(Acc* p, Vector<Acc> v) {
  std::memcpy(p, &v, sizeof(v));
}

// v with zeros in the lanes from `lanes` on, whatever they held.
template <class Acc>
ALWAYS_INLINE Vector<Acc> keep_lanes(Vector<Acc> v, int64_t lanes) {
  using Mask = typename VectorOf<Acc>::mask;
  Mask index;
  for (int l = 0; l < kLanes<Acc>; ++l) index[l] = l;
  const Mask keep = index < static_cast<decltype(index[0] + 0)>(lanes);
  return (Vector<Acc>)((Mask)v & keep);
}

template <class Acc>
ALWAYS_INLINE double add_lanes(Vector<Acc> v) {
  double total = 0;
  for (int l = 0; l < kLanes<Acc>; ++l) total += v[l];
  return total;
}

int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

#define FOR_TILE(m, v) \
  _Pragma("GCC unroll 32") for (int m = 0; m < MR; ++m) _Pragma("GCC unroll 32") for (int v = 0; v < NV; ++v)

// One tile of one sample: the sum over t in registers, then everything wanted of it.
template <class Acc, int MR, int NV, bool kLanesAreGroups>
ALWAYS_INLINE void contract_tile(const ContractJob<Acc>& job, int64_t unit, int64_t q, int64_t split,
                                 int64_t count, Acc* strip_tile) {  // count: samples in the accumulators
  constexpr int L = kLanes<Acc>;
  constexpr int64_t kTile = MR * NV * L;
  constexpr int64_t kRow = MR * (kLanesAreGroups ? L : 1);  // elements of b per t
  using V = Vector<Acc>;
  const int64_t strip = unit / job.blocks, block = unit % job.blocks, group = strip / job.panels,
                panel = strip % job.panels;
  const int64_t first_strip = job.unit_begin / job.blocks, first_group = first_strip / job.panels;
  const int64_t n = q / job.V, v = q % job.V;
  const Acc* a = job.a + n * job.a_sample + v * job.a_v + (group - first_group) * job.a_group;
  const Acc* b = job.b + n * job.b_sample + v * job.b_v + (strip - first_strip) * job.T * kRow;
  const int64_t* column_offset = job.column_offset + block * NV;
  const Acc* column[NV];
#pragma GCC unroll 32
  for (int v = 0; v < NV; ++v) column[v] = a + column_offset[v];

  V acc[MR][NV], block_sum[MR][NV];
  FOR_TILE(m, v) acc[m][v] = V{};
  const int32_t* row_offset = job.row_offset;
  for (int64_t begin = 0; begin < job.T; begin += kRowsPerBlock) {
    if (begin > 0) {
      FOR_TILE(m, v) {
        block_sum[m][v] = begin == kRowsPerBlock ? acc[m][v] : block_sum[m][v] + acc[m][v];
        acc[m][v] = V{};
      }
    }
    const int64_t end = min(begin + kRowsPerBlock, job.T);
    for (int64_t t = begin; t < end; ++t, b += kRow) {
      const int64_t row = row_offset[t];
      V av[NV];
#pragma GCC unroll 32
      for (int v = 0; v < NV; ++v) av[v] = load(column[v] + row);
#pragma GCC unroll 32
      for (int m = 0; m < MR; ++m) {
        if constexpr (kLanesAreGroups) {
          const V bv = load(b + m * L);
#pragma GCC unroll 32
          for (int v = 0; v < NV; ++v) acc[m][v] += av[v] * bv;
        } else {
#pragma GCC unroll 32
          for (int v = 0; v < NV; ++v) acc[m][v] += av[v] * b[m];
        }
      }
    }
  }
  if (job.T > kRowsPerBlock) {
    FOR_TILE(m, v) acc[m][v] += block_sum[m][v];
  }

  const int64_t tile_begin = (unit - job.unit_begin) * kTile;
  if (job.partial) {
    Acc* partial = job.partial + q * job.units * kTile + tile_begin;
    if (job.load_partial) {
      FOR_TILE(m, v) acc[m][v] += load(partial + (m * NV + v) * L);
    }
    if (job.store_partial) {
      FOR_TILE(m, v) store_vector(partial + (m * NV + v) * L, acc[m][v]);
      return;
    }
  }

  if (job.norm) {
    const int64_t rows = job.rows - panel * MR;
    V norm = {};
#pragma GCC unroll 32
    for (int v = 0; v < NV; ++v) {
      V column_norm = {};
#pragma GCC unroll 32
      for (int m = 0; m < MR; ++m)
        if (m < rows) column_norm += acc[m][v] * acc[m][v];
      int64_t lanes = job.column_lanes[block * NV + v];
      if (kLanesAreGroups) lanes = min(lanes, job.lanes_are_groups - group * L);
      norm += lanes < L ? keep_lanes<Acc>(column_norm, lanes) : column_norm;
    }
    job.norm[q * job.units + unit - job.unit_begin] = add_lanes<Acc>(norm);
  }
  if (strip_tile) {
    FOR_TILE(m, v) store_vector(strip_tile + (m * NV + v) * L, acc[m][v]);
  }

  const int64_t accumulator = split * job.split_size + tile_begin;
  const Acc sign = job.signs ? job.signs[q] : Acc(1);
  Acc* sum = job.sum ? job.sum + accumulator : nullptr;
  Acc* square = job.square ? job.square + accumulator : nullptr;
  if (count == 0) {
    if (sum) {
      FOR_TILE(m, v) store_vector(sum + (m * NV + v) * L, acc[m][v]);
    }
    if (job.centered) {  // zero, or NaN where the tile is not finite
      FOR_TILE(m, v)
      store_vector(square + (m * NV + v) * L, V((acc[m][v] - acc[m][v]) * (acc[m][v] - acc[m][v])));
    } else if (square) {
      FOR_TILE(m, v) store_vector(square + (m * NV + v) * L, V(acc[m][v] * sign * acc[m][v]));
    }
  } else if (job.centered) {  // Youngs and Cramer 1971: like Welford's update, on the sum instead of the mean
    const Acc inverse = Acc(1.0 / double(count + 1)), weight = Acc(double(count + 1) / double(count));
    FOR_TILE(m, v) {
      const V total = load(sum + (m * NV + v) * L) + acc[m][v];
      const V difference = acc[m][v] - total * inverse;
      store_vector(sum + (m * NV + v) * L, total);
      store_vector(square + (m * NV + v) * L,
                   V(load(square + (m * NV + v) * L) + difference * (difference * weight)));
    }
  } else {
    if (sum) {
      FOR_TILE(m, v) store_vector(sum + (m * NV + v) * L, V(load(sum + (m * NV + v) * L) + acc[m][v]));
    }
    if (square) {
      FOR_TILE(m, v)
      store_vector(square + (m * NV + v) * L,
                   V(load(square + (m * NV + v) * L) + acc[m][v] * sign * acc[m][v]));
    }
  }
}

// Rows of the weight are written one by one from front to back: scattered 4-byte stores cost several times
// more.
template <class Acc>
void store_strip(const StripStore<Acc>& store, const Acc* strip, int64_t strip_index, Acc* scratch, void* out,
                 int64_t first_row) {
  constexpr int L = kLanes<Acc>;
  const int64_t group = strip_index / store.panels, panel = strip_index % store.panels,
                columns = store.columns;
  const int64_t rows = min(store.mr, store.rows - panel * store.mr);
  const int64_t groups = store.lanes_are_groups ? min(L, store.lanes_are_groups - group * L) : 1;
  const int64_t group_begin = store.lanes_are_groups ? group * L : group;
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t m = 0; m < rows; ++m) {
      const Acc* from = strip + m * store.tile_width + g;
      const int64_t row = first_row + (group_begin + g) * store.rows + panel * store.mr + m;
      const int64_t offset = row * store.row_length + store.column_begin;
      Acc* to = store.convert ? scratch : static_cast<Acc*>(out) + offset;
      if (store.source) {
        const int32_t* source = store.source;
        for (int64_t k = 0; k < columns; ++k) to[k] = from[source[k]];
      } else {
        for (int64_t k = 0; k < columns; k += store.tile_width, from += store.mr * store.tile_width) {
          const int64_t width = min(store.tile_width, columns - k);
          int64_t c = 0;
          for (; c + L <= width; c += L) store_vector(to + k + c, load(from + c));
          for (; c < width; ++c) to[k + c] = from[c];
        }
      }
      if (store.convert) store.convert(to, columns, out, offset);
    }
}

// The sum over v of one sample n and strip is complete: stores it and adds it to the total.
template <class Acc>
void finish_sample(const ContractJob<Acc>& job, const Acc* square, int64_t strip_size, int64_t strip,
                   int64_t n, bool first, Acc* total) {
  StripStore<Acc> store = job.store;
  store.convert = nullptr;
  store_strip<Acc>(store, square, strip, nullptr, job.batch_square, n * job.batch_rows);
  if (!total) return;
  for (int64_t i = 0; i < strip_size; ++i) total[i] = first ? square[i] : total[i] + square[i];
}

template <class Acc, int MR, int NV, bool kLanesAreGroups>
void contract(const ContractJob<Acc>& job, const ContractRange<Acc>& range) {
  constexpr int64_t kTile = MR * NV * kLanes<Acc>;
  if (!job.batch_grad && !job.batch_square) {
    for (int64_t unit = range.unit_begin; unit < range.unit_end; ++unit)
      for (int64_t q = range.sample_begin; q < range.sample_end; ++q)
        contract_tile<Acc, MR, NV, kLanesAreGroups>(job, unit, q, range.split,
                                                    range.split_count + q - range.sample_begin, nullptr);
    return;
  }
  for (int64_t begin = range.unit_begin; begin < range.unit_end; begin += job.blocks)  // whole strips
    for (int64_t q = range.sample_begin; q < range.sample_end; ++q) {
      const int64_t n = q / job.V, v = q % job.V, strip = begin / job.blocks;
      const int64_t count = job.batch_square ? job.v_begin + v : range.split_count + q - range.sample_begin;
      for (int64_t block = 0; block < job.blocks; ++block)
        contract_tile<Acc, MR, NV, kLanesAreGroups>(job, begin + block, q, range.split, count,
                                                    job.batch_grad ? range.strip + block * kTile : nullptr);
      if (job.store_partial) continue;
      if (job.batch_grad)
        store_strip(job.store, range.strip, strip, range.strip + job.blocks * kTile, job.batch_grad,
                    n * job.batch_rows + v * job.batch_v);
      if (job.batch_square && job.v_begin + v + 1 == job.v_end) {
        const int64_t accumulator = range.split * job.split_size + (begin - job.unit_begin) * kTile;
        const bool first = range.split_count + n - range.sample_begin / job.V == 0;
        finish_sample(job, job.square + accumulator, job.blocks * kTile, strip, n, first,
                      job.total ? job.total + accumulator : nullptr);
      }
    }
}

// One tile of a sum of outer products.
template <class Acc, int MR, int NV, bool kLanesAreGroups>
void add_products(const ProductJob<Acc>& job) {
  constexpr int L = kLanes<Acc>;
  using V = Vector<Acc>;
  const int64_t left_step = job.stride[3] * job.left_pitch, right_step = job.stride[3] * job.right_pitch;
  V acc[MR][NV], block_sum[MR][NV];
  FOR_TILE(m, v) acc[m][v] = V{};
  bool blocks = false;
  int64_t room = kRowsPerBlock;
  for (int64_t i = 0; i < job.count[0]; ++i)
    for (int64_t j = 0; j < job.count[1]; ++j)
      for (int64_t k = 0; k < job.count[2]; ++k) {
        const int64_t position = i * job.stride[0] + j * job.stride[1] + k * job.stride[2];
        const Acc *left = job.left + position * job.left_pitch,
                  *right = job.right + position * job.right_pitch;
        for (int64_t begin = 0; begin < job.count[3];) {
          if (room == 0) {
            FOR_TILE(m, v) {
              block_sum[m][v] = blocks ? block_sum[m][v] + acc[m][v] : acc[m][v];
              acc[m][v] = V{};
            }
            blocks = true, room = kRowsPerBlock;
          }
          const int64_t end = min(job.count[3], begin + room);
          room -= end - begin;
          for (; begin < end; ++begin, left += left_step, right += right_step) {
            V rv[NV];
#pragma GCC unroll 32
            for (int v = 0; v < NV; ++v) rv[v] = load(right + v * L);
#pragma GCC unroll 32
            for (int m = 0; m < MR; ++m) {
              if constexpr (kLanesAreGroups) {
                const V lv = load(left + m * L);
#pragma GCC unroll 32
                for (int v = 0; v < NV; ++v) acc[m][v] += rv[v] * lv;
              } else {
#pragma GCC unroll 32
                for (int v = 0; v < NV; ++v) acc[m][v] += rv[v] * left[m];
              }
            }
          }
        }
      }
  if (blocks) {
    FOR_TILE(m, v) acc[m][v] += block_sum[m][v];
  }
  if (job.add) {
    FOR_TILE(m, v) acc[m][v] += load(job.sum + (m * NV + v) * L);
  }
  FOR_TILE(m, v) store_vector(job.sum + (m * NV + v) * L, acc[m][v]);
}

// --- Conversions. ---
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
ALWAYS_INLINE float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
ALWAYS_INLINE float to_acc(float x) { return x; }
ALWAYS_INLINE double to_acc(double x) { return x; }
ALWAYS_INLINE float to_acc(BFloat16 x) { return from_bits(uint32_t(x.bits) << 16); }
ALWAYS_INLINE float to_acc(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, magnitude = x.bits & 0x7fff;
  const uint32_t normal = (magnitude << 13) + ((127 - 15) << 23);
  const uint32_t not_finite = (magnitude << 13) | 0x7f800000;
  const float subnormal = float(int32_t(magnitude)) * 0x1p-24f;
  uint32_t subnormal_bits;
  std::memcpy(&subnormal_bits, &subnormal, sizeof(subnormal));
  const uint32_t bits = magnitude >= 0x7c00 ? not_finite : magnitude < 0x0400 ? subnormal_bits : normal;
  return from_bits(sign | bits);
}

// --- Packing and small sums. ---
template <class Acc, int P>
struct Piece {  // P elements
  typedef Acc type __attribute__((vector_size(P * sizeof(Acc))));
  typedef typename VectorOf<Acc>::index index __attribute__((vector_size(P * sizeof(Acc))));
};

template <class Acc, int P>
ALWAYS_INLINE typename Piece<Acc, P>::type load_piece(const Acc* src) {
  typename Piece<Acc, P>::type v;
  std::memcpy(&v, src, sizeof(v));
  return v;
}
template <class Acc, int P, class Half>
ALWAYS_INLINE typename Piece<Acc, P>::type convert_piece(const Half* src) {
  typename Piece<Acc, P>::type v;
  for (int l = 0; l < P; ++l) v[l] = to_acc(src[l]);
  return v;
}
template <class Acc, int P>
ALWAYS_INLINE typename Piece<Acc, P>::type load_piece(const BFloat16* src) {
  return convert_piece<Acc, P>(src);
}
template <class Acc, int P>
ALWAYS_INLINE typename Piece<Acc, P>::type load_piece(const Float16* src) {
  return convert_piece<Acc, P>(src);
}

// Transposes the P x P block x by exchanging its 2 x 2, 4 x 4, ... blocks. The shuffles' indices must be
// constants.
template <int... kLane>
struct Lanes {
  template <class Acc, int kSize>
  static ALWAYS_INLINE void exchange(typename Piece<Acc, sizeof...(kLane)>::type (&x)[sizeof...(kLane)]) {
    constexpr int P = sizeof...(kLane);
    using Index = typename Piece<Acc, P>::index;
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i) {
      if (i & kSize) continue;
      const auto upper = x[i], lower = x[i + kSize];
      x[i] = __builtin_shuffle(upper, lower, Index{(kLane & kSize ? P + kLane - kSize : kLane)...});
      x[i + kSize] = __builtin_shuffle(upper, lower, Index{(kLane & kSize ? P + kLane : kLane + kSize)...});
    }
    if constexpr (2 * kSize < P) exchange<Acc, 2 * kSize>(x);
  }
};
template <class Acc, int P>
ALWAYS_INLINE void transpose(typename Piece<Acc, P>::type (&x)[P]) {
  Lanes<__integer_pack(P)...>::template exchange<Acc, 1>(x);
}

// Columns side by side: rows are copied P elements at a time, the last P overlapping those before.
template <class Source, class Acc, int P>
void pack_contiguous(const Source* src, int64_t row_stride, int64_t rows, int64_t valid, int64_t width,
                     Acc* dst, int64_t pitch) {
  for (int64_t r = 0; r < rows; ++r, src += row_stride, dst += pitch) {
    for (int64_t c = 0; c < valid; c += P) {
      const int64_t at = min(c, valid - P);
      const auto v = load_piece<Acc, P>(src + at);
      std::memcpy(dst + at, &v, sizeof(v));
    }
    for (int64_t c = valid; c < width; ++c) dst[c] = 0;
  }
}

// Rows side by side: P x P blocks are transposed in registers, the last ones overlapping those before. A
// store of a column block wider than the row runs into the next row, which is written after it; the last rows
// are stored exactly.
template <class Source, class Acc, int P>
void pack_transposed(const Source* src, int64_t rows, const PackColumns& columns, Acc* dst, int64_t pitch) {
  const int64_t width = columns.width, end = (rows - 1) * pitch + width;
  for (int64_t row = 0; row < rows; row += P) {
    const int64_t r = min(row, rows - P);
    for (int64_t column = 0; column < width; column += P) {
      const int64_t c = width < P ? 0 : min(column, width - P);
      const int64_t* offset = columns.offset + c;
      typename Piece<Acc, P>::type x[P];
      if (c + P <= columns.valid) {
#pragma GCC unroll 16
        for (int l = 0; l < P; ++l) x[l] = load_piece<Acc, P>(src + offset[l] + r);
      } else {
#pragma GCC unroll 16
        for (int l = 0; l < P; ++l)
          x[l] = c + l < columns.valid ? load_piece<Acc, P>(src + offset[l] + r)
                                       : typename Piece<Acc, P>::type{};
      }
      transpose<Acc, P>(x);
      Acc* to = dst + r * pitch + c;
      if ((r + P - 1) * pitch + c + P <= end) {
#pragma GCC unroll 16
        for (int l = 0; l < P; ++l) std::memcpy(to + l * pitch, &x[l], sizeof(x[l]));
      } else {
        for (int l = 0; l < P; ++l) {
          const int64_t left = end - ((r + l) * pitch + c);
          for (int i = 0; i < P && i < left; ++i) to[l * pitch + i] = x[l][i];
        }
      }
    }
  }
}

template <class Source, class Acc>
void pack(const void* base, int64_t offset, int64_t row_stride, int64_t rows, const PackColumns& columns,
          bool square, Acc* dst, int64_t pitch) {
  constexpr int L = kLanes<Acc>;
  const Source* src = static_cast<const Source*>(base) + offset;
  const int64_t valid = columns.valid, width = columns.width;
  // A store past a row's width must not reach a neighbour's columns.
  const bool transposes = row_stride == 1 && valid > 1 && pitch == width;
  if (columns.contiguous && valid >= 2) {
    const Source* from = src + columns.offset[0];
    if (valid >= L) {
      pack_contiguous<Source, Acc, L>(from, row_stride, rows, valid, width, dst, pitch);
    } else if (L > 8 && valid >= 8) {
      pack_contiguous<Source, Acc, 8>(from, row_stride, rows, valid, width, dst, pitch);
    } else if (L > 4 && valid >= 4) {
      pack_contiguous<Source, Acc, 4>(from, row_stride, rows, valid, width, dst, pitch);
    } else {
      pack_contiguous<Source, Acc, 2>(from, row_stride, rows, valid, width, dst, pitch);
    }
  } else if (transposes && rows >= L) {
    pack_transposed<Source, Acc, L>(src, rows, columns, dst, pitch);
  } else if (transposes && L > 8 && rows >= 8) {
    pack_transposed<Source, Acc, 8>(src, rows, columns, dst, pitch);
  } else if (transposes && L > 4 && rows >= 4) {
    pack_transposed<Source, Acc, 4>(src, rows, columns, dst, pitch);
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < valid; ++c)
        dst[r * pitch + c] = to_acc(src[r * row_stride + columns.offset[c]]);
      for (int64_t c = valid; c < width; ++c) dst[r * pitch + c] = 0;
    }
  }
  if (square)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < width; ++c) dst[r * pitch + c] *= dst[r * pitch + c];
}

// Running sums of 64, then of 16, so that one addition need not wait for the one before it.
template <int kSums, class Source, class Acc>
ALWAYS_INLINE double sum_block(const Source*& src, int64_t stride, int64_t& count) {
  Acc lane[kSums] = {};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kSums <= count; i += kSums)
      for (int l = 0; l < kSums; ++l) lane[l] += to_acc(src[i + l]);
  } else {
    for (; i + kSums <= count; i += kSums)
      for (int l = 0; l < kSums; ++l) lane[l] += to_acc(src[(i + l) * stride]);
  }
  src += i * stride, count -= i;
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lane[l] += lane[l + half];
  return lane[0];
}

template <class Source, class Acc>
double sum(const void* base, int64_t offset, int64_t stride, int64_t count) {
  const Source* src = static_cast<const Source*>(base) + offset;
  double total = 0;
  for (; count > 64 * kTermsPerBlock; count -= 64 * kTermsPerBlock) {
    int64_t block = 64 * kTermsPerBlock;
    total += sum_block<64, Source, Acc>(src, stride, block);
  }
  if (count >= 64) total += sum_block<64, Source, Acc>(src, stride, count);
  if (count >= 8) total += sum_block<8, Source, Acc>(src, stride, count);
  for (int64_t i = 0; i < count; ++i) total += to_acc(src[i * stride]);
  return total;
}

template <class Source, class Acc>
void column_sums(const void* base, int64_t offset, int64_t row_stride, int64_t rows, int64_t count,
                 double* sums) {
  const Source* src = static_cast<const Source*>(base) + offset;
  constexpr int64_t kColumns = 64;
  for (int64_t c0 = 0; c0 < count; c0 += kColumns) {
    const int64_t width = min(kColumns, count - c0);
    for (int64_t begin = 0; begin < rows; begin += kTermsPerBlock) {
      const int64_t end = min(rows, begin + kTermsPerBlock);
      Acc block[kColumns] = {};
      for (int64_t r = begin; r < end; ++r)
        for (int64_t c = 0; c < width; ++c) block[c] += to_acc(src[r * row_stride + c0 + c]);
      for (int64_t c = 0; c < width; ++c) sums[c0 + c] += block[c];
    }
  }
}

template <class Acc>
double sum_squares(const Acc* x, int64_t count) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += 16 * kTermsPerBlock) {
    const int64_t end = min(count, begin + 16 * kTermsPerBlock);
    Acc lane[16] = {};
    int64_t i = begin;
    for (; i + 16 <= end; i += 16)
      for (int l = 0; l < 16; ++l) lane[l] += x[i + l] * x[i + l];
    for (; i < end; ++i) total += double(x[i]) * x[i];
    for (int l = 0; l < 16; ++l) total += lane[l];
  }
  return total;
}

// Inner products of rows [t, t + 4) with rows [s, s + 4) of x [T, width].
template <class Acc>
void gram_tile(const Acc* x, int64_t width, int64_t T, int64_t t, int64_t s, double (&out)[4][4]) {
  using V = Vector<Acc>;
  const Acc *left[4], *right[4];
  for (int i = 0; i < 4; ++i) {  // rows past the end repeat the last one; the caller skips them
    left[i] = x + min(t + i, T - 1) * width;
    right[i] = x + min(s + i, T - 1) * width;
  }
  V acc[4][4] = {};
  for (int64_t c = 0; c < width; c += kLanes<Acc>) {
    V r[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) r[i] = load(right[i] + c);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V l = load(left[i] + c);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) acc[i][k] += l * r[k];
    }
  }
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 4; ++k) out[i][k] = add_lanes<Acc>(acc[i][k]);
}

template <class Acc>
double gram_norm(const Acc* a, int64_t a_width, const Acc* b, int64_t b_width, int64_t T) {
  double total = 0;
  for (int64_t t = 0; t < T; t += 4)
    for (int64_t s = t; s < T; s += 4) {  // the upper triangle; tiles off the diagonal count twice
      double aa[4][4], bb[4][4];
      gram_tile(a, a_width, T, t, s, aa);
      gram_tile(b, b_width, T, t, s, bb);
      double tile = 0;
      for (int64_t i = 0; i < min(4, T - t); ++i)
        for (int64_t k = 0; k < min(4, T - s); ++k) tile += aa[i][k] * bb[i][k];
      total += s == t ? tile : 2 * tile;
    }
  return total;
}

template <class Acc>
void deviation(const Acc* a, const Acc* b, int64_t rows, Acc* mean, Acc* squares) {
  constexpr int L = kLanes<Acc>, kVectors = 4;
  for (int64_t c = 0; c < kDeviationColumns; c += kVectors * L) {
    Vector<Acc> m[kVectors] = {}, s[kVectors] = {};
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) m[v] += load(a + r * kDeviationColumns + c + v * L) * b[r];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) m[v] /= Acc(rows);
    for (int64_t r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vector<Acc> difference = load(a + r * kDeviationColumns + c + v * L) * b[r] - m[v];
        s[v] += difference * difference;
      }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      store_vector(mean + c + v * L, m[v]), store_vector(squares + c + v * L, s[v]);
  }
}

template <class Acc>
void center(const Acc* sum, Acc inverse_count, int64_t count, Acc* square) {
  for (int64_t i = 0; i < count; ++i) {
    const Acc difference = square[i] - sum[i] * inverse_count * sum[i];
    square[i] = difference < square[i] * Acc(1.0 / 64) ? Acc(kCancelled) : difference;
  }
}

template <class Acc>
bool any_negative(const Acc* x, int64_t count) {
  int64_t negative = 0;
  for (int64_t i = 0; i < count; ++i) negative += x[i] < 0;
  return negative > 0;
}

template <class Acc, int MR, int NV>
void store_products(const ProductStore<Acc>& store, const Acc* sum, int64_t row, int64_t rows, int64_t column,
                    int64_t columns) {
  constexpr int L = kLanes<Acc>, kWidth = NV * L;
  Acc* out = store.out + row * store.size + column;         // [rows, columns]
  Acc* transposed = store.out + column * store.size + row;  // [columns, rows]
  if (rows < MR || columns < kWidth || column < row + rows) {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t c = row + m > column ? row + m - column : 0; c < columns; ++c) {
        Acc value = store.scale * sum[m * kWidth + c];
        if (store.decay != 0) value += store.decay * out[m * store.size + c];
        out[m * store.size + c] = transposed[c * store.size + m] = value;
      }
    return;
  }
  for (int c = 0; c < kWidth; c += MR) {
    typename Piece<Acc, MR>::type x[MR];
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      x[m] = load_piece<Acc, MR>(sum + m * kWidth + c) * store.scale;
      Acc* to = out + m * store.size + c;
      if (store.decay != 0) x[m] += load_piece<Acc, MR>(to) * store.decay;
      std::memcpy(to, &x[m], sizeof(x[m]));
    }
    transpose<Acc, MR>(x);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) std::memcpy(transposed + (c + m) * store.size, &x[m], sizeof(x[m]));
  }
}

template <class Acc>
void scale(const Acc* x, Acc factor, int64_t count, Acc* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[i] * factor;
}

#define TILE(MR, NV) {MR, NV, contract<Acc, MR, NV, false>}
#define GROUPED_TILE(MR, NV) {MR, NV, contract<Acc, MR, NV, true>}
#define PRODUCT_TILE(MR, NV) {MR, NV, add_products<Acc, MR, NV, false>, store_products<Acc, MR, NV>}
#define GROUPED_PRODUCT_TILE(MR, NV) {MR, NV, add_products<Acc, MR, NV, true>, nullptr}
template <class Acc>
constexpr ProductTile<Acc> kDenseProducts[] = {PRODUCT_TILES};
template <class Acc>
constexpr ProductTile<Acc> kGroupedProducts[] = {GROUPED_PRODUCT_TILES};
template <class Acc>
constexpr Tile<Acc> kDense[] = {DENSE_TILES};
template <class Acc>
constexpr Tile<Acc> kGrouped[] = {GROUPED_TILES};

constexpr Kernels<float> kFloatKernels = {
    kLanes<float>,
    kDense<float>,
    sizeof(kDense<float>) / sizeof(kDense<float>[0]),
    kGrouped<float>,
    sizeof(kGrouped<float>) / sizeof(kGrouped<float>[0]),
    kDenseProducts<float>,
    sizeof(kDenseProducts<float>) / sizeof(kDenseProducts<float>[0]),
    kGroupedProducts<float>,
    sizeof(kGroupedProducts<float>) / sizeof(kGroupedProducts<float>[0]),
    {pack<float, float>, nullptr, pack<BFloat16, float>, pack<Float16, float>},
    store_strip<float>,
    {sum<float, float>, nullptr, sum<BFloat16, float>, sum<Float16, float>},
    {column_sums<float, float>, nullptr, column_sums<BFloat16, float>, column_sums<Float16, float>},
    sum_squares<float>,
    gram_norm<float>,
    deviation<float>,
    center<float>,
    any_negative<float>,
    scale<float>,
};
constexpr Kernels<double> kDoubleKernels = {
    kLanes<double>,
    kDense<double>,
    sizeof(kDense<double>) / sizeof(kDense<double>[0]),
    kGrouped<double>,
    sizeof(kGrouped<double>) / sizeof(kGrouped<double>[0]),
    kDenseProducts<double>,
    sizeof(kDenseProducts<double>) / sizeof(kDenseProducts<double>[0]),
    kGroupedProducts<double>,
    sizeof(kGroupedProducts<double>) / sizeof(kGroupedProducts<double>[0]),
    {nullptr, pack<double, double>, nullptr, nullptr},
    store_strip<double>,
    {nullptr, sum<double, double>, nullptr, nullptr},
    {nullptr, column_sums<double, double>, nullptr, nullptr},
    sum_squares<double>,
    gram_norm<double>,
    deviation<double>,
    center<double>,
    any_negative<double>,
    scale<double>,
};

}  // namespace
}  // namespace backpack_cuda::cpu
