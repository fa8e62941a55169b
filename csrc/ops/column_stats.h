// What the column operators do on every device: checks, results, operands without elements. A device supplies
// the computation as a template argument, a function of
//   linear         (input, columns, weight_want, bias_want, tf32, weight, bias)
//   convolutions   (conv, columns, weight_want, bias_want, tf32, weight, bias)
//   bias           (columns, channel_dim, want, bias)
// with something wanted and at least one column. It sees column 0 as an ordinary output gradient,
// `columns.first`, which is also the grad_output of `conv`, and column v columns.stride() * v elements
// behind.
#pragma once

#include <optional>

#include <torch/csrc/stable/ops.h>

#include "common/aten.h"
#include "common/check.h"
#include "common/stats_tensors.h"
#include "ops/convolution.h"

namespace backpack_cuda {

// V output gradients of every sample, checked as far as that goes without the layer.
struct Columns {
  const Tensor& all;    // [V, N, ...]
  const Tensor* signs;  // [V, N], any strides, in the statistics' type; null: 1
  Tensor first;         // [N, ...]; where V = 0, some memory of that shape

  Columns(const Tensor& columns, const std::optional<Tensor>& signs)
      : all(columns), signs(signs ? &*signs : nullptr) {
    check_floating(columns, "columns");
    STD_TORCH_CHECK(columns.dim() >= 3, "columns must have at least 3 dims [V, N, ...], got ",
                    shape_text(columns));
    if (signs) {
      STD_TORCH_CHECK(
          signs->dim() == 2 && signs->size(0) == columns.size(0) && signs->size(1) == columns.size(1),
          "signs must have one entry per column and sample of columns ", shape_text(columns), ", got ",
          shape_text(*signs));
      STD_TORCH_CHECK(
          signs->is_cpu() == columns.is_cpu() && signs->get_device_index() == columns.get_device_index(),
          "signs must be on the device of columns");
      STD_TORCH_CHECK(signs->scalar_type() == statistics_dtype(columns),
                      "signs must be float64 for float64 operands and float32 for others");
    }
    if (V() > 0) {
      first = torch::stable::select(aten::detach(columns), 0, 0);
    } else {
      Ints shape;
      for (int64_t d = 1; d < columns.dim(); ++d) shape.push_back(columns.size(d));
      first = torch::stable::new_empty(columns, shape);
    }
  }

  int64_t V() const { return all.size(0); }
  int64_t N() const { return all.size(1); }
  int64_t stride() const { return all.stride(0); }
};

inline void check_column_want(int64_t want, const char* name) {
  STD_TORCH_CHECK(want >= 0 && want <= kEveryColumnWant, name, " must be a set of the bits 1, 2, 4, got ",
                  want);
}

// input [N, *, I], columns [V, N, *, O]
template <auto kCompute>
SixStats linear_column_stats(const Tensor& input, const Tensor& columns, std::optional<Tensor> signs,
                             int64_t weight_want, int64_t bias_want, bool tf32) {
  check_column_want(weight_want, "weight_want");
  check_column_want(bias_want, "bias_want");
  const Columns all(columns, signs);
  check_linear_operands(input, all.first);
  const int64_t last = input.dim() - 1, I = input.size(last), O = all.first.size(last);
  ColumnTensors weight(input, {O, I}, all.V(), all.N(), weight_want),
      bias(columns, {O}, all.V(), all.N(), bias_want);
  if (!zero_if_empty(input, columns, weight, bias, weight_want) && (weight_want || bias_want)) {
    kCompute(input, all, weight_want, bias_want, tf32, weight, bias);
  }
  return as_tuple(weight, bias);
}

template <auto kCompute>
SixStats conv_columns(const Convolution& conv, const Columns& columns, int64_t weight_want, int64_t bias_want,
                      bool tf32) {
  check_column_want(weight_want, "weight_want");
  check_column_want(bias_want, "bias_want");
  ColumnTensors weight(conv.input, conv.weight_shape, columns.V(), columns.N(), weight_want),
      bias(columns.all, {conv.grad_output.size(1)}, columns.V(), columns.N(), bias_want);
  if (!zero_if_empty(conv.input, columns.all, weight, bias, weight_want) && (weight_want || bias_want)) {
    kCompute(conv, columns, weight_want, bias_want, tf32, weight, bias);
  }
  return as_tuple(weight, bias);
}

// input [N, C, *], columns [V, N, O, *out]
template <auto kCompute>
SixStats conv_column_stats(const Tensor& input, const Tensor& columns, std::optional<Tensor> signs,
                           Ints kernel_size, Ints stride, Ints padding, Ints dilation, int64_t groups,
                           int64_t weight_want, int64_t bias_want, bool tf32) {
  const Columns all(columns, signs);
  const Convolution conv(input, all.first, kernel_size, stride, padding, nullptr, dilation, groups);
  return conv_columns<kCompute>(conv, all, weight_want, bias_want, tf32);
}

template <auto kCompute>
SixStats conv_transpose_column_stats(const Tensor& input, const Tensor& columns, std::optional<Tensor> signs,
                                     Ints kernel_size, Ints stride, Ints padding, Ints output_padding,
                                     Ints dilation, int64_t groups, int64_t weight_want, int64_t bias_want,
                                     bool tf32) {
  const Columns all(columns, signs);
  const Convolution conv(input, all.first, kernel_size, stride, padding, &output_padding, dilation, groups);
  return conv_columns<kCompute>(conv, all, weight_want, bias_want, tf32);
}

// Per-sample sums of columns [V, N, *] over every dim but 0, 1 and channel_dim. kCompute's channel_dim is
// that of columns.first, counted from the front.
template <auto kCompute>
ThreeStats bias_column_stats(const Tensor& columns, std::optional<Tensor> signs, int64_t channel_dim,
                             int64_t want) {
  check_column_want(want, "want");
  const Columns all(columns, signs);
  if (channel_dim < 0) channel_dim += columns.dim();
  STD_TORCH_CHECK(channel_dim >= 2 && channel_dim < columns.dim(), "channel_dim must name a dim of columns ",
                  shape_text(columns), " other than the first two");
  ColumnTensors bias(columns, {columns.size(channel_dim)}, all.V(), all.N(), want);
  if (columns.numel() == 0) {
    bias.fill_zero();
  } else if (want) {
    kCompute(all, channel_dim - 1, want, bias);
  }
  return as_tuple(bias);
}

}  // namespace backpack_cuda
