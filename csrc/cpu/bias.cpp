#include "cpu/bias.h"

#include <torch/csrc/stable/ops.h>

namespace backpack_cuda::cpu {
namespace {

constexpr int64_t kChannelsPerItem = 64;

}  // namespace

template <class Acc>
BiasStats<Acc>::BiasStats(const Tensor& grad_output, int64_t channel_dim, int64_t want,
                          const StatsTensors& bias, Workspace& workspace)
    : kernels_(kernels<Acc>()),
      want_(want),
      channels_(grad_output.size(channel_dim)),
      sample_stride_(grad_output.stride(0)),
      channel_stride_(grad_output.stride(channel_dim)),
      before_(grad_output, 1, channel_dim),
      after_(grad_output, channel_dim + 1, grad_output.dim()),
      data_(grad_output.const_data_ptr()),
      storage_(storage_of(grad_output)),
      bias_(bias) {
  if (!want) return;
  const int64_t sample_bytes = std::max<int64_t>(channels_, 1) * int64_t(sizeof(Acc));
  samples_per_block_ =
      std::clamp<int64_t>(kChunkBytes / sample_bytes, 1, std::max<int64_t>(grad_output.size(0), 1));
  sums_ = workspace.get<Acc>(samples_per_block_ * channels_);
  total_ = workspace.get<double>(channels_);
  square_ = workspace.get<double>(channels_);
}

template <class Acc>
void BiasStats<Acc>::sum_positions(int64_t n, int64_t channel_begin, int64_t channel_end, Acc* sums) const {
  double totals[kChannelsPerItem] = {};
  const int64_t base = n * sample_stride_, channels = channel_end - channel_begin;
  before_.for_runs(
      0, before_.count(), [&](int64_t, int64_t outer_rows, int64_t outer_offset, int64_t outer_stride) {
        const int64_t outer_first = base + outer_offset + channel_begin * channel_stride_;
        if (channel_stride_ == 1 && after_.count() == 1) {
          kernels_.column_sums[storage_](data_, outer_first, outer_stride, outer_rows, channels, totals);
          return;
        }
        for (int64_t outer = 0; outer < outer_rows; ++outer)
          after_.for_runs(0, after_.count(), [&](int64_t, int64_t rows, int64_t offset, int64_t stride) {
            const int64_t first = outer_first + outer * outer_stride + offset;
            if (channel_stride_ == 1) {
              kernels_.column_sums[storage_](data_, first, stride, rows, channels, totals);
            } else {
              for (int64_t c = 0; c < channels; ++c)
                totals[c] += kernels_.sum[storage_](data_, first + c * channel_stride_, stride, rows);
            }
          });
      });
  for (int64_t c = 0; c < channels; ++c) sums[channel_begin + c] = Acc(totals[c]);
}

template <class Acc>
void BiasStats<Acc>::add(int64_t begin, int64_t end) {
  if (!want_) return;
  const int64_t items = ceil_div(channels_, kChannelsPerItem);
  const auto channel_range = [&](int64_t item) {
    return std::pair{item * kChannelsPerItem, std::min((item + 1) * kChannelsPerItem, channels_)};
  };
  const Convert<Acc> convert = converter<Acc>(storage_);
  for (; begin < end; begin += samples_per_block_) {
    const int64_t samples = std::min(samples_per_block_, end - begin);
    torch::stable::parallel_for(0, samples * items, 16, [&](int64_t item_begin, int64_t item_end) {
      for (int64_t i = item_begin; i < item_end; ++i) {
        const auto [c0, c1] = channel_range(i % items);
        sum_positions(begin + i / items, c0, c1, sums_ + i / items * channels_);
      }
    });
    if (want_ & kBatchGrad) {
      Acc* out = static_cast<Acc*>(bias_.batch_grad.mutable_data_ptr());
      if (convert)
        convert(sums_, samples * channels_, out, begin * channels_);
      else
        std::copy(sums_, sums_ + samples * channels_, out + begin * channels_);
    }
    if (want_ & kBatchL2) {
      Acc* l2 = static_cast<Acc*>(bias_.batch_l2.mutable_data_ptr());
      for (int64_t n = 0; n < samples; ++n)
        l2[begin + n] = Acc(kernels_.sum_squares(sums_ + n * channels_, channels_));
    }
    if (!(want_ & (kGrad | kSumGradSquared | kSumGradCenteredSquared))) continue;
    torch::stable::parallel_for(0, items, 4, [&](int64_t item_begin, int64_t item_end) {
      const int64_t c0 = channel_range(item_begin).first, c1 = channel_range(item_end - 1).second;
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
  const Convert<Acc> convert = converter<Acc>(storage_);
  const double inverse = 1 / double(count_);
  const bool centered = want_ & kSumGradCenteredSquared;
  Acc* out = sums_;
  if (want_ & kGrad) {
    if (!convert) out = static_cast<Acc*>(bias_.grad.mutable_data_ptr());
    std::copy(total_, total_ + channels_, out);
    if (convert) convert(out, channels_, bias_.grad.mutable_data_ptr(), 0);
  }
  if (centered)
    std::copy(square_, square_ + channels_,
              static_cast<Acc*>(bias_.sum_grad_centered_squared.mutable_data_ptr()));
  if (want_ & kSumGradSquared) {
    out = static_cast<Acc*>(bias_.sum_grad_squared.mutable_data_ptr());
    for (int64_t c = 0; c < channels_; ++c)
      out[c] = Acc(centered ? uncentered(square_[c], total_[c], inverse) : square_[c]);
  }
}

template class BiasStats<float>;
template class BiasStats<double>;

}  // namespace backpack_cuda::cpu
