"""Inputs and outputs that modules keep as attributes: `input0`, `input1`, ..., `output`."""

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

IO_FLAG = "_backpack_store_io"  # attribute of modules extended with store_io=True


def memory_cleanup(module: nn.Module) -> None:
    """Deletes the input and output that a module extended with `store_io=True` holds (`input0`, ..., `output`)."""
    for name in [name for name in module.__dict__ if is_stored(name)]:
        delattr(module, name)


def is_stored(name: str) -> bool:
    """Whether an attribute of this name holds a module's input or output."""
    return name == "output" or (name.startswith("input") and name[len("input") :].isdigit())


def is_taken(module: nn.Module, name: str) -> bool:
    """Whether a module has a child, parameter or buffer of this name."""
    return name in module._modules or name in module._parameters or name in module._buffers


def store(module: nn.Module, attributes: dict[str, object]) -> None:
    """Attributes of a module, which may be tensors or not; none in the place of a child, parameter or buffer.

    Without their graph, which knows the module: it would not be freed without a backward pass.
    """
    for name, value in attributes.items():
        if not is_taken(module, name):
            # Not setattr(), as in run_hook(). A value may be a tuple of tensors, as a recurrent cell's state is.
            module.__dict__[name] = tree_map_only(Tensor, _without_graph, value)


def _without_graph(tensor: Tensor) -> Tensor:
    return tensor if tensor.grad_fn is None else tensor.detach()
