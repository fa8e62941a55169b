"""BackPACK's support matrix as data: one model per row, and what BackPACK 1.7.1 does in every column."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Column -> the extensions that share code and support.
COLUMNS = {
    "BatchGrad": ["BatchGrad"],
    "BatchL2Grad": ["BatchL2Grad"],
    "SumGradSquared": ["SumGradSquared"],
    "Variance": ["Variance"],
    "DiagGGN": ["DiagGGNExact", "BatchDiagGGNExact", "DiagGGNMC", "BatchDiagGGNMC"],
    "SqrtGGN": ["SqrtGGNExact", "SqrtGGNMC"],
    "KFAC": ["KFAC"],
    "KFLR": ["KFLR"],
    "KFRA": ["KFRA"],
    "DiagHessian": ["DiagHessian", "BatchDiagHessian"],
    "HMP": ["HMP"],
    "GGNMP": ["GGNMP"],
    "PCHMP": ["PCHMP"],
}
RIGHT, WRONG, MISSING, RAISES = "right", "wrong", "missing", "raises"
ANSWERS = "answers"  # for the Kronecker factors of recurrent modules, which test_recurrent.py has an oracle for
LETTERS = {"r": RIGHT, "W": WRONG, "m": MISSING, "-": RAISES, "a": ANSWERS}
EVERY_COLUMN = tuple(COLUMNS)


@dataclass(frozen=True)
class Row:
    """A model and its loss."""

    build: Callable[[Callable], nn.Sequential]  # of a function that imports from the library
    shape: tuple[int, ...]
    loss: Callable[[], nn.Module] = nn.CrossEntropyLoss
    targets: str = "classes"  # kind of curvature_tools.targets_for
    float32: tuple[str, ...] = ()  # columns in which BackPACK has an error of types in float64

    def model(self, library: str) -> nn.Sequential:
        """The float64 model with custom modules of `library`."""
        torch.manual_seed(0)
        model = self.build(lambda name: _imported(library, name)).double().eval()
        for module in model:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return model

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        model = self.model("backpack")
        torch.manual_seed(1)
        if isinstance(model[0], nn.Embedding):
            inputs = torch.randint(model[0].num_embeddings, self.shape)
        else:
            inputs = torch.randn(self.shape, dtype=torch.float64)
        with torch.no_grad():
            outputs = model(inputs)
        return inputs, _targets(self.targets, outputs)


def _imported(library: str, name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"{library}.{module}"), attribute)


def _targets(kind: str, outputs: Tensor) -> Tensor:
    if kind == "normal":
        return torch.randn_like(outputs)
    if kind == "binary":
        return torch.rand_like(outputs).round()
    if kind == "probabilities":
        return torch.rand_like(outputs)
    if kind == "soft":
        return torch.randn_like(outputs).softmax(1)
    targets = torch.randint(outputs.shape[1], (len(outputs), *outputs.shape[2:]))
    if kind == "some ignored":
        targets[1] = -100
    return targets


def behind_linear(module: Callable[[], nn.Module], sizes: tuple[int, int] = (3, 3)) -> Callable:
    """The module behind a Linear layer."""
    return lambda library: nn.Sequential(nn.Linear(*sizes), module())


def behind_conv(module: Callable[[], nn.Module], layer: type = nn.Conv2d, channels: int = 2, **options) -> Callable:
    """The module behind a convolution, before Flatten."""
    return lambda library: nn.Sequential(layer(1, channels, 2, **options), module(), nn.Flatten())


def custom(name: str, *arguments, layer: Callable[[], nn.Module] = lambda: nn.Linear(3, 4)) -> Callable:
    """A custom module of the library behind a layer, before Flatten."""
    return lambda library: nn.Sequential(layer(), library(f"custom_module.{name}")(*arguments), nn.Flatten())


def parallel(library) -> nn.Sequential:
    """A residual connection by the library's containers."""
    merge = library("custom_module.branching.SumModule")()
    branches = library("custom_module.branching.Parallel")
    return nn.Sequential(nn.Linear(3, 3), branches(nn.Identity(), nn.Linear(3, 3), merge_module=merge))


def recurrent(make: Callable[[], nn.Module]) -> Callable:
    """A recurrent module behind a Linear layer."""
    return lambda library: nn.Sequential(
        nn.Linear(2, 2), make(), library("custom_module.reduce_tuple.ReduceTuple")(0), nn.Flatten()
    )


def losses(make: Callable[[], nn.Module], outputs: int = 3) -> dict:
    """The arguments of a Row for a loss behind a small network."""
    return {
        "build": lambda library: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, outputs)),
        "shape": (4, 3),
        "loss": make,
    }


BCE = nn.BCEWithLogitsLoss
ROWS = {
    "Linear [N, I]": Row(behind_linear(lambda: nn.Linear(3, 4)), (3, 3)),
    "Linear [N, *, I]": Row(lambda library: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Flatten()), (3, 2, 3)),
    "Conv1d": Row(behind_conv(lambda: nn.Conv1d(2, 2, 2, 2), nn.Conv1d), (3, 1, 6)),
    "Conv2d": Row(behind_conv(lambda: nn.Conv2d(2, 2, 2, padding=1, dilation=2)), (3, 1, 3, 3)),
    "Conv3d": Row(behind_conv(lambda: nn.Conv3d(2, 2, 1), nn.Conv3d), (3, 1, 2, 2, 3)),
    "ConvTranspose1d": Row(behind_conv(lambda: nn.ConvTranspose1d(2, 2, 2), nn.Conv1d), (3, 1, 3)),
    "ConvTranspose2d": Row(behind_conv(lambda: nn.ConvTranspose2d(2, 1, 2, 2)), (3, 1, 3, 2)),
    "ConvTranspose3d": Row(behind_conv(lambda: nn.ConvTranspose3d(2, 2, (1, 1, 2)), nn.Conv3d), (3, 1, 2, 2, 2)),
    "Conv2d, groups": Row(behind_conv(lambda: nn.Conv2d(2, 4, 2, groups=2)), (3, 1, 3, 3)),
    "ConvTranspose2d, groups": Row(behind_conv(lambda: nn.ConvTranspose2d(2, 2, 2, groups=2)), (3, 1, 2, 3)),
    "Conv2d, padding='same'": Row(behind_conv(lambda: nn.Conv2d(2, 2, (1, 3), padding="same")), (3, 1, 4, 5)),
    "Conv2d, padding='valid'": Row(behind_conv(lambda: nn.Conv2d(2, 2, 2, padding="valid")), (3, 1, 3, 3)),
    "Conv2d, padding_mode='circular'": Row(
        behind_conv(lambda: nn.Conv2d(2, 2, 2, padding=1, padding_mode="circular")), (3, 1, 3, 3)
    ),
    "Conv2d, padding_mode='reflect'": Row(
        behind_conv(lambda: nn.Conv2d(2, 1, 2, padding=1, padding_mode="reflect")), (3, 1, 3, 3)
    ),
    "Conv2d, padding_mode='replicate'": Row(
        behind_conv(lambda: nn.Conv2d(2, 1, 2, padding=1, padding_mode="replicate")), (3, 1, 3, 3)
    ),
    "ConvTranspose2d, output_padding": Row(
        behind_conv(lambda: nn.ConvTranspose2d(2, 1, 2, 2, output_padding=1)), (3, 1, 3, 2)
    ),
    "MaxPool1d": Row(behind_conv(lambda: nn.MaxPool1d(2), nn.Conv1d), (3, 1, 7)),
    "MaxPool2d": Row(behind_conv(lambda: nn.MaxPool2d(2, 1, ceil_mode=True)), (3, 1, 3, 4), float32=("KFRA",)),
    "MaxPool3d": Row(behind_conv(lambda: nn.MaxPool3d(2, 1), nn.Conv3d), (3, 1, 3, 3, 4)),
    "AvgPool1d": Row(behind_conv(lambda: nn.AvgPool1d(2), nn.Conv1d), (3, 1, 7), float32=EVERY_COLUMN),
    "AvgPool2d": Row(behind_conv(lambda: nn.AvgPool2d(2, 1, padding=1)), (3, 1, 3, 3), float32=EVERY_COLUMN),
    "AvgPool3d": Row(behind_conv(lambda: nn.AvgPool3d(2, 1), nn.Conv3d), (3, 1, 3, 3, 4), float32=EVERY_COLUMN),
    "AvgPool2d, ceil_mode": Row(behind_conv(lambda: nn.AvgPool2d(2, ceil_mode=True)), (3, 1, 4, 4)),
    "AvgPool2d, count_include_pad=False": Row(
        behind_conv(lambda: nn.AvgPool2d(2, padding=1, count_include_pad=False)), (3, 1, 4, 4)
    ),
    "AvgPool2d, divisor_override": Row(
        behind_conv(lambda: nn.AvgPool2d(2, divisor_override=3)), (3, 1, 5, 3), float32=EVERY_COLUMN
    ),
    "AdaptiveAvgPool1d": Row(behind_conv(lambda: nn.AdaptiveAvgPool1d(2), nn.Conv1d), (3, 1, 5), float32=EVERY_COLUMN),
    "AdaptiveAvgPool2d": Row(behind_conv(lambda: nn.AdaptiveAvgPool2d((2, 1))), (3, 1, 3, 4), float32=EVERY_COLUMN),
    "AdaptiveAvgPool3d": Row(
        behind_conv(lambda: nn.AdaptiveAvgPool3d(1), nn.Conv3d), (3, 1, 3, 3, 3), float32=EVERY_COLUMN
    ),
    "AdaptiveAvgPool2d, not a multiple": Row(behind_conv(lambda: nn.AdaptiveAvgPool2d(2)), (3, 1, 4, 4)),
    "ZeroPad2d": Row(behind_conv(lambda: nn.ZeroPad2d((1, 0, 2, 1))), (3, 1, 3, 3)),
    "ReflectionPad2d": Row(behind_conv(lambda: nn.ReflectionPad2d(1)), (3, 1, 3, 3)),
    "BatchNorm1d": Row(behind_linear(lambda: nn.BatchNorm1d(3)), (3, 3)),
    "BatchNorm2d": Row(behind_conv(lambda: nn.BatchNorm2d(2)), (3, 1, 3, 3)),
    "BatchNorm3d": Row(behind_conv(lambda: nn.BatchNorm3d(2), nn.Conv3d), (3, 1, 2, 2, 3)),
    "Dropout": Row(behind_linear(lambda: nn.Dropout(0.5)), (3, 3)),
    "Flatten": Row(lambda library: nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten()), (3, 1, 3, 3)),
    "Identity": Row(behind_linear(nn.Identity), (3, 3)),
    **{
        module.__name__: Row(behind_linear(module), (3, 3))
        for module in (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.LogSigmoid, nn.ELU, nn.SELU)
    },
    **{module.__name__: Row(behind_linear(module), (3, 3)) for module in (nn.GELU, nn.SiLU, nn.Softplus)},
    "Softmax": Row(behind_linear(lambda: nn.Softmax(1)), (3, 3)),
    "Upsample": Row(behind_conv(lambda: nn.Upsample(scale_factor=2, mode="bilinear")), (3, 1, 3, 3)),
    "Embedding": Row(
        lambda library: nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(6, 3)), (4, 3), float32=EVERY_COLUMN
    ),
    "RNN": Row(recurrent(lambda: nn.RNN(2, 2, batch_first=True)), (3, 3, 2)),
    "LSTM": Row(recurrent(lambda: nn.LSTM(2, 2, batch_first=True)), (3, 3, 2)),
    "GRU": Row(recurrent(lambda: nn.GRU(2, 2, batch_first=True)), (3, 3, 2)),
    "LSTM, two layers, bidirectional": Row(
        recurrent(lambda: nn.LSTM(2, 1, 2, batch_first=True, bidirectional=True)), (3, 2, 2)
    ),
    "ScaleModule": Row(custom("scale_module.ScaleModule", 0.3), (3, 3)),
    "Parallel": Row(parallel, (3, 3)),
    "Permute": Row(custom("permute.Permute", 0, 2, 1), (3, 2, 3)),
    "Pad": Row(custom("pad.Pad", (1, 0), "constant", 0.5), (3, 3)),
    "Slicing": Row(custom("slicing.Slicing", (slice(None), slice(1, 3))), (3, 3)),
    "LayerNorm": Row(behind_linear(lambda: nn.LayerNorm(3)), (3, 3)),
    "GroupNorm": Row(behind_conv(lambda: nn.GroupNorm(2, 2)), (3, 1, 3, 3)),
    "MSELoss": Row(**losses(nn.MSELoss), targets="normal", float32=("KFRA",)),
    "MSELoss, sum": Row(**losses(lambda: nn.MSELoss(reduction="sum")), targets="normal", float32=("KFRA",)),
    "CrossEntropyLoss": Row(**losses(nn.CrossEntropyLoss)),
    "CrossEntropyLoss, sum": Row(**losses(lambda: nn.CrossEntropyLoss(reduction="sum"))),
    "CrossEntropyLoss, label_smoothing": Row(**losses(lambda: nn.CrossEntropyLoss(label_smoothing=0.2))),
    "CrossEntropyLoss, soft targets": Row(**losses(nn.CrossEntropyLoss), targets="soft"),
    "CrossEntropyLoss, weight": Row(**losses(lambda: nn.CrossEntropyLoss(torch.tensor([1, 2, 0.5]).double()))),
    "CrossEntropyLoss, ignore_index": Row(**losses(lambda: nn.CrossEntropyLoss(ignore_index=1))),
    "CrossEntropyLoss, targets -100": Row(**losses(nn.CrossEntropyLoss), targets="some ignored"),
    "CrossEntropyLoss, positions": Row(
        lambda library: nn.Sequential(nn.Conv1d(2, 2, 2), nn.Tanh(), nn.Conv1d(2, 3, 1)), (3, 2, 3)
    ),
    "BCEWithLogitsLoss [N, 1]": Row(**losses(BCE, 1), targets="binary"),
    "BCEWithLogitsLoss [N, 1], sum": Row(**losses(lambda: BCE(reduction="sum"), 1), targets="binary"),
    "BCEWithLogitsLoss [N, 1], probabilities": Row(**losses(BCE, 1), targets="probabilities"),
    "BCEWithLogitsLoss [N, C]": Row(**losses(BCE), targets="binary"),
    "BCEWithLogitsLoss, pos_weight": Row(
        **losses(lambda: BCE(pos_weight=torch.tensor([2.0]).double()), 1), targets="binary"
    ),
    "L1Loss": Row(**losses(nn.L1Loss), targets="normal"),
}

# By the row BackPACK's verdicts and ours, one letter per column.
VERDICTS = {
    "Linear [N, I]": ("rrrrrrrrrrrrr", "rrrrrrrrrrrrr"),
    "Linear [N, *, I]": ("rrrrrr---rrrr", "rrrrrrrrrrrrr"),
    "Conv1d": ("rrrrrrrrrr---", "rrrrrrrrrrrrr"),
    "Conv2d": ("rrrrrrrrrrrrr", "rrrrrrrrrrrrr"),
    "Conv3d": ("rrrrrrrrrr---", "rrrrrrrrrrrrr"),
    "ConvTranspose1d": ("rrrrrrrrrr---", "rrrrrrrrrrrrr"),
    "ConvTranspose2d": ("rrrrrrrrrr---", "rrrrrrrrrrrrr"),
    "ConvTranspose3d": ("rrrrrrrrrr---", "rrrrrrrrrrrrr"),
    "Conv2d, groups": ("rWrrrr---rrrr", "rrrrrrrrrrrrr"),
    "ConvTranspose2d, groups": ("rWrrrr---r---", "rrrrrrrrrrrrr"),
    "Conv2d, padding='same'": ("W-WW---------", "rrrrrrrrrrrrr"),
    "Conv2d, padding='valid'": ("r-rr---------", "rrrrrrrrrrrrr"),
    "Conv2d, padding_mode='circular'": ("WWWWWWWWWWWWW", "rrrrrrrrrrrrr"),
    "Conv2d, padding_mode='reflect'": ("WWWWWWWWWWWWW", "rrrrrrrrrrrrr"),
    "Conv2d, padding_mode='replicate'": ("WWWWWWWWWWWWW", "rrrrrrrrrrrrr"),
    "ConvTranspose2d, output_padding": ("------rrr----", "rrrrrrrrrrrrr"),
    "MaxPool1d": ("rrrrrr---r---", "rrrrrrrrrrrrr"),
    "MaxPool2d": ("rrrrrrrrrrrrr", "rrrrrrrrrrrrr"),
    "MaxPool3d": ("rrrrrr---r---", "rrrrrrrrrrrrr"),
    "AvgPool1d": ("rrrrrr---r---", "rrrrrrrrrrrrr"),
    "AvgPool2d": ("rrrrrrrrrrrrr", "rrrrrrrrrrrrr"),
    "AvgPool3d": ("rrrrrr---r---", "rrrrrrrrrrrrr"),
    "AvgPool2d, ceil_mode": ("rrrr---------", "rrrrrrrrrrrrr"),
    "AvgPool2d, count_include_pad=False": ("rrrr---------", "rrrrrrrrrrrrr"),
    "AvgPool2d, divisor_override": ("rrrrWWrWWWWWW", "rrrrrrrrrrrrr"),
    "AdaptiveAvgPool1d": ("rrrrr----r---", "rrrrrrrrrrrrr"),
    "AdaptiveAvgPool2d": ("rrrrr----r---", "rrrrrrrrrrrrr"),
    "AdaptiveAvgPool3d": ("rrrrr----r---", "rrrrrrrrrrrrr"),
    "AdaptiveAvgPool2d, not a multiple": ("rrrr---------", "rrrrrrrrrrrrr"),
    "ZeroPad2d": ("rrrrrrrrrrrrr", "rrrrrrrrrrrrr"),
    "ReflectionPad2d": ("rrrr---------", "rrrrrrrrrrrrr"),
    "BatchNorm1d": ("rrrrrr----rr-", "rrrrrrrrrrrrr"),
    "BatchNorm2d": ("rrrrrr-------", "rrrrrrrrrrrrr"),
    "BatchNorm3d": ("rrrrrr-------", "rrrrrrrrrrrrr"),
    "Dropout": ("rrrrrrrrrrrrr", "rrrrrrrrrrrrr"),
    "Flatten": ("rrrrrrrrrrrrr", "rrrrrrrrrrrrr"),
    "Identity": ("rrrrrrrr-----", "rrrrrrrrrrrrr"),
    "ReLU": ("rrrrrrrrrrrrr", "rrrrrrrrrrrrr"),
    "Sigmoid": ("rrrrrrrrrrrrW", "rrrrrrrrrrrrr"),
    "Tanh": ("rrrrrrrrrrrrW", "rrrrrrrrrrrrr"),
    "LeakyReLU": ("rrrrrr---r---", "rrrrrrrrrrrrr"),
    "LogSigmoid": ("rrrrrr---r---", "rrrrrrrrrrrrr"),
    "ELU": ("rrrrrr---r---", "rrrrrrrrrrrrr"),
    "SELU": ("rrrrrr---r---", "rrrrrrrrrrrrr"),
    "GELU": ("rrrr---------", "rrrrrrrrrrrrr"),
    "SiLU": ("rrrr---------", "rrrrrrrrrrrrr"),
    "Softplus": ("rrrr---------", "rrrrrrrrrrrrr"),
    "Softmax": ("rrrr---------", "rrrrrrrrr-rr-"),
    "Upsample": ("rrrr---------", "rrrrrrrrrrrrr"),
    "Embedding": ("rrrrrr-------", "rrrrrr---rrrr"),
    "RNN": ("rrrrr--------", "rrrrrrrra-rr-"),
    "LSTM": ("rrrrr--------", "rrrrrrrra-rr-"),
    "GRU": ("mmmm---------", "rrrrrrrra-rr-"),
    "LSTM, two layers, bidirectional": ("-------------", "rrrrrrrra-rr-"),
    "ScaleModule": ("rrrrrrrr-----", "rrrrrrrrrrrrr"),
    "Parallel": ("rrrrrrr------", "rrrrrrrrrrrrr"),
    "Permute": ("rrrrr--------", "rrrrrrrrrrrrr"),
    "Pad": ("rrrrrr---r---", "rrrrrrrrrrrrr"),
    "Slicing": ("rrrrrr---r---", "rrrrrrrrrrrrr"),
    "LayerNorm": ("mmmm---------", "rrrrrrrrr-rr-"),
    "GroupNorm": ("mmmm---------", "rrrrrrrrr-rr-"),
    "MSELoss": ("rrrrrrrrrrrrW", "rrrrrrrrrrrrr"),
    "MSELoss, sum": ("rrrrrrrrrrrrW", "rrrrrrrrrrrrr"),
    "CrossEntropyLoss": ("rrrrrrrrrrrrW", "rrrrrrrrrrrrr"),
    "CrossEntropyLoss, sum": ("rrrrrrrrrrrrW", "rrrrrrrrrrrrr"),
    "CrossEntropyLoss, label_smoothing": ("rrrrrrrrrrrrW", "rrrrrrrrrrrrr"),
    "CrossEntropyLoss, soft targets": ("rrrrrrrrrrrrW", "rrrrrrrrrrrrr"),
    "CrossEntropyLoss, weight": ("rrrr---------", "rrrrrrrrrrrrr"),
    "CrossEntropyLoss, ignore_index": ("rrrr---------", "rrrrrrrrrrrrr"),
    "CrossEntropyLoss, targets -100": ("rrrrWWrWWWWWW", "rrrrrrrrrrrrr"),
    "CrossEntropyLoss, positions": ("rrrrrrrrrr---", "rrrrrrrrrrrrr"),
    "BCEWithLogitsLoss [N, 1]": ("rrrrrrrr-r---", "rrrrrrrrrrrrr"),
    "BCEWithLogitsLoss [N, 1], sum": ("rrrrrrrr-r---", "rrrrrrrrrrrrr"),
    "BCEWithLogitsLoss [N, 1], probabilities": ("rrrr---r-r---", "rrrrrrrrrrrrr"),
    "BCEWithLogitsLoss [N, C]": ("rrrr---------", "rrrrrrrrrrrrr"),
    "BCEWithLogitsLoss, pos_weight": ("rrrr---------", "rrrrrrrrrrrrr"),
    "L1Loss": ("rrrr---------", "rrrr------r--"),
}
assert VERDICTS.keys() == ROWS.keys()
