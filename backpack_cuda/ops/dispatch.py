"""From checked operands to statistics: the kernel where there is one, else the composite.

What the layers call; no argument is checked here.
"""

import torch
from torch import Tensor

from backpack_cuda import _lib
from backpack_cuda.autocast import without_autocast
from backpack_cuda.ops import composite
from backpack_cuda.ops.geometry import ConvGeometry
from backpack_cuda.stats import Stats, Want


def _use_kernel(operator: str, *operands: Tensor) -> bool:
    """Kernels return plain numbers: where a graph or a transform must see the computation, the composite runs."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
        return False
    return _lib.has_kernel(operator, operands[0].device.type)


def _pair(results: tuple[Tensor, ...], weight_want: int, bias_want: int) -> tuple[Stats, Stats]:
    return Stats.of(results[:5], weight_want), Stats.of(results[5:], bias_want)


def linear_stats(input: Tensor, grad_output: Tensor, weight_want: int, bias_want: int) -> tuple[Stats, Stats]:
    """Statistics of a Linear layer's weight and bias; input [N, *, I], grad_output [N, *, O]."""
    if _use_kernel("linear_grad_stats", input, grad_output):
        results = torch.ops.backpack_cuda.linear_grad_stats(input, grad_output, weight_want, bias_want)
        return _pair(results, weight_want, bias_want)
    if weight_want == Want.BATCH_L2 and input.dim() == 2 and _use_kernel("outer_norm", input, grad_output):
        norms = torch.ops.backpack_cuda.outer_norm(input, grad_output)
        return Stats(batch_l2=norms), composite.bias(grad_output, -1, bias_want)
    with without_autocast(input.device.type):
        return composite.linear(input, grad_output, weight_want, bias_want)


def conv_stats(
    geometry: ConvGeometry, input: Tensor, grad_output: Tensor, weight_want: int, bias_want: Want
) -> tuple[Stats, Stats]:
    """Statistics of a (transposed) convolution's weight and bias; input [N, C, *], grad_output [N, O, *]."""
    kernel_size, stride, padding, dilation, groups, transposed, output_padding = geometry
    name = "conv_transpose_grad_stats" if transposed else "conv_grad_stats"
    if not _use_kernel(name, input, grad_output):
        with without_autocast(input.device.type):
            return composite.conv(geometry, input, grad_output, weight_want, bias_want)
    sizes = (kernel_size, stride, padding, output_padding) if transposed else (kernel_size, stride, padding)
    results = getattr(torch.ops.backpack_cuda, name)(
        input, grad_output, *sizes, dilation, groups, weight_want, bias_want
    )
    return _pair(results, weight_want, bias_want)


def bias_stats(grad_output: Tensor, channel_dim: int, want: int) -> Stats:
    """Statistics of an additive bias along `channel_dim` of grad_output [N, ...]."""
    if _use_kernel("bias_grad_stats", grad_output):
        return Stats.of(torch.ops.backpack_cuda.bias_grad_stats(grad_output, channel_dim, want), want)
    return composite.bias(grad_output, channel_dim, want)


def outer_norm(input: Tensor, grad_output: Tensor) -> Tensor:
    """|input_n|^2 |grad_output_n|^2 of input [N, I] and grad_output [N, O]: [N]."""
    if _use_kernel("outer_norm", input, grad_output):
        return torch.ops.backpack_cuda.outer_norm(input, grad_output)
    return composite.outer_norm(input, grad_output)
