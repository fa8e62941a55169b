"""torch.nn.Linear."""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from backpack_cuda.capture import capturing
from backpack_cuda.per_sample import BiasUse, LinearColumns, LinearUse, Use
from backpack_cuda.rules.generic import generic_forward
from backpack_cuda.rules.layer import has_plain_parameters, run_layer


class LinearOperation:
    """input [N, *, I], weight [O, I], bias [O] -> [N, *, O]."""

    bias_dim = -1

    def forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(input, weight, bias)

    def to_save(self, input: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
        return input if needs[1] else None, weight if needs[0] else None

    def backward(
        self, grad_output: Tensor, input: Tensor | None, weight: Tensor | None, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        needs_input, needs_weight, needs_bias = needs
        rows = grad_output.flatten(0, -2) if needs_weight or needs_bias else None  # [N * T, O]
        return (
            grad_output @ weight if needs_input else None,
            rows.t() @ input.flatten(0, -2) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )

    def use(self, input: Tensor | None, grad_output: Tensor) -> Use:
        return BiasUse(grad_output) if input is None else LinearUse(input, grad_output)

    def use_of_squares(self, input: Tensor | None, grad_output: Tensor) -> Use:
        return self.use(None if input is None else input.to(grad_output.dtype).square(), grad_output)

    def columns(self, input: Tensor | None, columns: Tensor) -> LinearColumns:
        return LinearColumns(input, columns)

    def original_input(self, input: Tensor | None) -> Tensor | None:
        return input


_OPERATION = LinearOperation()


def linear_forward(module: nn.Linear, stock_forward: Callable, input: Tensor) -> Tensor:
    """`module`'s forward, prepared for quantities; an input without batch dimension is a batch of one."""
    if not capturing(input):
        return stock_forward(input)
    if not has_plain_parameters(module):
        return generic_forward(module, stock_forward, input)
    if input.dim() == 1:
        return run_layer(module, _OPERATION, input.unsqueeze(0)).squeeze(0)
    return run_layer(module, _OPERATION, input)
