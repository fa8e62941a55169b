"""A layer with a factorised per-sample gradient: from its module's forward to the autograd function."""

import torch
from torch import Tensor, nn

from backpack_cuda.autocast import autocast_enabled
from backpack_cuda.capture import LayerOperation, apply_layer
from backpack_cuda.passes import register


def has_plain_parameters(module: nn.Module) -> bool:
    """Whether weight and bias are the module's own parameters, not computed from others (parametrisations)."""
    own = module._parameters
    return (
        own.get("weight") is not None
        and (own.get("bias") is not None or getattr(module, "bias", None) is None)
        and "parametrizations" not in module._modules
    )


def run_layer(module: nn.Module, operation: LayerOperation, input: Tensor) -> Tensor:
    """The output of `module` on the batch `input`, prepared for quantities."""
    weight, bias = module.weight, module.bias
    used = [p for p in (weight, bias) if p is not None and p.requires_grad]
    if autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = (_autocast(t, dtype) for t in (input, weight, bias))
    output = apply_layer(input, weight, bias, module, operation)
    if used:
        register(output, used)
    return output


def _autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What autocast does to an operand of a matrix product."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
