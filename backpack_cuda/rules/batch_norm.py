"""torch.nn.BatchNorm1d, BatchNorm2d and BatchNorm3d."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from backpack_cuda.capture import Observation, capturing, observe
from backpack_cuda.per_sample import LazyDenseUse


def batch_norm_forward(module: nn.Module, stock_forward: Callable, input: Tensor) -> Tensor:
    """The forward of a batch normalisation, prepared for quantities."""
    output = stock_forward(input)
    if not capturing():
        return output
    mixes = module.training or module.running_mean is None
    mean, var = (None, None) if mixes else (module.running_mean.clone(), module.running_var.clone())

    def form(observation: Observation, args: tuple, kwargs: dict, grad_outputs: tuple[Tensor, ...]) -> LazyDenseUse:
        (x,), (grad_output,) = args, grad_outputs  # [N, C, *]

        def batch_grads() -> dict[str, Tensor]:
            normalised = F.batch_norm(x, mean, var, training=mixes, eps=module.eps)
            summands = {"weight": grad_output * normalised, "bias": grad_output}  # [N, C, *]
            return {
                name: summands[name].flatten(2).sum(2) if x.dim() > 2 else summands[name]
                for name in observation.parameters
            }

        return LazyDenseUse(batch_grads, mixes_samples=mixes)

    parameters = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
    return observe(module, parameters, form, (input,), {}, output)
