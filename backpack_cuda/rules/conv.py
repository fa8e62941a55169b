"""torch.nn.Conv1d, Conv2d, Conv3d and their transposed forms."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack_cuda.capture import capturing
from backpack_cuda.ops.geometry import ConvGeometry
from backpack_cuda.per_sample import ConvColumns, ConvUse
from backpack_cuda.rules.generic import generic_forward
from backpack_cuda.rules.layer import has_plain_parameters, run_layer


class ConvOperation:
    """input [N, C, *], weight, bias [O] -> [N, O, *]; `pad` is what the layer adds to its input beforehand."""

    bias_dim = 1

    def __init__(self, geometry: ConvGeometry, pad: tuple[int, ...] | None = None):
        self.geometry = geometry
        self._pad = pad  # as torch.nn.functional.pad takes it: last dimension first, (before, after) each

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        g = self.geometry
        return torch.convolution(
            input, weight, bias, g.stride, g.padding, g.dilation, g.transposed, g.output_padding, g.groups
        )

    def to_save(self, input: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, Tensor]:
        return input, weight

    def backward(
        self, grad_output: Tensor, input: Tensor, weight: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        if not any(needs):
            return (None, None, None)
        g = self.geometry
        out_channels = grad_output.shape[1]
        return torch.ops.aten.convolution_backward(
            grad_output,
            input,
            weight,
            [out_channels],
            g.stride,
            g.padding,
            g.dilation,
            g.transposed,
            g.output_padding,
            g.groups,
            needs,
        )

    def use(self, input: Tensor, grad_output: Tensor) -> ConvUse:
        return ConvUse(self.geometry, input, grad_output)

    def use_of_squares(self, input: Tensor, grad_output: Tensor) -> ConvUse:
        return self.use(input.to(grad_output.dtype).square(), grad_output)

    def columns(self, input: Tensor, columns: Tensor) -> ConvColumns:
        return ConvColumns(self.geometry, input, columns)

    def original_input(self, input: Tensor) -> Tensor:
        if self._pad is not None:
            dims = range(input.dim() - 1, 1, -1)
            for dim, before, after in zip(dims, self._pad[::2], self._pad[1::2], strict=True):
                input = input.narrow(dim, before, input.shape[dim] - before - after)
        return input


# Layers that are alike share one operation; a layer's geometry may be changed between forward passes.
_operation = lru_cache(maxsize=None)(ConvOperation)


def _run(module: nn.Module, operation: ConvOperation, input: Tensor) -> Tensor:
    """The layer's output; an input without batch dimension is a batch of one."""
    if input.dim() == len(module.kernel_size) + 1:
        return run_layer(module, operation, input.unsqueeze(0)).squeeze(0)
    return run_layer(module, operation, input)


def conv_geometry(module: nn.Module) -> tuple[ConvGeometry, tuple[int, ...] | None]:
    """A convolution's geometry, and what is to be added to its input beforehand where that is not padded with zeros."""
    padding, pad = module.padding, None
    if isinstance(padding, str) or module.padding_mode != "zeros":
        padding = (0,) * len(module.kernel_size)
        pad = tuple(module._reversed_padding_repeated_twice)
    geometry = ConvGeometry(
        module.kernel_size, module.stride, padding, module.dilation, module.groups, False, (0,) * len(padding)
    )
    return geometry, pad


def padded(input: Tensor, module: nn.Module, pad: tuple[int, ...] | None) -> Tensor:
    """The input of a convolution with `pad` around it."""
    if pad is None or not any(pad):
        return input
    return F.pad(input, pad, "constant" if module.padding_mode == "zeros" else module.padding_mode)


def conv_transpose_geometry(module: nn.Module, input: Tensor, output_size: Sequence[int] | None) -> ConvGeometry:
    """A transposed convolution's geometry for an input; `output_size` as in its forward."""
    output_padding = module._output_padding(
        input,
        None if output_size is None else list(output_size),
        module.stride,
        module.padding,
        module.kernel_size,
        len(module.kernel_size),
        module.dilation,
    )
    return ConvGeometry(
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        module.groups,
        True,
        tuple(output_padding),
    )


def conv_forward(module: nn.Module, stock_forward: Callable, input: Tensor) -> Tensor:
    """The forward of a convolution, prepared for quantities."""
    if not capturing(input):
        return stock_forward(input)
    if not has_plain_parameters(module):
        return generic_forward(module, stock_forward, input)
    geometry, pad = conv_geometry(module)
    input = padded(input, module, pad)
    return _run(module, _operation(geometry, pad), input)


def conv_transpose_forward(
    module: nn.Module, stock_forward: Callable, input: Tensor, output_size: Sequence[int] | None = None
) -> Tensor:
    """The forward of a transposed convolution, prepared for quantities."""
    if not capturing(input):
        return stock_forward(input, output_size)
    if not has_plain_parameters(module):
        return generic_forward(module, stock_forward, input, output_size)
    geometry = conv_transpose_geometry(module, input, output_size)
    return _run(module, _operation(geometry), input)
