"""Which forward a module gets: the layers' own rules, and one for every other module with parameters."""

from collections.abc import Callable

from torch import nn

from backpack_cuda.rules.batch_norm import batch_norm_forward
from backpack_cuda.rules.conv import conv_forward, conv_transpose_forward
from backpack_cuda.rules.embedding import embedding_forward
from backpack_cuda.rules.generic import generic_forward
from backpack_cuda.rules.linear import linear_forward
from backpack_cuda.rules.loss import is_loss_module, loss_forward
from backpack_cuda.rules.recurrent import recurrent_forward

# torch's forward -> ours. Looked up by the function, so that a subclass with a forward of its own is not mistaken.
_FORWARDS = {
    nn.Linear.forward: linear_forward,
    nn.Conv1d.forward: conv_forward,
    nn.Conv2d.forward: conv_forward,
    nn.Conv3d.forward: conv_forward,
    nn.ConvTranspose1d.forward: conv_transpose_forward,
    nn.ConvTranspose2d.forward: conv_transpose_forward,
    nn.ConvTranspose3d.forward: conv_transpose_forward,
    nn.Embedding.forward: embedding_forward,
    nn.BatchNorm2d.forward: batch_norm_forward,  # one function for every dimension
    nn.RNN.forward: recurrent_forward,
    nn.LSTM.forward: recurrent_forward,
    nn.GRU.forward: recurrent_forward,
}


def rule_of_class(module_class: type[nn.Module]) -> Callable | None:
    """The rule for one of torch's own classes, or of ours; None for any other, and those without a rule."""
    if module_class.__module__.partition(".")[0] not in ("torch", "backpack_cuda"):
        return None
    forwards = [base.__dict__["forward"] for base in module_class.__mro__ if "forward" in base.__dict__]
    if issubclass(module_class, nn.modules.loss._Loss):
        return loss_forward
    return next((_FORWARDS[forward] for forward in forwards if forward in _FORWARDS), None)


def forward_for(module: nn.Module) -> Callable:
    """The forward for `module`: a function of (module, torch's forward, *args, **kwargs)."""
    if "forward" in module.__dict__:  # somebody's own forward on this one instance
        return generic_forward
    if is_loss_module(module):
        return loss_forward
    return _FORWARDS.get(type(module).forward, generic_forward)
