"""Several backward passes through one graph: the neural tangent kernel of a network, from `BatchGrad` of every output.

The gradient of output c of sample n with respect to the parameters is row (n, c) of the network's Jacobian. One forward
pass and one backward pass per output, with `retain_graph=True`, give all rows. Their inner products are the tangent
kernel (Jacot et al. 2018, arXiv:1806.07572); kernel regression with it is what a very wide network of this kind would
learn. Here that recognises handwritten digits without a single step of training.

    python examples/several_backward_passes.py
"""

import torch
from torch import Tensor, nn

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit("This example needs scikit-learn: pip install scikit-learn") from error

from backpack_cuda import backpack, extend
from backpack_cuda.extensions import BatchGrad

TRAIN, TEST = 300, 200
RIDGE = 1e-3  # relative to the kernel's mean diagonal


def load_data() -> tuple[Tensor, Tensor]:
    """Images [N, 64] and labels [N], the first TRAIN of them for training."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))[: TRAIN + TEST]
    return torch.tensor(digits.data / 16, dtype=torch.float32)[order], torch.tensor(digits.target)[order]


def jacobian(model: nn.Module, images: Tensor) -> Tensor:
    """[C, N, P]: the gradients of all outputs of all samples with respect to all parameters.

    Results are overwritten by every backward pass, so each is taken away before the next.
    """
    outputs = model(images)  # [N, C]
    rows = []
    for output in outputs.unbind(1):
        last = len(rows) == outputs.shape[1] - 1
        with backpack(BatchGrad(), retain_graph=not last):
            output.sum().backward(retain_graph=not last)
        rows.append(torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], 1))
        for p in model.parameters():
            del p.grad_batch
    return torch.stack(rows)


def predict(kernel: Tensor, labels: Tensor) -> Tensor:
    """Scores [M, C] of the last M samples by ridge regression on the first ones, whose labels [N] are known."""
    known = len(labels)
    targets = nn.functional.one_hot(labels, 10).to(kernel.dtype) - 0.1  # [N, C]
    gram = kernel[:known, :known]
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(known, dtype=kernel.dtype)
    return kernel[known:, :known] @ torch.linalg.solve(gram + ridge, targets)


def run() -> tuple[Tensor, float]:
    """The kernel [N, N] and the accuracy on samples whose labels were not known."""
    torch.manual_seed(0)
    images, labels = load_data()
    model = extend(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
    rows = jacobian(model, images).transpose(0, 1)  # [N, C, P]
    kernel = torch.einsum("ncp,mcp->nm", rows, rows) / 10
    predicted = predict(kernel, labels[:TRAIN]).argmax(1)
    accuracy = (predicted == labels[TRAIN:]).float().mean().item()
    print(f"Jacobian of {rows.shape[1]} outputs and {rows.shape[2]} parameters for {len(rows)} digits")
    print(f"accuracy of tangent kernel regression on {TEST} new digits: {accuracy:.3f}")
    return kernel, accuracy


if __name__ == "__main__":
    run()
