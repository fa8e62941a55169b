#include "cpu/bias.h"

#include <torch/csrc/stable/ops.h>

namespace backpack_cuda::cpu {
namespace {

constexpr int64_t kChannelsPerItem = 64;

template <class Acc>
int64_t rows_per_block(int64_t channels, int64_t rows) {
  const int64_t row_bytes = std::max<int64_t>(channels, 1) * int64_t(sizeof(Acc));
  return std::clamp<int64_t>(kChunkBytes / row_bytes, 1, std::max<int64_t>(rows, 1));
}

// Rows of Acc to rows of a result, from row `row` on.
template <class Acc>
void write_rows(const Acc* rows, int64_t count, int64_t channels, const Tensor& result, int64_t row) {
  if (const Convert<Acc> convert = converter<Acc>(storage_of(result)))
    convert(rows, count * channels, result.mutable_data_ptr(), row * channels);
  else
    std::copy(rows, rows + count * channels, static_cast<Acc*>(result.mutable_data_ptr()) + row * channels);
}

}  // namespace

template <class Acc>
PositionSums<Acc>::PositionSums(const Tensor& tensor, int64_t channel_dim, int64_t v_stride)
    : channels(tensor.size(channel_dim)),
      storage(storage_of(tensor)),
      kernels_(kernels<Acc>()),
      sample_stride_(tensor.stride(0)),
      channel_stride_(tensor.stride(channel_dim)),
      v_stride_(v_stride),
      before_(tensor, 1, channel_dim),
      after_(tensor, channel_dim + 1, tensor.dim()),
      data_(tensor.const_data_ptr()) {}

template <class Acc>
void PositionSums<Acc>::one(int64_t n, int64_t v, int64_t channel_begin, int64_t channel_end,
                            Acc* sums) const {
  const int64_t base = n * sample_stride_ + v * v_stride_, count = channel_end - channel_begin;
  if (channel_stride_ == 1 && before_.count() * after_.count() == 1) {
    kernels_.pack[storage](data_, base, 0, 1, {&channel_begin, count, count, true}, false,
                           sums + channel_begin, count);
    return;
  }
  double totals[kChannelsPerItem] = {};
  before_.for_runs(
      0, before_.count(), [&](int64_t, int64_t outer_rows, int64_t outer_offset, int64_t outer_stride) {
        const int64_t outer_first = base + outer_offset + channel_begin * channel_stride_;
        if (channel_stride_ == 1 && after_.count() == 1) {
          kernels_.column_sums[storage](data_, outer_first, outer_stride, outer_rows, count, totals);
          return;
        }
        for (int64_t outer = 0; outer < outer_rows; ++outer)
          after_.for_runs(0, after_.count(), [&](int64_t, int64_t rows, int64_t offset, int64_t stride) {
            const int64_t first = outer_first + outer * outer_stride + offset;
            if (channel_stride_ == 1) {
              kernels_.column_sums[storage](data_, first, stride, rows, count, totals);
            } else {
              for (int64_t c = 0; c < count; ++c)
                totals[c] += kernels_.sum[storage](data_, first + c * channel_stride_, stride, rows);
            }
          });
      });
  for (int64_t c = 0; c < count; ++c) sums[channel_begin + c] = Acc(totals[c]);
}

template <class Acc>
void PositionSums<Acc>::operator()(int64_t begin, int64_t end, int64_t V, Acc* sums) const {
  const int64_t items = ceil_div(channels, kChannelsPerItem);
  torch::stable::parallel_for(0, (end - begin) * items, 16, [&](int64_t item_begin, int64_t item_end) {
    for (int64_t i = item_begin; i < item_end; ++i) {
      const int64_t q = begin + i / items, c = i % items * kChannelsPerItem;
      one(q / V, q % V, c, std::min(c + kChannelsPerItem, channels), sums + i / items * channels);
    }
  });
}

template <class Acc>
template <class F>
void PositionSums<Acc>::for_channels(const F& run) const {
  torch::stable::parallel_for(0, ceil_div(channels, kChannelsPerItem), 4, [&](int64_t begin, int64_t end) {
    run(begin * kChannelsPerItem, std::min(end * kChannelsPerItem, channels));
  });
}

template <class Acc>
BiasStats<Acc>::BiasStats(const Tensor& grad_output, int64_t channel_dim, int64_t want,
                          const StatsTensors& bias, Workspace& workspace)
    : kernels_(kernels<Acc>()),
      want_(want),
      position_sums_(grad_output, channel_dim),
      channels_(position_sums_.channels),
      bias_(bias) {
  if (!want) return;
  samples_per_block_ = rows_per_block<Acc>(channels_, grad_output.size(0));
  sums_ = workspace.get<Acc>(samples_per_block_ * channels_);
  total_ = workspace.get<double>(channels_);
  square_ = workspace.get<double>(channels_);
}

template <class Acc>
void BiasStats<Acc>::add(int64_t begin, int64_t end) {
  if (!want_) return;
  for (; begin < end; begin += samples_per_block_) {
    const int64_t samples = std::min(samples_per_block_, end - begin);
    position_sums_(begin, begin + samples, 1, sums_);
    if (want_ & kBatchGrad) write_rows(sums_, samples, channels_, bias_.batch_grad, begin);
    if (want_ & kBatchL2) {
      Acc* l2 = static_cast<Acc*>(bias_.batch_l2.mutable_data_ptr());
      for (int64_t n = 0; n < samples; ++n)
        l2[begin + n] = Acc(kernels_.sum_squares(sums_ + n * channels_, channels_));
    }
    if (!(want_ & (kGrad | kSumGradSquared | kSumGradCenteredSquared))) continue;
    position_sums_.for_channels([&](int64_t c0, int64_t c1) {
      if (count_ == 0) {
        std::fill(total_ + c0, total_ + c1, 0.0);
        std::fill(square_ + c0, square_ + c1, 0.0);
      }
      for (int64_t n = 0; n < samples; ++n) {
        const Acc* g = sums_ + n * channels_;
        const double count = double(count_ + n + 1);
        if (want_ & kSumGradCenteredSquared) {  // as in the weight's kernel
          const double inverse = 1 / count, weight = count > 1 ? count / (count - 1) : 1.0;
          for (int64_t c = c0; c < c1; ++c) {
            total_[c] += g[c];
            const double difference = g[c] - total_[c] * inverse;
            square_[c] += difference * (difference * weight);
          }
        } else if (want_ & kSumGradSquared) {
          for (int64_t c = c0; c < c1; ++c) total_[c] += g[c], square_[c] += double(g[c]) * g[c];
        } else {
          for (int64_t c = c0; c < c1; ++c) total_[c] += g[c];
        }
      }
    });
    count_ += samples;
  }
}

template <class Acc>
void BiasStats<Acc>::finish() {
  if (!want_) return;
  const double inverse = 1 / double(count_);
  const bool centered = want_ & kSumGradCenteredSquared;
  if (want_ & kGrad) {
    std::copy(total_, total_ + channels_, sums_);
    write_rows(sums_, 1, channels_, bias_.grad, 0);
  }
  if (centered)
    std::copy(square_, square_ + channels_,
              static_cast<Acc*>(bias_.sum_grad_centered_squared.mutable_data_ptr()));
  if (want_ & kSumGradSquared) {
    Acc* out = static_cast<Acc*>(bias_.sum_grad_squared.mutable_data_ptr());
    for (int64_t c = 0; c < channels_; ++c)
      out[c] = Acc(centered ? uncentered(square_[c], total_[c], inverse) : square_[c]);
  }
}

template <class Acc>
ColumnBiasStats<Acc>::ColumnBiasStats(const Tensor& first, const OutputGradients<Acc>& gradients,
                                      int64_t channel_dim, int64_t want, const ColumnTensors& bias,
                                      Workspace& workspace)
    : gradients_(gradients),
      want_(want),
      samples_(first.size(0)),
      position_sums_(first, channel_dim, gradients.stride),
      channels_(position_sums_.channels),
      bias_(bias) {
  if (!want) return;
  block_ = rows_per_block<Acc>(channels_, samples_ * gradients.V);
  sums_ = workspace.get<Acc>(block_ * channels_);
  square_ = workspace.get<Acc>(channels_);
  total_ = workspace.get<double>(channels_);
  std::fill(total_, total_ + channels_, 0.0);
}

template <class Acc>
void ColumnBiasStats<Acc>::add(int64_t begin, int64_t end) {
  if (!want_) return;
  const int64_t V = gradients_.V;
  for (int64_t q = begin; q < end; q += block_) {
    const int64_t count = std::min(block_, end - q);
    position_sums_(q, q + count, V, sums_);
    if (want_ & kFactor)
      for (int64_t i = 0; i < count; ++i)
        write_rows(sums_ + i * channels_, 1, channels_, bias_.factor, (q + i) % V * samples_ + (q + i) / V);
    if (!(want_ & (kBatchDiag | kDiag))) continue;
    Acc* const batch_diag = data_or_null<Acc>(bias_.batch_diag, want_ & kBatchDiag);
    position_sums_.for_channels([&](int64_t c0, int64_t c1) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = (q + i) / V, v = (q + i) % V;
        const Acc* g = sums_ + i * channels_;
        const Acc sign = gradients_.signs ? gradients_.signs[q + i] : Acc(1);
        if (v == 0) std::fill(square_ + c0, square_ + c1, Acc(0));
        for (int64_t c = c0; c < c1; ++c) square_[c] += sign * g[c] * g[c];
        if (v + 1 < V) continue;
        for (int64_t c = c0; c < c1; ++c) total_[c] += square_[c];
        if (batch_diag) std::copy(square_ + c0, square_ + c1, batch_diag + n * channels_ + c0);
      }
    });
  }
}

template <class Acc>
void ColumnBiasStats<Acc>::finish() {
  if (want_ & kDiag) std::copy(total_, total_ + channels_, static_cast<Acc*>(bias_.diag.mutable_data_ptr()));
}

template class ColumnBiasStats<float>;
template class ColumnBiasStats<double>;
template class BiasStats<float>;
template class BiasStats<double>;

}  // namespace backpack_cuda::cpu
