"""Parameters as one vector, and back."""

from collections.abc import Iterable

from torch import Tensor


def vector_to_parameter_list(vec: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """The entries of `vec` in the parameters' shapes: what torch.nn.utils.parameters_to_vector does, backwards.

    Args:
        vec: as many entries as the parameters have together, [D].
        parameters: tensors of the wanted shapes; they remain as they are.

    Returns:
        Detached views of `vec`, one for each parameter.

    Raises:
        TypeError: `vec` is no tensor.
        ValueError: `vec` is no vector, or of another size.
    """
    if not isinstance(vec, Tensor):
        raise TypeError(f"vec: expected a Tensor, got {type(vec).__name__}")
    parameters = list(parameters)
    sizes = [parameter.numel() for parameter in parameters]
    if vec.dim() != 1 or len(vec) != sum(sizes):
        raise ValueError(f"vec: expected a vector of {sum(sizes)} entries, got size {list(vec.shape)}")
    parts = vec.detach().split(sizes)
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
