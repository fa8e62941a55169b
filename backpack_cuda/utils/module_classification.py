"""What kind of module one is."""

from torch import nn
from torch.fx import GraphModule

from backpack_cuda.custom_module.branching import Parallel, _Branch
from backpack_cuda.custom_module.reduce_tuple import ReduceTuple


def is_loss(module: nn.Module) -> bool:
    """Whether `module` is one of torch's loss functions."""
    return isinstance(module, nn.modules.loss._Loss)


def is_nll(module: nn.Module) -> bool:
    """Whether `module` is a loss that BackPACK knows as a negative log-likelihood: MSE, CE or BCE with logits."""
    return isinstance(module, nn.MSELoss | nn.CrossEntropyLoss | nn.BCEWithLogitsLoss)


def is_no_op(module: nn.Module) -> bool:
    """Whether `module` only calls other modules, or hands on a part of its input."""
    return isinstance(module, nn.Sequential | _Branch | Parallel | ReduceTuple | GraphModule)
