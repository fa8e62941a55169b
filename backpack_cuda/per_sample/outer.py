"""Per-sample gradients that are short sums of outer products: Linear layers and convolutions of every kind."""

from collections.abc import Sequence

import torch
from torch import Tensor

from backpack_cuda.ops import dispatch
from backpack_cuda.ops.geometry import ConvGeometry
from backpack_cuda.per_sample.base import Use
from backpack_cuda.per_sample.columns import ConvColumns, LinearColumns, positions_flat, sum_of_lengths
from backpack_cuda.stats import Stats, Want


class LinearUse(Use):
    """G_n = sum_t grad_output[n, t] input[n, t]^T of `weight`, sum_t grad_output[n, t] of `bias`."""

    def __init__(self, input: Tensor, grad_output: Tensor, lengths: Tensor | None = None):
        self.input = input  # [N, *, I]
        self.grad_output = grad_output  # [N, *, O]
        self.lengths = lengths  # as of LinearColumns
        self.batch_size = input.shape[0]
        self.dtype = input.dtype

    def stats(self, want: dict[str, int]) -> dict[str, Stats]:
        pair = dispatch.linear_stats(
            self.input, self.grad_output, want.get("weight", Want.NOTHING), want.get("bias", Want.NOTHING)
        )
        return dict(zip(("weight", "bias"), pair, strict=True))

    def select(self, samples: slice | Tensor) -> "LinearUse":
        lengths = None if self.lengths is None else self.lengths[samples]
        return LinearUse(self.input[samples], self.grad_output[samples], lengths)

    def joined(self, uses: Sequence["LinearUse"]) -> "LinearUse":
        inputs = [positions_flat(use.input, 1) for use in uses]  # [N, T, I] each
        grad_outputs = [positions_flat(use.grad_output, 1) for use in uses]  # [N, T, O] each
        return LinearUse(torch.cat(inputs, 1), torch.cat(grad_outputs, 1), sum_of_lengths(uses))

    def as_columns(self) -> LinearColumns:
        return LinearColumns(self.input, self.grad_output[None], self.lengths)


class BiasUse(Use):
    """A Linear layer of which only the bias is trained: G_n = sum_t grad_output[n, t]."""

    def __init__(self, grad_output: Tensor):
        self.grad_output = grad_output  # [N, *, O]
        self.batch_size = grad_output.shape[0]
        self.dtype = grad_output.dtype

    def stats(self, want: dict[str, int]) -> dict[str, Stats]:
        return {"bias": dispatch.bias_stats(self.grad_output, self.grad_output.dim() - 1, want["bias"])} if want else {}

    def select(self, samples: slice | Tensor) -> "BiasUse":
        return BiasUse(self.grad_output[samples])

    def as_columns(self) -> LinearColumns:
        return LinearColumns(None, self.grad_output[None])


class ConvUse(Use):
    """As LinearUse with the patches of the convolution's input (transposed: of its output gradient) as rows."""

    def __init__(self, geometry: ConvGeometry, input: Tensor, grad_output: Tensor):
        self.geometry = geometry
        self.input = input  # [N, C, *size]
        self.grad_output = grad_output  # [N, O, *output size]
        self.batch_size = input.shape[0]
        self.dtype = input.dtype

    def stats(self, want: dict[str, int]) -> dict[str, Stats]:
        pair = dispatch.conv_stats(
            self.geometry,
            self.input,
            self.grad_output,
            want.get("weight", Want.NOTHING),
            want.get("bias", Want.NOTHING),
        )
        return dict(zip(("weight", "bias"), pair, strict=True))

    def select(self, samples: slice | Tensor) -> "ConvUse":
        return ConvUse(self.geometry, self.input[samples], self.grad_output[samples])

    def as_columns(self) -> ConvColumns:
        return ConvColumns(self.geometry, self.input, self.grad_output[None])
