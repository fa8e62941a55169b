"""A convolution and an LSTM in one network: what each part still has to learn, and how sensitive it is.

The eight rows of a digit are a sequence of vectors. A convolution along the sequence sees three rows at a time, an LSTM
reads what it makes of them, a linear layer decides. Per-sample gradients and the Gauss-Newton diagonal go through all
of it: the norms of the former tell how much the samples still want to change a part of the network, the trace of the
latter how much the predictions depend on it.

    python examples/digits_as_sequences.py [--epochs 5]
"""

import argparse

import torch
from torch import Tensor, nn

try:
    from sklearn.datasets import load_digits
except ImportError as error:
    raise SystemExit("This example needs scikit-learn: pip install scikit-learn") from error

from backpack_cuda import backpack, extend
from backpack_cuda.custom_module.permute import Permute
from backpack_cuda.custom_module.reduce_tuple import ReduceTuple
from backpack_cuda.extensions import BatchL2Grad, DiagGGNExact

BATCH_SIZE = 64


def load_data() -> tuple[Tensor, Tensor]:
    """Sequences [N, 8, 8], features first, and labels [N]."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)
    return images.transpose(1, 2).contiguous()[:640], torch.tensor(digits.target)[:640]


def network() -> nn.Sequential:
    """Convolution, LSTM and a linear layer; of modules only, so that BackPACK runs it too.

    With backpack_cuda any forward does, such as `self.linear(self.lstm(self.conv(x).mT)[0].flatten(1))`.
    """
    return nn.Sequential(
        nn.Conv1d(8, 10, 3, padding=1),
        nn.ReLU(),
        Permute(0, 2, 1),  # [N, T, features]
        nn.LSTM(10, 12, batch_first=True),
        ReduceTuple(0),  # the outputs of all steps
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def train(model: nn.Module, sequences: Tensor, labels: Tensor, epochs: int) -> None:
    """A normal training loop."""
    optimiser = torch.optim.Adam(model.parameters(), 0.03)
    for _ in range(epochs):
        for batch in torch.arange(len(labels)).split(BATCH_SIZE):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(sequences[batch]), labels[batch]).backward()
            optimiser.step()


def measure(model: nn.Module, sequences: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
    """By the parameter's name the mean norm of the samples' gradients, and the trace of the Gauss-Newton matrix."""
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))(model(sequences), labels)
    with backpack(BatchL2Grad(), DiagGGNExact()):
        loss.backward()
    return {
        name: (p.batch_l2.sqrt().mean().item(), p.diag_ggn_exact.sum().item() / len(labels))
        for name, p in model.named_parameters()
    }


def run(epochs: int = 5) -> tuple[dict, dict, float]:
    """What is measured before and after training, and the accuracy on the training set."""
    torch.manual_seed(0)
    sequences, labels = load_data()
    model = extend(network())
    before = measure(model, sequences[:BATCH_SIZE], labels[:BATCH_SIZE])
    train(model, sequences, labels, epochs)
    after = measure(model, sequences[:BATCH_SIZE], labels[:BATCH_SIZE])
    with torch.no_grad():
        accuracy = (model(sequences).argmax(1) == labels).float().mean().item()
    print(f"{'':18} norm of a sample's gradient    trace of the Gauss-Newton matrix, per sample")
    for name, (norm, trace) in before.items():
        print(f"{name:18} {norm:13.3f} -> {after[name][0]:7.3f} {trace:17.3f} -> {after[name][1]:7.3f}")
    print(f"accuracy: {accuracy:.3f}")
    return before, after, accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    run(**vars(parser.parse_args()))
