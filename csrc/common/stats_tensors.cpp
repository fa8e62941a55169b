#include "common/stats_tensors.h"

#include <torch/csrc/stable/ops.h>

#include "cpu/result_pool.h"
#include "cpu/workspace.h"

namespace backpack_cuda {
namespace {

Tensor result(const Tensor& like, bool wanted, const std::vector<int64_t>& shape, ScalarType dtype) {
  const std::vector<int64_t> none{0};
  if (!like.is_cpu()) return torch::stable::new_empty(like, wanted ? shape : none, dtype);
  Tensor tensor = cpu::pooled_empty(like, wanted ? shape : none, dtype);
  cpu::advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

std::vector<int64_t> with_batch(int64_t N, std::vector<int64_t> shape) {
  shape.insert(shape.begin(), N);
  return shape;
}

}  // namespace

StatsTensors::StatsTensors(const Tensor& like, const std::vector<int64_t>& shape, int64_t N, int64_t want)
    : grad(
          torch::stable::new_empty(like, want & kGrad ? shape : std::vector<int64_t>{0}, like.scalar_type())),
      batch_grad(result(like, want & kBatchGrad, with_batch(N, shape), like.scalar_type())),
      batch_l2(result(like, want & kBatchL2, {N}, statistics_dtype(like))),
      sum_grad_squared(result(like, want & kSumGradSquared, shape, statistics_dtype(like))),
      sum_grad_centered_squared(result(like, want & kSumGradCenteredSquared, shape, statistics_dtype(like))) {
}

void StatsTensors::fill_zero() {
  for (Tensor* tensor : {&grad, &batch_grad, &batch_l2, &sum_grad_squared, &sum_grad_centered_squared})
    torch::stable::zero_(*tensor);
}

bool zero_if_empty(const Tensor& input, const Tensor& grad_output, StatsTensors& weight, StatsTensors& bias,
                   int64_t& weight_want) {
  const bool no_bias = grad_output.numel() == 0, no_weight = no_bias || input.numel() == 0;
  if (no_bias) bias.fill_zero();
  if (no_weight) {
    weight.fill_zero();
    weight_want = 0;
  }
  return no_bias;
}

FiveStats as_tuple(const StatsTensors& p) {
  return {p.grad, p.batch_grad, p.batch_l2, p.sum_grad_squared, p.sum_grad_centered_squared};
}

TenStats as_tuple(const StatsTensors& weight, const StatsTensors& bias) {
  return std::tuple_cat(as_tuple(weight), as_tuple(bias));
}

}  // namespace backpack_cuda
