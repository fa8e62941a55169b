"""The geometry of a convolution or transposed convolution, as the operators take it."""

from math import prod
from typing import NamedTuple


class ConvGeometry(NamedTuple):
    """Sizes of a 1-, 2- or 3-dimensional (transposed) convolution, one number per spatial dimension."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def window(self) -> tuple[int, ...]:
        """Extent of a dilated kernel, dilation * (kernel_size - 1) + 1."""
        return tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))

    def output_size(self, input_size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial size of the layer's output for an input of spatial size `input_size`."""
        sizes = zip(input_size, self.window(), self.stride, self.padding, strict=True)
        if self.transposed:
            return tuple(
                (i - 1) * s - 2 * p + w + e for (i, w, s, p), e in zip(sizes, self.output_padding, strict=True)
            )
        return tuple((i + 2 * p - w) // s + 1 for i, w, s, p in sizes)

    def weight_shape(self, in_channels: int, out_channels: int) -> tuple[int, ...]:
        """[O, C/groups, *kernel] of a convolution, [C, O/groups, *kernel] of a transposed one."""
        rows, columns = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        return (rows, columns // self.groups, *self.kernel_size)

    def factor_shape(self, in_channels: int, homogeneous: bool) -> tuple[int, ...]:
        """Shape of the input's Kronecker factor: [D', D'], or one for each of several groups, [groups, D', D']."""
        size = in_channels // self.groups * prod(self.kernel_size) + homogeneous
        return (size, size) if self.groups == 1 else (self.groups, size, size)
