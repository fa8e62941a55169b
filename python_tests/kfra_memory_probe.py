"""`python kfra_memory_probe.py`: bytes of peak memory that KFRA takes beyond its results and what it states before.

Prints {case: bytes} as JSON; see memory_probe.py.
"""

import gc
import json
from pathlib import Path

import torch
from memory_probe import in_a_fork, status
from torch import nn

from backpack_cuda import backpack, extend
from backpack_cuda.extensions import KFRA


class Skip(nn.Module):
    """x + inner(x)."""

    def __init__(self, *inner: nn.Module):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x):
        return x + self.inner(x)


CASES = {
    "mlp": (lambda: [nn.Linear(5, 1500), nn.Sigmoid(), nn.Linear(1500, 1300), nn.Tanh(), nn.Linear(1300, 3)], (4, 5)),
    "convolutions": (
        lambda: [nn.Conv2d(1, 5, 3), nn.Tanh(), nn.Conv2d(5, 5, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)],
        (2, 1, 20, 20),
    ),
    "max pool": (lambda: [nn.Conv2d(1, 6, 1), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(3)], (2, 1, 20, 20)),
    "average pool": (lambda: [nn.Conv2d(1, 6, 1), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(3)], (4, 1, 20, 20)),
    "skip": (
        lambda: [nn.Linear(3, 700), Skip(nn.Linear(700, 700), nn.ReLU(), nn.Linear(700, 700)), nn.Linear(700, 3)],
        (9, 3),
    ),
}


def unstated_bytes(build, shape: tuple[int, ...]) -> int:
    """The second pass of a model: the first one loads code."""
    torch.set_num_threads(1)
    model, loss_function = nn.Sequential(*build()), extend(nn.CrossEntropyLoss())
    inputs, targets = torch.ones(shape), torch.zeros(shape[0], dtype=torch.long)
    model(inputs)
    extend(model)
    kfra = KFRA()
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = None
            parameter.__dict__.pop("kfra", None)
        gc.collect()
        loss = loss_function(model(inputs), targets)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark restarts at what is resident now
        before = status("VmRSS")
        with backpack(kfra):
            loss.backward()
        peak = status("VmHWM")
    results = [t for p in model.parameters() for t in (p.grad, *p.kfra)]
    return peak - before - sum(t.untyped_storage().nbytes() for t in results) - kfra.memory_needed


if __name__ == "__main__":
    print(json.dumps({name: in_a_fork(unstated_bytes, *case) for name, case in CASES.items()}))
