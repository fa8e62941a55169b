"""What a quantity does at the modules of one class, as its author wrote it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from backpack_cuda import authored


class ModuleExtension:
    """Forms a quantity for the parameters of modules of one class; BackPACK's class of this name.

    A subclass has a method for each of its parameters, `weight(ext, module, g_inp, g_out, bpQuantities)`, whose result
    is saved under `ext.savefield` on the parameter (if it requires a gradient). While it runs, `module.input0`, ... and
    `module.output` are the tensors of the call that is differentiated.

    * ext: the quantity;
    * g_inp: gradients of the loss with respect to the positional inputs, None for those that require none;
    * g_out: gradients with respect to the outputs;
    * bpQuantities: what `backpropagate` of the following module returned, for quantities that are backpropagated;
      columns [V, N, *output] of the curvature's square root for this library's second-order quantities; else None.

    Args:
        params: names of the parameters.

    Raises:
        NotImplementedError: there is no method for one of them.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        authored.define(cls)

    def __init__(self, params: Sequence[str] | None = None):
        self._params = [] if params is None else list(params)
        for name in self._params:
            if not callable(getattr(self, name, None)):
                raise NotImplementedError(
                    f"{type(self).__name__}: expected a method {name}(self, ext, module, g_inp, g_out, bpQuantities) "
                    f"for the parameter {name!r} of params={self._params}"
                )

    def backpropagate(
        self, ext, module: nn.Module, g_inp: tuple[Tensor | None, ...], g_out: tuple[Tensor | None, ...], bpQuantities
    ) -> Any:
        """The quantity at the module's inputs from that at its output (None at a loss function).

        Only called for quantities with `expects_backpropagation_quantities()`, and if an input requires a gradient.
        This library's own quantities are backpropagated by autograd instead, and do not call it.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: expected a method backpropagate(self, ext, module, g_inp, g_out, bpQuantities), "
            f"because {type(ext).__name__} is backpropagated through {type(module).__name__}"
        )

    def check_hyperparameters_module_extension(
        self, ext, module: nn.Module, g_inp: tuple[Tensor | None, ...], g_out: tuple[Tensor | None, ...]
    ) -> None:
        """Called before anything else; may raise for modules that the extension does not support."""
