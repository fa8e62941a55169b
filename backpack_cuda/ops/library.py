"""The ordinary weight gradient alone, as PyTorch's own libraries compute it: cuBLAS and cuDNN on a GPU.

In the operands' type, and under PyTorch's own switches: for float32 matrix products
`torch.set_float32_matmul_precision`, for convolutions on a GPU `torch.backends.cudnn.allow_tf32`.
"""

from math import prod

import torch
from torch import Tensor

from backpack_cuda.ops.geometry import ConvGeometry


def linear_weight_grad(input: Tensor, grad_output: Tensor) -> Tensor:
    """[O, I] from input [N, *, I] and grad_output [N, *, O]."""
    rows = prod(input.shape[:-1])
    return grad_output.reshape(rows, grad_output.shape[-1]).T @ input.reshape(rows, input.shape[-1])


def conv_weight_grad(geometry: ConvGeometry, input: Tensor, grad_output: Tensor) -> Tensor:
    """[*weight] of a (transposed) convolution from input [N, C, *] and grad_output [N, O, *]."""
    shape = geometry.weight_shape(input.shape[1], grad_output.shape[1])
    if input.numel() == 0 or grad_output.numel() == 0:
        return input.new_zeros(shape)
    _, grad, _ = torch.ops.aten.convolution_backward(
        grad_output,
        input,
        input.new_empty(1).expand(shape),  # only its shape counts
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.transposed,
        geometry.output_padding or (0,) * len(shape[2:]),
        geometry.groups,
        (False, True, False),
    )
    return grad.contiguous()  # cuDNN's has the layout of its operands
