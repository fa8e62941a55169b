"""Layers that others made known by a function: their module's arguments and output gradient to per-sample gradients."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from backpack_cuda.context import authoring

PerSampleGradient = Callable[..., Mapping[str, Tensor]]


class _Registration:
    def __init__(self, function: PerSampleGradient, check: bool):
        self.function = function
        self.check = check
        self.checked: set[str] = set()  # names of the parameters whose sum was compared with a gradient that is not 0


_REGISTERED: dict[type[nn.Module], _Registration] = {}


def register_layer(
    module_class: type[nn.Module], per_sample_gradient: PerSampleGradient, *, check: bool = True
) -> None:
    """Makes a layer known to all quantities, of first and second order, by one function.

    Modules with parameters need no registration to work: without one, their backward pass is vectorised over the
    samples. A function of one's own is faster, and works where the vectorised pass does not (operations without a
    batching rule, random numbers).

    Args:
        module_class: a class of modules whose forward uses its own parameters. Subclasses with the same forward are
            meant, too.
        per_sample_gradient: `per_sample_gradient(module, *args, grad_output=..., **kwargs)`, with the arguments of the
            module's forward and the gradient at its output (a tuple for several outputs), returns by the parameters'
            names the per-sample gradients [N, *P]: entry n is what sample n contributes to the parameter's gradient,
            and N the size of the output gradient's dimension 0. Names of frozen parameters may be missing, and others
            be there. For second-order quantities it is called once for each column of the curvature, as `grad_output`.
            Made of differentiable operations if quantities shall be differentiable.
        check: compare the sum over the samples with torch's gradient, the first time that this is not 0.

    Raises:
        TypeError: `module_class` is no class of modules, or `per_sample_gradient` no function.
        ValueError: the library has a rule of its own for the class.
    """
    from backpack_cuda.rules import rule_of_class  # this module is one of the rules

    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"module_class: expected a subclass of torch.nn.Module, got {module_class!r}")
    if not callable(per_sample_gradient):
        raise TypeError(f"per_sample_gradient: expected a function, got {type(per_sample_gradient).__name__}")
    if rule_of_class(module_class) is not None:
        raise ValueError(f"module_class: {module_class.__name__} has a rule of its own already")
    _REGISTERED[module_class] = _Registration(per_sample_gradient, check)


def registration_for(module: nn.Module) -> _Registration | None:
    """What is registered for a module's class, or the class that it has its forward from."""
    if _REGISTERED:
        forward = type(module).forward
        for module_class in type(module).__mro__:
            if module_class in _REGISTERED and module_class.forward is forward:
                return _REGISTERED[module_class]
    return None


def registered_gradients(
    registration: _Registration,
    module: nn.Module,
    parameters: dict[str, nn.Parameter],
    args: tuple,
    kwargs: dict,
    grad_outputs: tuple[Tensor, ...],
    totals: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Per-sample gradients [N, *P] of the named parameters, from a registered function.

    `totals` returns torch's gradients of them.
    """
    function = getattr(registration.function, "__name__", repr(registration.function))
    name = f"{function} of {type(module).__name__}"
    grad_output = grad_outputs[0] if len(grad_outputs) == 1 else grad_outputs
    with authoring():  # it may run the module again
        found = registration.function(module, *args, grad_output=grad_output, **kwargs)
    if not isinstance(found, Mapping):
        raise TypeError(f"{name}: expected a dict from parameters' names to tensors, got {type(found).__name__}")
    n = grad_outputs[0].shape[0] if grad_outputs[0].dim() else 0
    gradients = {}
    for parameter_name, parameter in parameters.items():
        if parameter_name not in found:
            entries = ", ".join(map(str, found)) or "none"
            raise ValueError(f"{name}: expected an entry {parameter_name!r}, got {entries}")
        rows = found[parameter_name]
        if not isinstance(rows, Tensor):
            raise TypeError(f"{name}: expected a Tensor for {parameter_name!r}, got {type(rows).__name__}")
        if list(rows.shape) != [n, *parameter.shape]:
            raise ValueError(
                f"{name}: expected {[n, *parameter.shape]}, samples and {parameter_name}, got {list(rows.shape)}"
            )
        if rows.device != parameter.device or not rows.is_floating_point():
            raise ValueError(
                f"{name}: expected {parameter_name!r} as {parameter.dtype} on {parameter.device}, got {rows.dtype} on "
                f"{rows.device}"
            )
        gradients[parameter_name] = rows.to(parameter.dtype)
    unchecked = parameters.keys() - registration.checked
    if registration.check and unchecked and n:
        expected = totals()
        _check_sums(name, {name: gradients[name] for name in unchecked}, expected, grad_outputs)
        registration.checked |= {name for name in unchecked if expected[name].any()}
    return gradients


def _check_sums(
    name: str, gradients: dict[str, Tensor], totals: dict[str, Tensor], grad_outputs: tuple[Tensor, ...]
) -> None:
    # Gradients may cancel within a sample, down to the rounding of what was summed.
    summed = sum(g.detach().abs().sum() for g in grad_outputs)
    for parameter_name, rows in gradients.items():
        rows, total = rows.detach(), totals[parameter_name].to(rows.dtype)
        if not total.numel():
            continue
        eps = torch.finfo(rows.dtype).eps
        allowed = 1e4 * eps * rows.abs().sum(0).max() + 16 * eps * summed
        difference = (rows.sum(0) - total).abs()
        if (total.isfinite() & ((difference > allowed) | difference.isnan())).any():
            raise ValueError(
                f"{name}: its per-sample gradients of {parameter_name!r} do not sum to torch's gradient; register it "
                "with check=False if the layer draws random numbers"
            )
