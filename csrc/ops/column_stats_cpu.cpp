// Statistics of V output gradients per sample, G_vn for each of them.
//
// T > 1, convolutions: the contraction, sample by sample, in which (n, v) counts as a sample; the operand
// without V is packed once.
// Linear layers with T = 1: G_vn^2 is an outer product of squares, so that diag is one product of
// sum_v signs b_vn^2 with a_n^2 over n, and batch_diag their outer products.
#include <torch/csrc/stable/library.h>

#include "common/aten.h"
#include "cpu/bias.h"
#include "cpu/conv.h"
#include "cpu/linear.h"
#include "cpu/result_pool.h"
#include "ops/column_stats.h"

namespace backpack_cuda::cpu {
namespace {

using torch::stable::parallel_for;

// The columns of an operator, with the signs in their order here.
template <class Acc>
class Gradients : public OutputGradients<Acc> {
 public:
  explicit Gradients(const Columns& columns) {
    this->V = columns.V(), this->stride = columns.stride();
    if (!columns.signs) return;
    const Tensor& signs = *columns.signs;  // [V, N]
    const Acc* const data = static_cast<const Acc*>(signs.const_data_ptr());
    for (int64_t n = 0; n < columns.N(); ++n)
      for (int64_t v = 0; v < this->V; ++v)
        values_.push_back(data[v * signs.stride(0) + n * signs.stride(1)]);
    this->signs = values_.data();
  }

 private:
  std::vector<Acc> values_;  // [N, V]
};

// T = 1: packs a_n^2 and sum_v signs b_vn^2, whose product over n is diag.
template <class Acc>
class SquareOperands : public LinearOperands<Acc> {
 public:
  using Piece = typename Operands<Acc>::Piece;
  SquareOperands(const ContractPlan<Acc>& plan, const Matrix& a, const Matrix& b, int64_t T,
                 const OutputGradients<Acc>& gradients)
      : LinearOperands<Acc>(plan, a, b, T), gradients_(gradients) {}

  void pack_a(const Piece& piece, int64_t group_begin, int64_t group_end, Acc* dst) const override {
    Piece squared = piece;
    squared.square = true;
    LinearOperands<Acc>::pack_a(squared, group_begin, group_end, dst);
  }

  void pack_b(const Piece& piece, int64_t strip_begin, int64_t strip_end, Acc* dst) const override {
    const auto [first, begin, valid, end] = this->rows_of(piece);
    const int64_t width = this->plan_.tile.mr, rows = this->rows_in_slab(piece.slab), V = gradients_.V;
    std::vector<Acc> scratch((valid - begin) * width);
    for (int64_t strip = strip_begin; strip < strip_end; ++strip, dst += rows * width) {
      std::fill(dst + begin * width, dst + end * width, Acc(0));
      const int64_t columns = std::min(this->plan_.rows - strip * width, width);
      for (int64_t v = 0; v < V && begin < valid; ++v) {
        this->b_.pack(v, first + begin, first + valid, strip * width, columns, width, true, scratch.data());
        for (int64_t r = begin; r < valid; ++r) {
          const Acc sign = gradients_.signs ? gradients_.signs[(first + r) * V + v] : Acc(1);
          for (int64_t c = 0; c < width; ++c) dst[r * width + c] += sign * scratch[(r - begin) * width + c];
        }
      }
    }
  }

 private:
  const OutputGradients<Acc>& gradients_;
};

template <class Acc>
class LinearColumns {
 public:
  LinearColumns(const Tensor& input, const Columns& columns, int64_t want, const ColumnTensors& weight)
      : input_(input),
        gradients_(columns),
        a_(input),
        b_(columns.first, columns.stride()),
        N_(columns.N()),
        T_(b_.rows.count() / N_),
        I_(a_.width()),
        O_(b_.width()),
        want_(want),
        weight_(weight) {}

  const OutputGradients<Acc>& gradients() const { return gradients_; }

  // add_bias(begin, end) for ranges of pairs n * V + v, at most once each, in order.
  template <class F>
  void compute(const F& add_bias) {
    if (T_ > 1 || options().method == kContract) {
      for_linear_plans<Acc>(O_, I_, N_, T_, gradients_.V, [&](const ContractPlan<Acc>& plan) {
        LinearOperands<Acc> operands(plan, a_, b_, T_);
        operands.signs = gradients_.signs;
        contract<Acc>(plan, operands, {weight_, want_}, add_bias);
      });
      return;
    }
    if (want_ & kDiag) {
      if (library_multiplies_faster<Acc>(a_, N_) && squares_fit<Acc>(N_, I_, O_))
        library_product();
      else
        diag();
    }
    if (want_ & (kBatchDiag | kFactor)) outer_products();
  }

 private:
  void diag() {
    const int64_t block = rows_per_block<Acc>(N_, I_, O_);
    ContractResults results;
    results.grad = &weight_.diag;
    for_linear_plans<Acc>(O_, I_, ceil_div(N_, block), block, 1, [&](const ContractPlan<Acc>& plan) {
      const SquareOperands<Acc> operands(plan, a_, b_, block, gradients_);
      contract<Acc>(plan, operands, results, [](int64_t, int64_t) {});
    });
  }

  // diag, by torch's matrix product.
  void library_product() {
    const Tensor squares = pooled_empty(input_, {N_, O_}, input_.scalar_type());  // sum_v signs b_vn^2
    Acc* const data = static_cast<Acc*>(squares.mutable_data_ptr());
    parallel_for(0, N_, 16, [&](int64_t begin, int64_t end) {
      std::vector<Acc> scratch(O_);
      for (int64_t n = begin; n < end; ++n) add_squares(n, scratch.data(), data + n * O_);
    });
    const Tensor a = flat(input_);
    aten::transposed_product(squares, aten::mul(a, a), weight_.diag);
  }

  // square [O] = sum_v signs b_vn^2
  void add_squares(int64_t n, Acc* scratch, Acc* square) const {
    std::fill(square, square + O_, Acc(0));
    for (int64_t v = 0; v < gradients_.V; ++v) {
      const Acc* b = b_.row(v, n, scratch);
      const Acc sign = gradients_.signs ? gradients_.signs[n * gradients_.V + v] : Acc(1);
      for (int64_t o = 0; o < O_; ++o) square[o] += sign * b[o] * b[o];
    }
  }

  void outer_products() {
    const Convert<Acc> convert = converter<Acc>(b_.storage);
    void* const factor = data_or_null(weight_.factor, want_ & kFactor);
    Acc* const batch_diag = data_or_null<Acc>(weight_.batch_diag, want_ & kBatchDiag);
    const int64_t V = gradients_.V, size = O_ * I_;
    parallel_for(0, N_, 1, [&](int64_t begin, int64_t end) {
      std::vector<Acc> a_scratch(I_), a_square(I_), b_scratch(O_), square(O_), product(convert ? I_ : 0);
      for (int64_t n = begin; n < end; ++n) {
        const Acc* a = a_.row(0, n, a_scratch.data());
        for (int64_t v = 0; v < V && factor; ++v) {
          const Acc* b = b_.row(v, n, b_scratch.data());
          outer_product(b, O_, a, I_, convert, product.data(), factor, (v * N_ + n) * size);
        }
        if (!batch_diag) continue;
        add_squares(n, b_scratch.data(), square.data());
        for (int64_t i = 0; i < I_; ++i) a_square[i] = a[i] * a[i];
        outer_product<Acc>(square.data(), O_, a_square.data(), I_, nullptr, nullptr, batch_diag, n * size);
      }
    });
  }

  const Tensor& input_;
  const Gradients<Acc> gradients_;
  const Matrix a_, b_;
  const int64_t N_, T_, I_, O_, want_;
  const ColumnTensors& weight_;
};

// Calls compute(float()) or compute(double()), after the type of the statistics.
template <class F>
void in_statistics_type(const Tensor& operand, const F& compute) {
  operand.scalar_type() == ScalarType::Double ? compute(double()) : compute(float());
}

void linear(const Tensor& input, const Columns& columns, int64_t weight_want, int64_t bias_want,
            bool /*tf32: of CUDA*/, const ColumnTensors& weight, const ColumnTensors& bias) {
  in_statistics_type(input, [&]<class Acc>(Acc) {
    Workspace workspace;
    LinearColumns<Acc> layer(input, columns, weight_want, weight);
    ColumnBiasStats<Acc> bias_stats(columns.first, layer.gradients(), input.dim() - 1, bias_want, bias,
                                    workspace);
    int64_t bias_done = 0;  // pairs n * V + v
    const auto add_bias = [&](int64_t, int64_t end) {
      bias_stats.add(bias_done, end);
      bias_done = end;
    };
    if (weight_want) layer.compute(add_bias);
    add_bias(bias_done, columns.N() * columns.V());
    bias_stats.finish();
  });
}

void convolution(const Convolution& conv, const Columns& columns, int64_t weight_want, int64_t bias_want,
                 bool /*tf32: of CUDA*/, const ColumnTensors& weight, const ColumnTensors& bias) {
  in_statistics_type(conv.input, [&]<class Acc>(Acc) {
    Workspace workspace;
    const Gradients<Acc> gradients(columns);
    ColumnBiasStats<Acc> bias_stats(columns.first, gradients, 1, bias_want, bias, workspace);
    const auto add_bias = [&](int64_t begin, int64_t end) { bias_stats.add(begin, end); };
    if (weight_want)
      conv_contract<Acc>(conv, {weight, weight_want}, add_bias, nullptr, gradients);
    else
      add_bias(0, columns.N() * columns.V());
    bias_stats.finish();
  });
}

void bias(const Columns& columns, int64_t channel_dim, int64_t want, const ColumnTensors& bias) {
  in_statistics_type(columns.all, [&]<class Acc>(Acc) {
    Workspace workspace;
    const Gradients<Acc> gradients(columns);
    ColumnBiasStats<Acc> stats(columns.first, gradients, channel_dim, want, bias, workspace);
    stats.add(0, columns.N() * columns.V());
    stats.finish();
  });
}

}  // namespace
}  // namespace backpack_cuda::cpu

STABLE_TORCH_LIBRARY_IMPL(backpack_cuda, CPU, m) {
  m.impl("linear_column_stats", TORCH_BOX(&backpack_cuda::linear_column_stats<backpack_cuda::cpu::linear>));
  m.impl("conv_column_stats", TORCH_BOX(&backpack_cuda::conv_column_stats<backpack_cuda::cpu::convolution>));
  m.impl("conv_transpose_column_stats",
         TORCH_BOX(&backpack_cuda::conv_transpose_column_stats<backpack_cuda::cpu::convolution>));
  m.impl("bias_column_stats", TORCH_BOX(&backpack_cuda::bias_column_stats<backpack_cuda::cpu::bias>));
}
