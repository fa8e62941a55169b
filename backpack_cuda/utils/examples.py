"""Data and a reference for example programs."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


def load_mnist_dataset() -> Dataset:
    """The training images of MNIST with mean 0 and variance 1, loaded into ./data when they are not there.

    Raises:
        ImportError: torchvision is not installed.
    """
    try:
        from torchvision import datasets, transforms
    except ImportError as error:
        raise ImportError("MNIST is loaded by torchvision, which is not installed: pip install torchvision") from error
    standardise = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    return datasets.MNIST("./data", train=True, transform=standardise, download=True)


def get_mnist_dataloader(batch_size: int = 64, shuffle: bool = True) -> DataLoader:
    """Mini-batches of `load_mnist_dataset()`, of which the errors are."""
    return DataLoader(load_mnist_dataset(), batch_size=batch_size, shuffle=shuffle)


def load_one_batch_mnist(batch_size: int = 64, shuffle: bool = True, flat: bool = False) -> tuple[Tensor, Tensor]:
    """One mini-batch of images [N, 1, 28, 28], or [N, 784] for `flat`, and labels [N]; errors as above."""
    images, labels = next(iter(get_mnist_dataloader(batch_size, shuffle)))
    return (images.flatten(1) if flat else images), labels


def autograd_diag_ggn_exact(
    X: Tensor, y: Tensor, model: nn.Module, loss_function: nn.Module, idx: Sequence[int] | None = None
) -> Tensor:
    """The diagonal of the generalised Gauss-Newton matrix by autograd alone, entry by entry.

    Args:
        X, y: inputs and targets of a batch.
        model: a network; its parameters that are not frozen are taken in the order of `parameters()`.
        loss_function: of the prediction and y, a scalar.
        idx: which entries of the diagonal; None for all.

    Returns:
        The entries [D] of all parameters behind each other, or [len(idx)].
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    output = model(X)
    (slope,) = torch.autograd.grad(loss_function(output, y), output, create_graph=True)
    # The columns of the Jacobian J are the derivatives of J^T u in u.
    u = torch.zeros_like(output, requires_grad=True)
    pulled_back = torch.autograd.grad(output, parameters, u, create_graph=True, materialize_grads=True)
    pulled_back = torch.cat([part.reshape(-1) for part in pulled_back])  # [D]
    entries = []
    for index in range(len(pulled_back)) if idx is None else idx:
        (column,) = torch.autograd.grad(pulled_back[index], u, retain_graph=True)
        (curved,) = torch.autograd.grad(slope, output, column, retain_graph=True, materialize_grads=True)
        entries.append((column * curved).sum())
    return torch.stack(entries)
