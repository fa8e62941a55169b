"""Shapes and types of every operator's results, for tracing (fake kernels)."""

import torch
from torch import Tensor

from backpack_cuda import _lib
from backpack_cuda.ops.geometry import ConvGeometry
from backpack_cuda.stats import ColumnWant, Want, statistics_dtype


def _results(like: Tensor, batch_size: int, shape: tuple[int, ...], want: int) -> tuple[Tensor, ...]:
    """The five results of a parameter of shape `shape`; an unwanted one is empty."""
    dtype = statistics_dtype(like.dtype)
    return (
        like.new_empty(shape if want & Want.GRAD else (0,)),
        like.new_empty((batch_size, *shape) if want & Want.BATCH_GRAD else (0,)),
        like.new_empty((batch_size,) if want & Want.BATCH_L2 else (0,), dtype=dtype),
        like.new_empty(shape if want & Want.SUM_GRAD_SQUARED else (0,), dtype=dtype),
        like.new_empty(shape if want & Want.SUM_GRAD_CENTERED_SQUARED else (0,), dtype=dtype),
    )


def _linear(input, grad_output, weight_want, bias_want, tf32=False):
    n, i, o = input.shape[0], input.shape[-1], grad_output.shape[-1]
    return (*_results(input, n, (o, i), weight_want), *_results(grad_output, n, (o,), bias_want))


def _conv_results(geometry, input, grad_output, weight_want, bias_want):
    n, c, o = input.shape[0], input.shape[1], grad_output.shape[1]
    weight = _results(input, n, geometry.weight_shape(c, o), weight_want)
    return (*weight, *_results(grad_output, n, (o,), bias_want))


def _conv(input, grad_output, kernel_size, stride, padding, dilation, groups, weight_want, bias_want, tf32=False):
    geometry = ConvGeometry(kernel_size, stride, padding, dilation, groups)
    return _conv_results(geometry, input, grad_output, weight_want, bias_want)


def _conv_transpose(
    input,
    grad_output,
    kernel_size,
    stride,
    padding,
    output_padding,
    dilation,
    groups,
    weight_want,
    bias_want,
    tf32=False,
):
    geometry = ConvGeometry(kernel_size, stride, padding, dilation, groups, True, output_padding)
    return _conv_results(geometry, input, grad_output, weight_want, bias_want)


def _bias(grad_output, channel_dim, want):
    return _results(grad_output, grad_output.shape[0], (grad_output.shape[channel_dim],), want)


def _outer_norm(input, grad_output):
    return input.new_empty(input.shape[0], dtype=statistics_dtype(input.dtype))


def _linear_weighted(input, grad_output, sample_weights, tf32=False):
    return input.new_empty(grad_output.shape[-1], input.shape[-1])


def _conv_weighted(input, grad_output, sample_weights, kernel_size, stride, padding, dilation, groups, tf32=False):
    geometry = ConvGeometry(kernel_size, stride, padding, dilation, groups)
    return input.new_empty(geometry.weight_shape(input.shape[1], grad_output.shape[1]))


def _conv_transpose_weighted(
    input, grad_output, sample_weights, kernel_size, stride, padding, output_padding, dilation, groups, tf32=False
):
    geometry = ConvGeometry(kernel_size, stride, padding, dilation, groups, True, output_padding)
    return input.new_empty(geometry.weight_shape(input.shape[1], grad_output.shape[1]))


def _no_result(*arguments, tf32=False):
    """Of operators that write to an argument."""


def _column_results(like: Tensor, columns: Tensor, shape: tuple[int, ...], want: int) -> tuple[Tensor, ...]:
    """The three results of a parameter of shape `shape`; an unwanted one is empty."""
    dtype = statistics_dtype(like.dtype)
    return (
        like.new_empty((*columns.shape[:2], *shape) if want & ColumnWant.FACTOR else (0,)),
        like.new_empty((columns.shape[1], *shape) if want & ColumnWant.BATCH_DIAG else (0,), dtype=dtype),
        like.new_empty(shape if want & ColumnWant.DIAG else (0,), dtype=dtype),
    )


def _linear_columns(input, columns, signs, weight_want, bias_want, tf32=False):
    i, o = input.shape[-1], columns.shape[-1]
    return (
        *_column_results(input, columns, (o, i), weight_want),
        *_column_results(columns, columns, (o,), bias_want),
    )


def _conv_column_results(geometry, input, columns, weight_want, bias_want):
    c, o = input.shape[1], columns.shape[2]
    weight = _column_results(input, columns, geometry.weight_shape(c, o), weight_want)
    return (*weight, *_column_results(columns, columns, (o,), bias_want))


def _conv_columns(
    input, columns, signs, kernel_size, stride, padding, dilation, groups, weight_want, bias_want, tf32=False
):
    geometry = ConvGeometry(kernel_size, stride, padding, dilation, groups)
    return _conv_column_results(geometry, input, columns, weight_want, bias_want)


def _conv_transpose_columns(
    input,
    columns,
    signs,
    kernel_size,
    stride,
    padding,
    output_padding,
    dilation,
    groups,
    weight_want,
    bias_want,
    tf32=False,
):
    geometry = ConvGeometry(kernel_size, stride, padding, dilation, groups, True, output_padding)
    return _conv_column_results(geometry, input, columns, weight_want, bias_want)


def _bias_columns(columns, signs, channel_dim, want):
    return _column_results(columns, columns, (columns.shape[channel_dim],), want)


def _empty_result(like, size):
    return like.new_empty(size, dtype=statistics_dtype(like.dtype))


FAKE_KERNELS = {
    "_empty_result": _empty_result,
    "linear_grad_stats": _linear,
    "conv_grad_stats": _conv,
    "conv_transpose_grad_stats": _conv_transpose,
    "bias_grad_stats": _bias,
    "outer_norm": _outer_norm,
    "linear_weighted_grad": _linear_weighted,
    "conv_weighted_grad": _conv_weighted,
    "conv_transpose_weighted_grad": _conv_transpose_weighted,
    "linear_kron_factor": _no_result,
    "conv_kron_factor": _no_result,
    "linear_column_stats": _linear_columns,
    "conv_column_stats": _conv_columns,
    "conv_transpose_column_stats": _conv_transpose_columns,
    "bias_column_stats": _bias_columns,
}

if _lib.PROBLEM is None:
    for _name, _fake in FAKE_KERNELS.items():
        if torch._C._dispatch_has_kernel(f"backpack_cuda::{_name}"):  # a library of older sources may lack it
            torch.library.register_fake(f"backpack_cuda::{_name}", _fake)
