// Linear layers as contractions: G_n[o, i] = sum_t b[n, t, o] a[n, t, i] with operands [N, *, width].
#pragma once
#include <algorithm>
#include <vector>

#include "common/aten.h"
#include "cpu/contract.h"
#include "cpu/options.h"
#include "cpu/strided.h"

namespace backpack_cuda::cpu {

// One operand as a matrix of rows (n, t), or V of them.
struct Matrix {
  const void* data;
  Storage storage;
  Rows rows;                     // [N * T]
  std::vector<int64_t> columns;  // offsets
  bool contiguous;               // columns side by side
  int64_t v_stride;              // elements from one of the matrices to the next

  explicit Matrix(const Tensor& tensor, int64_t v_stride = 0)  // [N, *, columns]
      : data(tensor.const_data_ptr()),
        storage(storage_of(tensor)),
        rows(tensor, 0, tensor.dim() - 1),
        columns(tensor.size(tensor.dim() - 1)),
        v_stride(v_stride) {
    const int64_t stride = tensor.stride(tensor.dim() - 1);
    for (size_t c = 0; c < columns.size(); ++c) columns[c] = int64_t(c) * stride;
    contiguous = stride == 1;
  }
  int64_t width() const { return int64_t(columns.size()); }

  // Rows [begin, end) of matrix v, columns [column, column + count) and zeros, to dst [end - begin, width].
  template <class Acc>
  void pack(int64_t v, int64_t begin, int64_t end, int64_t column, int64_t count, int64_t width, bool square,
            Acc* dst) const {
    const PackColumns block{columns.data() + column, count, width, contiguous};
    rows.for_runs(begin, end, [&](int64_t row, int64_t count, int64_t offset, int64_t stride) {
      kernels<Acc>().pack[storage](data, offset + v * v_stride, stride, count, block, square,
                                   dst + (row - begin) * width, width);
    });
  }

  // One row in Acc: in place where it lies so already, else in `scratch` [width].
  template <class Acc>
  const Acc* row(int64_t v, int64_t index, Acc* scratch) const {
    const bool in_place = contiguous && storage == (sizeof(Acc) == 8 ? kFloat64 : kFloat32);
    const Acc* result = scratch;
    rows.for_runs(index, index + 1, [&](int64_t, int64_t, int64_t offset, int64_t) {
      if (in_place) result = static_cast<const Acc*>(data) + offset + v * v_stride;
    });
    if (!in_place) pack(v, index, index + 1, 0, width(), width(), false, scratch);
    return result;
  }
};

// Packs a and b in blocks of columns [block, t, width], so that a tile reads consecutive memory.
template <class Acc>
class LinearOperands : public Operands<Acc> {
 public:
  using Piece = typename Operands<Acc>::Piece;
  LinearOperands(const ContractPlan<Acc>& plan, const Matrix& a, const Matrix& b, int64_t T)
      : plan_(plan), a_(a), b_(b), T_(T) {}

  int64_t rows_in_slab(int64_t slab) const override {
    return std::min(plan_.slab_rows, T_ - slab * plan_.slab_rows);
  }

  void pack_a(const Piece& piece, int64_t, int64_t, Acc* dst) const override {
    const int64_t width = plan_.tile.nv * plan_.lanes;
    for (int64_t block = 0; block < plan_.blocks; ++block)
      pack(a_, piece, plan_.column_begin + block * width, plan_.columns - block * width, width,
           dst + block * plan_.slab_rows * width);
  }

  void pack_b(const Piece& piece, int64_t strip_begin, int64_t strip_end, Acc* dst) const override {
    const int64_t width = plan_.tile.mr, rows = rows_in_slab(piece.slab);
    for (int64_t strip = strip_begin; strip < strip_end; ++strip)
      pack(b_, piece, strip * width, plan_.rows - strip * width, width,
           dst + (strip - strip_begin) * rows * width, this->sample_weights);
  }

  int64_t rows_of_a_sample = 1;  // to which one of sample_weights belongs

 protected:
  // The rows of a slab that a piece packs, [begin, end), and where those end that the operand has: the last
  // block of rows may be short.
  struct PieceRows {
    int64_t first, begin, valid, end;  // `first` in the operand, the others from there
  };
  PieceRows rows_of(const Piece& piece) const {
    const int64_t rows = rows_in_slab(piece.slab), first = piece.n * T_ + piece.slab * plan_.slab_rows;
    const int64_t begin = rows * piece.part / piece.parts, end = rows * (piece.part + 1) / piece.parts;
    return {first, begin, std::clamp(a_.rows.count() - first, begin, end), end};
  }

  const ContractPlan<Acc>& plan_;
  const Matrix &a_, &b_;
  const int64_t T_;

 private:
  // Columns from `column` on, of which `left` are there.
  void pack(const Matrix& matrix, const Piece& piece, int64_t column, int64_t left, int64_t width, Acc* dst,
            const Acc* sample_weights = nullptr) const {
    const auto [first, begin, valid, end] = rows_of(piece);
    matrix.pack(piece.v, first + begin, first + valid, column, std::min(left, width), width, piece.square,
                dst + begin * width);
    if (sample_weights) {
      for (int64_t r = begin; r < valid; ++r) {
        const Acc sample_weight = sample_weights[(first + r) / rows_of_a_sample];
        for (int64_t c = 0; c < width; ++c) dst[r * width + c] *= sample_weight;
      }
    }
    std::fill(dst + valid * width, dst + end * width, Acc(0));
  }
};

// `samples` samples of T rows and V output gradients, columns [column_begin, column_end) of a weight [O, I].
template <class Acc>
ContractPlan<Acc> linear_plan(int64_t O, int64_t I, int64_t samples, int64_t T, int64_t V,
                              int64_t column_begin, int64_t column_end) {
  const int64_t lanes = kernels<Acc>().lanes;
  ContractPlan<Acc> plan;
  plan.samples = samples, plan.V = V;
  plan.groups = 1;
  plan.all_rows = plan.rows = O;
  plan.columns = column_end - column_begin, plan.column_begin = column_begin, plan.row_length = I;
  plan.choose_tile(kernels<Acc>(), ceil_div(plan.columns, lanes));
  const int64_t width = plan.tile.nv * lanes, size = int64_t(sizeof(Acc));
  const int64_t a = plan.blocks * width * size, b = plan.strips_per_pass() * plan.tile.mr * size;  // per row
  const int64_t slab_bytes = options().chunk_bytes ? options().chunk_bytes : kSlabBytes;
  const int64_t fitting = slab_bytes / plan.packed(a, b, T * (a + b) <= slab_bytes ? 1 : plan.slab_V());
  plan.slab_rows = std::clamp<int64_t>(fitting, 1, std::min<int64_t>(T, 1 << 16));
  plan.slabs = ceil_div(T, plan.slab_rows);
  plan.a_group = plan.blocks * plan.slab_rows * width;
  for (int64_t t = 0; t < plan.slab_rows; ++t) plan.row_offset.push_back(int32_t(t * width));
  for (int64_t v = 0; v < plan.blocks * plan.tile.nv; ++v) {
    plan.column_offset[v] = v / plan.tile.nv * plan.slab_rows * width + v % plan.tile.nv * lanes;
    plan.column_lanes[v] = int32_t(std::clamp<int64_t>(plan.columns - v * lanes, 0, lanes));
  }
  return plan;
}

// Calls run(plan) for every range of columns: the accumulators of a strip are as wide as the range.
template <class Acc, class F>
void for_linear_plans(int64_t O, int64_t I, int64_t samples, int64_t T, int64_t V, const F& run) {
  constexpr int64_t kColumns = 1 << 14;
  const int64_t ranges = ceil_div(I, kColumns), columns = round_up(ceil_div(I, ranges), 64);
  for (int64_t begin = 0; begin < I; begin += columns)
    run(linear_plan<Acc>(O, I, samples, T, V, begin, std::min(begin + columns, I)));
}

// For products over all rows of both operands at once: how many come at a time.
template <class Acc>
int64_t rows_per_block(int64_t rows, int64_t I, int64_t O) {
  const int64_t fitting = kChunkBytes / ((I + O) * int64_t(sizeof(Acc)));
  return std::min(rows, std::clamp<int64_t>(fitting, 64, 1024));
}

// T = 1: whether torch's own matrix products are faster than the contraction, by 10 to 30 %. With more rows
// than this they may split the sum over n between threads, and their results then depend on the number of
// threads.
template <class Acc>
bool library_multiplies_faster(const Matrix& a, int64_t N) {
  constexpr int64_t kRows = 256;
  return N <= kRows && options().method != kProducts && a.storage == (sizeof(Acc) == 8 ? kFloat64 : kFloat32);
}

// Whether copies of both operands are small enough.
template <class Acc>
bool squares_fit(int64_t N, int64_t I, int64_t O) {
  return N * (I + O) * int64_t(sizeof(Acc)) <= kSlabBytes;
}

// T = 1: an operand as a matrix without a graph, [N, columns].
inline Tensor flat(const Tensor& tensor) {
  return torch::stable::reshape(aten::detach(tensor), {tensor.size(0), tensor.size(tensor.dim() - 1)});
}

// b a^T to `out` [O, I] from element `offset` on; scratch [I] where `convert` is set.
template <class Acc>
void outer_product(const Acc* b, int64_t O, const Acc* a, int64_t I, Convert<Acc> convert, Acc* scratch,
                   void* out, int64_t offset) {
  for (int64_t o = 0; o < O; ++o, offset += I) {
    kernels<Acc>().scale(a, b[o], I, convert ? scratch : static_cast<Acc*>(out) + offset);
    if (convert) convert(scratch, I, out, offset);
  }
}

}  // namespace backpack_cuda::cpu
