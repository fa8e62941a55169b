"""The slow, obvious float64 oracle: a loop over samples, each differentiated by plain torch autograd.

Nothing of the product is imported here. `G_n` is the gradient of sample n's contribution to the total loss.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FIELDS = ("grad", "batch_grad", "batch_l2", "sum_grad_squared", "sum_grad_centered_squared")


class Stats(NamedTuple):
    """The statistics of one parameter of shape P over N samples."""

    grad: Tensor  # [*P]      sum_n G_n
    batch_grad: Tensor  # [N, *P]   G_n
    batch_l2: Tensor  # [N]       |G_n|^2
    sum_grad_squared: Tensor  # [*P]      sum_n G_n^2
    sum_grad_centered_squared: Tensor  # [*P]      sum_n (G_n - mean_m G_m)^2

    @property
    def variance(self) -> Tensor:
        """[*P]: the biased (1/N) variance over the samples."""
        return self.sum_grad_centered_squared / len(self.batch_grad)


def from_per_sample(gradients: Tensor) -> Stats:
    """The statistics of explicit per-sample gradients [N, *P]."""
    mean = gradients.mean(0) if len(gradients) else gradients.sum(0)
    return Stats(
        gradients.sum(0),
        gradients,
        gradients.flatten(1).square().sum(1) if gradients.dim() > 1 else gradients.square(),
        gradients.square().sum(0),
        (gradients - mean).square().sum(0),
    )


def layer_statistics(
    function: Callable[[Tensor, Tensor, Tensor], Tensor],
    weight_shape: Sequence[int],
    num_bias: int,
    input: Tensor,  # [N, ...]
    grad_output: Tensor,  # [N, ...]
) -> tuple[Stats, Stats]:
    """Statistics of weight and bias of a layer output = function(input, weight, bias), linear in both."""
    weight = torch.zeros(tuple(weight_shape), dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_bias, dtype=torch.float64, requires_grad=True)
    collected: list[list[Tensor]] = [[weight.new_zeros(0, *weight.shape)], [bias.new_zeros(0, *bias.shape)]]
    for n in range(len(input)):
        x, g = input[n : n + 1].detach().cpu().double(), grad_output[n : n + 1].detach().cpu().double()
        gradients = torch.autograd.grad(function(x, weight, bias), (weight, bias), g, allow_unused=True)
        for rows, gradient, parameter in zip(collected, gradients, (weight, bias), strict=True):
            rows.append((torch.zeros_like(parameter) if gradient is None else gradient)[None].detach())
    weight_rows, bias_rows = collected
    return from_per_sample(torch.cat(weight_rows)), from_per_sample(torch.cat(bias_rows))


def per_sample_gradients(
    sample_loss: Callable[[int], Tensor], parameters: Sequence[Tensor], num_samples: int
) -> list[Tensor]:
    """Per parameter the gradients [N, *P] of `sample_loss(n)`, sample n's contribution to the total loss."""
    rows = [[torch.zeros(0, *p.shape, dtype=p.dtype)] for p in parameters]
    for n in range(num_samples):
        gradients = torch.autograd.grad(sample_loss(n), parameters, allow_unused=True)
        for row, gradient, parameter in zip(rows, gradients, parameters, strict=True):
            row.append((torch.zeros_like(parameter) if gradient is None else gradient)[None])
    return [torch.cat(row) for row in rows]


def model_statistics(
    model: torch.nn.Module,
    loss_function: torch.nn.Module,
    inputs: Tensor,  # [N, ...]
    targets: Tensor,  # [N, ...]
) -> dict[str, Stats]:
    """Statistics by parameter name of a stock float64 `model`; each contribution includes a mean's 1/N."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    assert all(p.dtype == torch.float64 for p in parameters)
    scale = {"mean": 1 / len(inputs), "sum": 1.0}[loss_function.reduction]

    def sample_loss(n: int) -> Tensor:
        return scale * loss_function(model(inputs[n : n + 1]), targets[n : n + 1])

    gradients = per_sample_gradients(sample_loss, parameters, len(inputs))
    return {name: from_per_sample(g) for name, g in zip(names, gradients, strict=True)}
