"""What every quantity has in common."""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from backpack_cuda import authored
from backpack_cuda.extensions.module_extension import ModuleExtension
from backpack_cuda.extensions.saved_quantities import SavedQuantities

FAIL_ERROR = "ERROR"
FAIL_WARN = "WARNING"
FAIL_SILENT = "SILENT"
_FAIL_MODES = (FAIL_ERROR, FAIL_WARN, FAIL_SILENT)


def _sample(value) -> int:
    """The index of a sample. Not a bool, which is an entry of a mask."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        raise TypeError(f"expected an index, got {value!r}")
    return index(value)


class InvalidFailMode(ValueError, AssertionError):
    """A fail mode that does not exist. An AssertionError in BackPACK, a ValueError everywhere else here: it is both."""


class BackpropExtension:
    """A quantity that backward passes inside `with backpack(...)` form and save on the parameters.

    Args:
        savefield: name of the attribute of a parameter that holds the result.
        module_exts: what forms the quantity, by the modules' exact class; more may follow by `set_module_extension`.
        fail_mode: what happens at a module, or a parameter, that the quantity cannot be formed for: FAIL_ERROR
            ("ERROR"): NotImplementedError; FAIL_WARN ("WARNING"): a UserWarning, and no attribute on its parameters;
            FAIL_SILENT ("SILENT"): no attribute.
        subsampling: indices of the samples to form the quantity for (may repeat); None for all.

    Raises:
        InvalidFailMode: another fail mode; a ValueError that is an AssertionError too.
        TypeError: a key of `module_exts` is no class of modules, or a value no ModuleExtension.
        ValueError: `subsampling` holds something other than non-negative integers.
    """

    own = False  # whether this library forms it at all modules, where its module extensions do not

    def __init__(
        self,
        savefield: str,
        module_exts: dict[type[nn.Module], ModuleExtension] | None = None,
        fail_mode: str = FAIL_ERROR,
        subsampling: Sequence[int] | None = None,
    ):
        if fail_mode not in _FAIL_MODES:
            raise InvalidFailMode(f"fail_mode: expected one of {', '.join(_FAIL_MODES)}, got {fail_mode!r}")
        if subsampling is not None:
            try:
                subsampling = [_sample(sample) for sample in subsampling]
            except TypeError as error:
                raise ValueError(f"subsampling: expected indices of samples, got {subsampling!r}") from error
            if min(subsampling, default=0) < 0:
                raise ValueError(f"subsampling: expected indices of at least 0, got {subsampling!r}")
        self.savefield = savefield
        self.saved_quantities = SavedQuantities()
        self._fail_mode = fail_mode
        self._subsampling = subsampling
        self._module_extensions: dict[type[nn.Module], ModuleExtension] = {}
        for module_class, extension in ({} if module_exts is None else module_exts).items():
            self.set_module_extension(module_class, extension)

    def set_module_extension(
        self, module: type[nn.Module], extension: ModuleExtension, overwrite: bool = False
    ) -> None:
        """Lets `extension` form the quantity for modules of exactly the class `module`.

        Register it before the forward pass: only then the modules' inputs and outputs are kept for it.

        Args:
            module: the class.
            extension: what forms the quantity there.
            overwrite: replace the extension that the class has already.

        Raises:
            ValueError: the class has an extension already, or this library's own rule.
            NotImplementedError: a quantity of this library that is formed in another way at all modules.
            TypeError: `module` is no class of modules, or `extension` no ModuleExtension.
        """
        if not (isinstance(module, type) and issubclass(module, nn.Module)):
            raise TypeError(f"module: expected a subclass of torch.nn.Module, got {module!r}")
        if not isinstance(extension, ModuleExtension):
            raise TypeError(f"extension: expected an instance of ModuleExtension, got {extension!r}")
        self.check_takes_module_extensions()
        known = self._module_extensions.get(module)
        if known is None and self.own:
            from backpack_cuda.rules import rule_of_class  # here, because the rules need the quantities

            known = rule_of_class(module)
        if known is not None and not overwrite:
            raise ValueError(
                f"module: {self} has {known!r} for {module.__name__} already; replace it by overwrite=True"
            )
        self._module_extensions[module] = extension
        authored.register(module, extension)

    def check_takes_module_extensions(self) -> None:
        """Raises NotImplementedError where a module extension could not form this quantity."""

    @property
    def has_module_extensions(self) -> bool:
        """Whether any class of modules has an extension."""
        return bool(self._module_extensions)

    def module_extension(self, module: nn.Module) -> ModuleExtension | None:
        """The extension for a module's exact class (for this library's layers, also that of torch's), or None."""
        if not self._module_extensions:
            return None
        return self._module_extensions.get(authored.class_for(module, self._module_extensions))

    def expects_backpropagation_quantities(self) -> bool:
        """Whether the module extensions hand quantities back to each other, besides the gradient."""
        return False

    def accumulate_backpropagated_quantities(self, existing: Any, other: Any) -> Any:
        """The quantity of a tensor that several modules used, from those that two of them hand back."""
        raise NotImplementedError(
            f"{self}: a tensor is used by several modules, and accumulate_backpropagated_quantities(existing, other), "
            "which brings together what they hand back, is not implemented"
        )

    def get_subsampling(self) -> list[int] | None:
        """The samples that the quantity is formed for; None for all."""
        return self._subsampling

    def __repr__(self) -> str:
        arguments = "" if self._subsampling is None else f"subsampling={self._subsampling}"
        return f"{type(self).__name__}({arguments})"


class FirstOrderBackpropExtension(BackpropExtension):
    """A BackpropExtension that warns at modules with parameters that it has no extension for, rather than fail."""

    def __init__(
        self,
        savefield: str,
        module_exts: dict[type[nn.Module], ModuleExtension] | None = None,
        fail_mode: str = FAIL_WARN,
        subsampling: Sequence[int] | None = None,
    ):
        super().__init__(savefield, module_exts, fail_mode, subsampling)


class SecondOrderBackpropExtension(BackpropExtension):
    """A BackpropExtension with backpropagated quantities; see `ModuleExtension.backpropagate`."""

    def expects_backpropagation_quantities(self) -> bool:
        return True
