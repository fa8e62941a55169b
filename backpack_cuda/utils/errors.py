"""What is wrong with a module for per-sample quantities."""

import warnings

from torch import nn


def batch_norm_raise_error_if_train(module: nn.Module, raise_error: bool = True) -> None:
    """Complains about a batch normalisation whose samples depend on each other.

    Args:
        module: a torch.nn.BatchNorm1d, BatchNorm2d or BatchNorm3d.
        raise_error: raise an error; False: give a warning.

    Raises:
        NotImplementedError: the module is in train mode.
    """
    if module.training:
        message = (
            f"{type(module).__name__} in train mode mixes the samples of its batch, so that quantities of single "
            "samples have no meaning; call eval() on it"
        )
        if raise_error:
            raise NotImplementedError(message)
        warnings.warn(message, stacklevel=2)
