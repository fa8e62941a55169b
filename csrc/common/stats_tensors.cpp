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

std::vector<int64_t> with_batch(std::initializer_list<int64_t> batch, std::vector<int64_t> shape) {
  shape.insert(shape.begin(), batch);
  return shape;
}

}  // namespace

StatsTensors::StatsTensors(const Tensor& like, const std::vector<int64_t>& shape, int64_t N, int64_t want)
    : grad(
          torch::stable::new_empty(like, want & kGrad ? shape : std::vector<int64_t>{0}, like.scalar_type())),
      batch_grad(result(like, want & kBatchGrad, with_batch({N}, shape), like.scalar_type())),
      batch_l2(result(like, want & kBatchL2, {N}, statistics_dtype(like))),
      sum_grad_squared(result(like, want & kSumGradSquared, shape, statistics_dtype(like))),
      sum_grad_centered_squared(result(like, want & kSumGradCenteredSquared, shape, statistics_dtype(like))) {
}

void StatsTensors::fill_zero() {
  for (Tensor* tensor : {&grad, &batch_grad, &batch_l2, &sum_grad_squared, &sum_grad_centered_squared})
    torch::stable::zero_(*tensor);
}

ColumnTensors::ColumnTensors(const Tensor& like, const std::vector<int64_t>& shape, int64_t V, int64_t N,
                             int64_t want)
    : factor(result(like, want & kFactor, with_batch({V, N}, shape), like.scalar_type())),
      batch_diag(result(like, want & kBatchDiag, with_batch({N}, shape), statistics_dtype(like))),
      diag(result(like, want & kDiag, shape, statistics_dtype(like))) {}

void ColumnTensors::fill_zero() {
  for (Tensor* tensor : {&factor, &batch_diag, &diag}) torch::stable::zero_(*tensor);
}

FiveStats as_tuple(const StatsTensors& p) {
  return {p.grad, p.batch_grad, p.batch_l2, p.sum_grad_squared, p.sum_grad_centered_squared};
}

TenStats as_tuple(const StatsTensors& weight, const StatsTensors& bias) {
  return std::tuple_cat(as_tuple(weight), as_tuple(bias));
}

ThreeStats as_tuple(const ColumnTensors& p) { return {p.factor, p.batch_diag, p.diag}; }

SixStats as_tuple(const ColumnTensors& weight, const ColumnTensors& bias) {
  return std::tuple_cat(as_tuple(weight), as_tuple(bias));
}

}  // namespace backpack_cuda
