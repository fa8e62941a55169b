// Linear layers: G_n[o, i] = sum_t grad_output[n, t, o] * input[n, t, i].
//
// T = 1: grad is one product over n, sum_grad_squared the product of the squared operands, batch_l2 the
// product of squared row norms, batch_grad the outer products.
// T > 1: the contraction, sample by sample, gives all in one pass. Without sums of squares and batch_grad,
// grad is one product over all rows (n, t), and batch_l2 comes from gram_norm where that is cheaper.
//
// The weighted gradient sum_n weights[n] G_n is that product with the rows of grad_output scaled as they are
// packed.

#include <array>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "common/aten.h"
#include "cpu/bias.h"
#include "cpu/linear.h"
#include "ops/operators.h"

namespace backpack_cuda::cpu {
namespace {

using torch::stable::parallel_for;

template <class Acc>
class Linear {
 public:
  Linear(const Tensor& input, const Tensor& grad_output, int64_t weight_want, int64_t bias_want,
         const StatsTensors& weight, const StatsTensors& bias, const Acc* sample_weights = nullptr)
      : a_(input),
        b_(grad_output),
        input_(input),
        grad_output_(grad_output),
        N_(input.size(0)),
        T_(b_.rows.count() / N_),
        I_(a_.width()),
        O_(b_.width()),
        want_(weight_want),
        weight_(weight),
        sample_weights_(sample_weights),
        kernels_(kernels<Acc>()),
        bias_(grad_output, grad_output.dim() - 1, bias_want, bias, workspace_) {}

  // Only grad may be wanted.
  void compute_weighted() { products(kGrad, false); }

  void compute() {
    const int64_t sums = want_ & (kGrad | kSumGradSquared | kSumGradCenteredSquared);
    const bool one_row = T_ == 1 && options().method != kContract;
    if (one_row) {
      if (sums && library_is_faster(sums))
        library_products(sums);
      else if (sums)
        products(sums, true);
      if (want_ & kSumGradCenteredSquared) recompute_cancelled();
      if (want_ & kBatchL2) outer_norms();
      if (want_ & kBatchGrad) outer_products();
    } else if (want_ && !(want_ & ~(kGrad | kBatchL2)) && options().method != kContract &&
               (want_ == kGrad || gram_is_cheaper())) {
      if (sums) products(sums, false);
      if (want_ & kBatchL2) gram_norms();
    } else if (want_) {
      contract_samples();
    }
    bias_.add(bias_done_, N_);
    bias_.finish();
  }

 private:
  void add_bias(int64_t end) {
    bias_.add(bias_done_, end);
    bias_done_ = end;
  }

  void contract_samples() {
    for_linear_plans<Acc>(O_, I_, N_, T_, 1, [&](const ContractPlan<Acc>& plan) {
      const LinearOperands<Acc> operands(plan, a_, b_, T_);
      contract<Acc>(plan, operands, {weight_, want_}, [&](int64_t, int64_t end) { add_bias(end); });
    });
  }

  // Sums over all rows (n, t) at once, in blocks of rows. Sums of squares are only those of G_n when T = 1.
  void products(int64_t want, bool squares) {
    const int64_t rows = N_ * T_, block = rows_per_block<Acc>(rows, I_, O_);
    for_linear_plans<Acc>(O_, I_, ceil_div(rows, block), block, 1, [&](ContractPlan<Acc> plan) {
      if (squares) plan.rows_are_samples = N_;
      LinearOperands<Acc> operands(plan, a_, b_, block);
      operands.sample_weights = sample_weights_, operands.rows_of_a_sample = T_;
      contract<Acc>(plan, operands, {weight_, want},
                    [&](int64_t, int64_t end) { add_bias(std::min(end * block, rows) / T_); });
    });
  }

  bool library_is_faster(int64_t want) const {
    if (!library_multiplies_faster<Acc>(a_, N_)) return false;
    return want == kGrad || (squares_fit<Acc>(N_, I_, O_) && (want & kGrad));
  }

  void library_products(int64_t want) {
    const Tensor a = flat(input_), b = flat(grad_output_);
    aten::transposed_product(b, a, weight_.grad);
    if (want == kGrad) return;
    // The last one that is wanted holds the sum of squares until it is centered.
    const Tensor& squares =
        want & kSumGradCenteredSquared ? weight_.sum_grad_centered_squared : weight_.sum_grad_squared;
    aten::transposed_product(aten::mul(b, b), aten::mul(a, a), squares);
    if (!(want & kSumGradCenteredSquared)) return;
    const Acc* sum = static_cast<const Acc*>(weight_.grad.const_data_ptr());
    Acc* centered = static_cast<Acc*>(squares.mutable_data_ptr());
    Acc* square = data_or_null<Acc>(weight_.sum_grad_squared, want & kSumGradSquared);
    const Acc inverse = Acc(1 / double(N_));
    parallel_for(0, O_ * I_, 1 << 14, [&](int64_t begin, int64_t end) {
      if (square) std::copy(centered + begin, centered + end, square + begin);
      kernels_.center(sum + begin, inverse, end - begin, centered + begin);
    });
  }

  // T = 1: computes sum_grad_centered_squared anew, by deviations from the mean, wherever the difference of
  // sums cancelled.
  void recompute_cancelled() {
    constexpr int64_t kColumns = kDeviationColumns, kRows = 512, kOutputs = 256;
    Acc* centered = static_cast<Acc*>(weight_.sum_grad_centered_squared.mutable_data_ptr());
    if (!kernels_.any_negative(centered, O_ * I_)) return;
    parallel_for(0, ceil_div(I_, kColumns), 1, [&](int64_t begin, int64_t end) {
      std::vector<Acc> a, b;
      std::vector<double> mean, squares;
      std::vector<int64_t> outputs;  // with something to do in this block of columns
      for (int64_t block = begin; block < end; ++block) {
        const int64_t i = block * kColumns, width = std::min(kColumns, I_ - i);
        for (int64_t o = 0; o < O_;) {
          for (outputs.clear(); o < O_ && int64_t(outputs.size()) < kOutputs; ++o) {
            if (kernels_.any_negative(centered + o * I_ + i, width)) outputs.push_back(o);
          }
          if (outputs.empty()) continue;
          a.resize(kRows * kColumns), b.resize(kRows);
          mean.assign(outputs.size() * kColumns, 0), squares.assign(outputs.size() * kColumns, 0);
          for (int64_t n = 0; n < N_; n += kRows) {
            const int64_t rows = std::min(kRows, N_ - n);
            a_.pack(0, n, n + rows, i, width, kColumns, false, a.data());
            for (size_t k = 0; k < outputs.size(); ++k) {
              b_.pack(0, n, n + rows, outputs[k], 1, 1, false, b.data());
              Acc row_mean[kColumns], row_squares[kColumns];
              kernels_.deviation(a.data(), b.data(), rows, row_mean, row_squares);
              for (int64_t c = 0; c < width; ++c) {  // Chan, Golub and LeVeque 1979
                const double difference = row_mean[c] - mean[k * kColumns + c],
                             share = double(rows) / double(n + rows);
                mean[k * kColumns + c] += difference * share;
                squares[k * kColumns + c] += row_squares[c] + difference * difference * share * double(n);
              }
            }
          }
          for (size_t k = 0; k < outputs.size(); ++k)
            for (int64_t c = 0; c < width; ++c) {
              Acc& value = centered[outputs[k] * I_ + i + c];
              if (value < 0) value = Acc(squares[k * kColumns + c]);
            }
        }
      }
    });
  }

  void outer_norms() {
    Acc* l2 = static_cast<Acc*>(weight_.batch_l2.mutable_data_ptr());
    parallel_for(0, N_, 16, [&](int64_t begin, int64_t end) {
      std::vector<Acc> scratch(std::max(I_, O_));
      for (int64_t n = begin; n < end; ++n) {
        const double a = kernels_.sum_squares(a_.row(0, n, scratch.data()), I_);
        l2[n] = Acc(a * kernels_.sum_squares(b_.row(0, n, scratch.data()), O_));
      }
    });
  }

  void outer_products() {
    const Convert<Acc> convert = converter<Acc>(b_.storage);
    void* out = weight_.batch_grad.mutable_data_ptr();
    parallel_for(0, N_, 1, [&](int64_t begin, int64_t end) {
      std::vector<Acc> a_scratch(I_), b_scratch(O_), product(convert ? I_ : 0);
      for (int64_t n = begin; n < end; ++n)
        outer_product<Acc>(b_.row(0, n, b_scratch.data()), O_, a_.row(0, n, a_scratch.data()), I_, convert,
                           product.data(), out, n * O_ * I_);
    });
  }

  int64_t gram_width() const { return round_up(I_, kernels_.lanes) + round_up(O_, kernels_.lanes); }

  // Half of T^2 (I + O) products, against T I O. With grad, which the contraction gives too, one more product
  // is needed.
  bool gram_is_cheaper() const {
    if (T_ * gram_width() * int64_t(sizeof(Acc)) > kChunkBytes / 2)
      return false;  // rows of one sample per thread
    if (options().method == kGram) return true;
    const double gram = 0.5 * double(T_) * double(T_ + 4) * double(I_ + O_),
                 product = double(T_) * double(I_) * double(O_);
    return want_ & kGrad ? T_ <= 16 && gram < 0.5 * product : gram < product;
  }

  void gram_norms() {
    Acc* l2 = static_cast<Acc*>(weight_.batch_l2.mutable_data_ptr());
    const int64_t a_width = round_up(I_, kernels_.lanes), b_width = round_up(O_, kernels_.lanes),
                  slots = std::min<int64_t>(N_, 16);
    Acc* scratch = workspace_.get<Acc>(slots * T_ * gram_width());
    parallel_for(0, slots, 1, [&](int64_t slot_begin, int64_t slot_end) {
      Acc *a = scratch + slot_begin * T_ * gram_width(), *b = a + T_ * a_width;
      for (int64_t n = slot_begin * N_ / slots; n < slot_end * N_ / slots; ++n) {
        a_.pack(0, n * T_, (n + 1) * T_, 0, I_, a_width, false, a);
        b_.pack(0, n * T_, (n + 1) * T_, 0, O_, b_width, false, b);
        const double norm = kernels_.gram_norm(a, a_width, b, b_width, T_);
        l2[n] = Acc(norm < 0 ? 0 : norm);  // rounding; NaN stays
      }
    });
  }

  const Matrix a_, b_;
  const Tensor &input_, &grad_output_;
  const int64_t N_, T_, I_, O_, want_;
  const StatsTensors& weight_;
  const Acc* const sample_weights_;  // [N], or null
  const Kernels<Acc>& kernels_;
  Workspace workspace_;
  BiasStats<Acc> bias_;
  int64_t bias_done_ = 0;  // samples
};

void statistics(const Tensor& input, const Tensor& grad_output, int64_t weight_want, int64_t bias_want,
                bool /*tf32: of CUDA*/, const StatsTensors& weight, const StatsTensors& bias) {
  if (input.scalar_type() == ScalarType::Double)
    Linear<double>(input, grad_output, weight_want, bias_want, weight, bias).compute();
  else
    Linear<float>(input, grad_output, weight_want, bias_want, weight, bias).compute();
}

void weighted_sum(const Tensor& input, const Tensor& grad_output, const Tensor& sample_weights,
                  bool /*tf32: of CUDA*/, const StatsTensors& weight) {
  const StatsTensors bias(grad_output, {}, 0, 0);
  const auto compute = [&]<class Acc>(Acc) {
    const std::vector<Acc> weights = values<Acc>(sample_weights);
    Linear<Acc>(input, grad_output, kGrad, 0, weight, bias, weights.data()).compute_weighted();
  };
  input.scalar_type() == ScalarType::Double ? compute(double()) : compute(float());
}

}  // namespace
}  // namespace backpack_cuda::cpu

STABLE_TORCH_LIBRARY_IMPL(backpack_cuda, CPU, m) {
  m.impl("linear_grad_stats", TORCH_BOX(&backpack_cuda::linear_grad_stats<backpack_cuda::cpu::statistics>));
  m.impl("linear_weighted_grad",
         TORCH_BOX(&backpack_cuda::linear_weighted_grad<backpack_cuda::cpu::weighted_sum>));
}
