"""From checked operands to statistics: the kernel where there is one, else the composite.

What the layers call; no argument is checked here.
"""

import torch
from torch import Tensor

from backpack_cuda import _lib
from backpack_cuda.autocast import without_autocast
from backpack_cuda.ops import composite, library
from backpack_cuda.ops.geometry import ConvGeometry
from backpack_cuda.stats import ColumnStats, Stats, Want, statistics_dtype


def _composite_needed(*operands: Tensor | None) -> bool:
    """Kernels return plain numbers: where a graph or a transform must see the computation, the composite runs."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)


def _use_kernel(operator: str, *operands: Tensor | None) -> bool:
    if _composite_needed(*operands):
        return False
    if operands[0].is_cuda and operands[0].dtype == torch.float64 and operator != "outer_norm":
        return False  # tensor cores take float32, bfloat16 and float16
    return _lib.has_kernel(operator, operands[0].device.type)


def _tf32(operand: Tensor) -> bool:
    """Whether float32 operands may be rounded to TF32, by the switch that PyTorch's own matrix products obey."""
    # Unlike torch.get_float32_matmul_precision() this also answers when the switch was set by its newer name.
    return operand.is_cuda and operand.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _use_library(weight_want: int, *operands: Tensor) -> bool:
    """On a GPU no statistic rides along with a gradient alone, and cuBLAS and cuDNN are hard to beat at it."""
    return weight_want == Want.GRAD and operands[0].is_cuda and not _composite_needed(*operands)


def _pair(results: tuple[Tensor, ...], weight_want: int, bias_want: int) -> tuple[Stats, Stats]:
    return Stats.of(results[:5], weight_want), Stats.of(results[5:], bias_want)


def linear_stats(input: Tensor, grad_output: Tensor, weight_want: int, bias_want: int) -> tuple[Stats, Stats]:
    """Statistics of a Linear layer's weight and bias; input [N, *, I], grad_output [N, *, O]."""
    if _use_library(weight_want, input, grad_output):
        with without_autocast(input.device.type):
            grad = library.linear_weight_grad(input, grad_output)
        return Stats(grad=grad), bias_stats(grad_output, -1, bias_want)
    if _use_kernel("linear_grad_stats", input, grad_output):
        results = torch.ops.backpack_cuda.linear_grad_stats(input, grad_output, weight_want, bias_want, _tf32(input))
        return _pair(results, weight_want, bias_want)
    if weight_want == Want.BATCH_L2 and input.dim() == 2 and _use_kernel("outer_norm", input, grad_output):
        norms = torch.ops.backpack_cuda.outer_norm(input, grad_output)
        return Stats(batch_l2=norms), bias_stats(grad_output, -1, bias_want)
    with without_autocast(input.device.type):
        return composite.linear(input, grad_output, weight_want, bias_want)


def _conv_operator(geometry: ConvGeometry, quantity: str) -> tuple[str, tuple]:
    """The operator's name, and its arguments that describe the geometry."""
    kernel_size, stride, padding, dilation, groups, transposed, output_padding = geometry
    if transposed:
        return f"conv_transpose_{quantity}", (kernel_size, stride, padding, output_padding, dilation, groups)
    return f"conv_{quantity}", (kernel_size, stride, padding, dilation, groups)


def conv_stats(
    geometry: ConvGeometry, input: Tensor, grad_output: Tensor, weight_want: int, bias_want: Want
) -> tuple[Stats, Stats]:
    """Statistics of a (transposed) convolution's weight and bias; input [N, C, *], grad_output [N, O, *]."""
    if _use_library(weight_want, input, grad_output):
        grad = library.conv_weight_grad(geometry, input, grad_output)
        return Stats(grad=grad), bias_stats(grad_output, 1, bias_want)
    name, sizes = _conv_operator(geometry, "grad_stats")
    if not _use_kernel(name, input, grad_output):
        with without_autocast(input.device.type):
            return composite.conv(geometry, input, grad_output, weight_want, bias_want)
    operator = getattr(torch.ops.backpack_cuda, name)
    results = operator(input, grad_output, *sizes, weight_want, bias_want, _tf32(input))
    return _pair(results, weight_want, bias_want)


def bias_stats(grad_output: Tensor, channel_dim: int, want: int) -> Stats:
    """Statistics of an additive bias along `channel_dim` of grad_output [N, ...]."""
    if want and _use_kernel("bias_grad_stats", grad_output):
        return Stats.of(torch.ops.backpack_cuda.bias_grad_stats(grad_output, channel_dim, want), want)
    return composite.bias(grad_output, channel_dim, want)


def outer_norm(input: Tensor, grad_output: Tensor) -> Tensor:
    """|input_n|^2 |grad_output_n|^2 of input [N, I] and grad_output [N, O]: [N]."""
    if _use_kernel("outer_norm", input, grad_output):
        return torch.ops.backpack_cuda.outer_norm(input, grad_output)
    return composite.outer_norm(input, grad_output)


def linear_weighted_grad(input: Tensor, grad_output: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights[n] G_n of a Linear layer's weight; input [N, *, I], grad_output [N, *, O], weights [N]."""
    if _use_kernel("linear_weighted_grad", input, grad_output, weights):
        operator = torch.ops.backpack_cuda.linear_weighted_grad
        return operator(input, grad_output, weights.contiguous(), _tf32(input))
    with without_autocast(input.device.type):
        return composite.linear_weighted_grad(input, grad_output, weights)


def conv_weighted_grad(geometry: ConvGeometry, input: Tensor, grad_output: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights[n] G_n of a (transposed) convolution's weight; input [N, C, *], grad_output [N, O, *]."""
    name, sizes = _conv_operator(geometry, "weighted_grad")
    if _use_kernel(name, input, grad_output, weights):
        operator = getattr(torch.ops.backpack_cuda, name)
        return operator(input, grad_output, weights.contiguous(), *sizes, _tf32(input))
    with without_autocast(input.device.type):
        return composite.conv_weighted_grad(geometry, input, grad_output, weights)


def empty_result(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor in the type of statistics.

    On the CPU in memory that earlier results have left: page faults of fresh memory can cost more than the result.
    """
    if like.is_cpu and _use_kernel("_empty_result", like.detach()):
        return torch.ops.backpack_cuda._empty_result(like, shape)
    return like.new_empty(shape, dtype=statistics_dtype(like.dtype))


def _running_average(shape: tuple[int, ...], x: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where to put a Kronecker factor: the result, and a contiguous tensor for the kernel to write."""
    if out is None:
        out = empty_result(x, shape)
    else:
        torch.autograd.graph.increment_version(out)  # autograd does not see the kernel write
    return out, out.contiguous()


def _merged(factor: Tensor, scale: float, out: Tensor | None, decay: float) -> Tensor:
    """decay * out + scale * factor, in out if there is one."""
    factor = factor if scale == 1 else factor * scale
    if out is None:
        return factor
    return out.copy_(factor if decay == 0 else composite.mirrored(out * decay + factor))


def linear_kron_factor(
    x: Tensor, scale: float, out: Tensor | None = None, decay: float = 0.0, homogeneous: bool = False
) -> Tensor:
    """decay * out + scale * sum over the rows x_r of x [*, D] of x_r x_r^T, [D', D']; D' = D + 1 when homogeneous.

    Written to `out` if there is one, which is not read where decay is 0; not with operands that require grad.
    """
    if not _use_kernel("linear_kron_factor", x):
        with without_autocast(x.device.type):
            return _merged(composite.linear_kron_factor(x, homogeneous), scale, out, decay)
    size = x.shape[-1] + homogeneous
    out, target = _running_average((size, size), x, out)
    torch.ops.backpack_cuda.linear_kron_factor(target, x, scale, decay, homogeneous, _tf32(x))
    return out if target is out else out.copy_(target)


def conv_kron_factor(
    x: Tensor,
    geometry: ConvGeometry,
    positions: tuple[int, ...],
    scale: float,
    out: Tensor | None = None,
    decay: float = 0.0,
    homogeneous: bool = False,
) -> Tensor:
    """The same for the patches of x [N, C, *] at `positions`, the spatial size of the layer's output.

    [D', D'] with D = C / groups * prod(kernel_size), or with several groups [groups, D', D'].
    """
    if geometry.transposed:
        x, geometry = composite.conv_of_transposed(x, geometry)
    shape = geometry.factor_shape(x.shape[1], homogeneous)
    if not _use_kernel("conv_kron_factor", x):
        with without_autocast(x.device.type):
            factor = composite.conv_kron_factor(x, geometry, positions, homogeneous).reshape(shape)
            return _merged(factor, scale, out, decay)
    out, target = _running_average(shape, x, out)
    kernel_size, stride, padding, dilation, groups, *_ = geometry
    torch.ops.backpack_cuda.conv_kron_factor(
        target.view(groups, *shape[-2:]),
        *(x, kernel_size, stride, padding, dilation, positions, groups, scale, decay, homogeneous, _tf32(x)),
    )
    return out if target is out else out.copy_(target)


def _column_pair(results: tuple[Tensor, ...], weight_want: int, bias_want: int) -> tuple[ColumnStats, ColumnStats]:
    return ColumnStats.of(results[:3], weight_want), ColumnStats.of(results[3:], bias_want)


def linear_column_stats(
    input: Tensor, columns: Tensor, signs: Tensor | None, weight_want: int, bias_want: int
) -> tuple[ColumnStats, ColumnStats]:
    """Column statistics of a Linear layer's weight and bias; input [N, *, I], columns [V, N, *, O], signs [V, N]."""
    if _use_kernel("linear_column_stats", input, columns, signs):
        operator = torch.ops.backpack_cuda.linear_column_stats
        return _column_pair(
            operator(input, columns, signs, weight_want, bias_want, _tf32(input)), weight_want, bias_want
        )
    with without_autocast(input.device.type):
        return composite.linear_columns(input, columns, signs, weight_want, bias_want)


def conv_column_stats(
    geometry: ConvGeometry, input: Tensor, columns: Tensor, signs: Tensor | None, weight_want: int, bias_want: int
) -> tuple[ColumnStats, ColumnStats]:
    """Column statistics of a (transposed) convolution's weight and bias; input [N, C, *], columns [V, N, O, *]."""
    name, sizes = _conv_operator(geometry, "column_stats")
    if not _use_kernel(name, input, columns, signs):
        with without_autocast(input.device.type):
            return composite.conv_columns(geometry, input, columns, signs, weight_want, bias_want)
    operator = getattr(torch.ops.backpack_cuda, name)
    results = operator(input, columns, signs, *sizes, weight_want, bias_want, _tf32(input))
    return _column_pair(results, weight_want, bias_want)


def bias_column_stats(columns: Tensor, channel_dim: int, signs: Tensor | None, want: int) -> ColumnStats:
    """Column statistics of an additive bias along `channel_dim` of columns [V, N, ...]; signs [V, N]."""
    if want and _use_kernel("bias_column_stats", columns, signs):
        return ColumnStats.of(torch.ops.backpack_cuda.bias_column_stats(columns, signs, channel_dim, want), want)
    return composite.bias_columns(columns, channel_dim, signs, want)
