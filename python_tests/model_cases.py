"""Models as data, built from torch's layers or from ours, and the comparison of their quantities with the oracle."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from helpers import assert_close
from oracle import Stats, model_statistics
from torch import Tensor, nn

import backpack_cuda as bp
from backpack_cuda.extensions import BatchGrad, BatchL2Grad, SumGradSquared, Variance

# attribute of a parameter -> the statistic that it must equal
SAVED = {
    "grad_batch": "batch_grad",
    "batch_l2": "batch_l2",
    "sum_grad_squared": "sum_grad_squared",
    "variance": "variance",
}


def all_extensions():
    """New instances of the four first-order extensions."""
    return BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance()


class OwnLayers:
    """The `bp` layers where there are such, torch.nn for everything else."""

    def __getattr__(self, name: str):
        return getattr(bp, name, None) or getattr(nn, name)


LAYERS = {"extended": (nn, bp.extend), "own layers": (OwnLayers(), bp.extend)}


# Containers with functional code. Each takes the namespace its layers come from.
class Residual(nn.Module):
    """Functional activations, a view, and a residual sum around a convolution."""

    def __init__(self, layers):
        super().__init__()
        self.first = layers.Conv2d(2, 4, 3, padding=1)
        self.second = layers.Conv2d(4, 4, 3, padding=1, bias=False)
        self.out = layers.Linear(4 * 5 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        x = x + torch.tanh(self.second(x))
        return self.out(F.dropout(x, 0.3, training=False).reshape(len(x), -1))


class Shared(nn.Module):
    """One convolution and one Linear called twice, in different places."""

    def __init__(self, layers):
        super().__init__()
        self.conv = layers.Conv1d(2, 2, 3, padding=1)
        self.linear = layers.Linear(8, 8)
        self.out = layers.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(torch.relu(self.conv(x))).flatten(1)
        return self.out(self.linear(torch.sigmoid(self.linear(x))))


class Tied(nn.Module):
    """Two Linear modules with the same weight and different biases."""

    def __init__(self, layers):
        super().__init__()
        self.first = layers.Linear(6, 6)
        self.second = layers.Linear(6, 6)
        self.second.weight = self.first.weight
        self.out = layers.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TiedUnlike(nn.Module):
    """A weight [4, 4, 1] shared by a convolution and, as [4, 4, 1], by a transposed one with another stride."""

    def __init__(self, layers):
        super().__init__()
        self.conv = layers.Conv1d(4, 4, 1)
        self.transposed = layers.ConvTranspose1d(4, 4, 1, stride=2, output_padding=1)
        self.transposed.weight = self.conv.weight
        self.out = layers.Linear(4 * 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.transposed(torch.tanh(self.conv(x)))).flatten(1))


class TiedEmbedding(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self, layers):
        super().__init__()
        self.embedding = layers.Embedding(7, 5)
        self.mix = layers.Linear(5, 5)
        self.out = layers.Linear(5, 7, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embedding(x)))).transpose(1, 2)


class Recurrent(nn.Module):
    """A cell of two Linear layers called once per time step."""

    def __init__(self, layers):
        super().__init__()
        self.inner, self.outer = layers.Linear(4, 4), layers.Linear(3, 4)
        self.out = layers.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 3]
        state = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            state = torch.tanh(self.inner(state) + self.outer(step))
        return self.out(state)


class Scale(nn.Module):
    """A module with parameters of its own and no rule."""

    def __init__(self, size: int):
        super().__init__()
        self.factor = nn.Parameter(torch.randn(size))
        self.shift = nn.Parameter(torch.randn(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift


class Pairs(nn.Module):
    """nn.Bilinear of two halves of the input."""

    def __init__(self, layers):
        super().__init__()
        self.bilinear = layers.Bilinear(2, 3, 4)
        self.out = layers.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.bilinear(x[:, :2], x[:, 2:])))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention, batch first, weights not needed."""

    def __init__(self, layers, **options):
        super().__init__()
        self.embed = layers.Linear(3, 4)
        self.attention = layers.MultiheadAttention(4, 2, batch_first=True, **options)
        self.out = layers.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Sequence(nn.Module):
    """A recurrent module of torch, batch first; the loss sees all of its outputs and its last state."""

    def __init__(self, layers, kind: str, **options):
        super().__init__()
        self.recurrent = getattr(layers, kind)(3, 4, batch_first=True, **options)
        self.out = layers.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.recurrent(x)
        state = state[0] if isinstance(state, tuple) else state
        return self.out(torch.cat([outputs.flatten(1), state.transpose(0, 1).flatten(1)], 1))


def tokens(layers) -> nn.Module:
    return layers.Sequential(layers.Linear(3, 5), layers.Tanh(), layers.Linear(5, 4, bias=False), layers.Linear(4, 2))


def mlp(layers) -> nn.Module:
    return layers.Sequential(
        layers.Linear(6, 8), layers.ReLU(), layers.Linear(8, 7), layers.Sigmoid(), layers.Linear(7, 3)
    )


def cnn(layers) -> nn.Module:
    return layers.Sequential(
        layers.Conv2d(2, 4, 3, padding=1),
        layers.ReLU(),
        layers.MaxPool2d(2),
        layers.Conv2d(4, 6, (2, 3), stride=2, padding=1, groups=2),
        layers.Tanh(),
        layers.Conv2d(6, 6, 2, groups=6, dilation=1, bias=False),
        layers.Flatten(),
        layers.LazyLinear(3),
    )


def seq(*names_and_arguments) -> Callable:
    """Builds a Sequential of layers from (name, arguments, keyword arguments)."""

    def build(layers) -> nn.Module:
        return layers.Sequential(
            *[getattr(layers, name)(*arguments, **options) for name, arguments, options in names_and_arguments]
        )

    return build


def layer(name: str, *arguments, **options):
    return name, arguments, options


def inner(name: str, *arguments, **options) -> Callable:
    """A layer on [N, 4, 6] between two convolutions and followed by a Linear layer."""
    return seq(
        layer("Conv1d", 2, 4, 3, padding=1),
        layer(name, *arguments, **options),
        layer("Tanh"),
        layer("Conv1d", 4, 2, 1),
        layer("Flatten"),
        layer("LazyLinear", 3),
    )


@dataclass(frozen=True)
class ModelCase:
    """A model, its input and its loss. Inputs are standard normal, or class numbers below `vocabulary`."""

    build: Callable
    input_shape: tuple[int, ...]
    loss: nn.Module = field(default_factory=nn.CrossEntropyLoss)
    vocabulary: int = 0

    def data(self, samples: int | None = None) -> tuple[Tensor, Tensor]:
        """(inputs, targets) in float64."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.input_shape[0] if samples is None else samples, *self.input_shape[1:])
        if self.vocabulary:
            inputs = torch.randint(self.vocabulary, shape, generator=generator)
        else:
            inputs = torch.randn(shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            outputs = self.stock()(inputs)
        if isinstance(self.loss, nn.CrossEntropyLoss):
            size = (len(outputs), *outputs.shape[2:])
            return inputs, torch.randint(outputs.shape[1], size, generator=generator)
        return inputs, torch.randn(outputs.shape, generator=generator, dtype=torch.float64)

    def model(self, layers=nn) -> nn.Module:
        """The model in float64 with the same random parameters for every `layers`; normalisations in eval mode."""
        torch.manual_seed(0)
        model = self.build(layers).eval()
        with torch.no_grad():
            shape = (1, *self.input_shape[1:])
            model(torch.zeros(shape, dtype=torch.long) if self.vocabulary else torch.zeros(shape))  # lazy layers
            generator = torch.Generator().manual_seed(2)
            for parameter in model.parameters():
                fan_in = max(parameter[0].numel() if parameter.dim() > 1 else 1, 1)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            model.train()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()
                if getattr(module, "running_mean", None) is not None:
                    module.running_mean.normal_(generator=generator)
                    module.running_var.uniform_(0.5, 2, generator=generator)
        return model.double()

    def stock(self) -> nn.Module:
        return self.model(nn)

    def prepared(self, how: str = "extended") -> nn.Module:
        """The model ready for quantities: torch's layers extended, or our layers."""
        layers, prepare = LAYERS[how]
        return prepare(self.model(layers))

    def expected(self, inputs: Tensor, targets: Tensor) -> dict[str, Stats]:
        return model_statistics(self.stock(), self.loss, inputs, targets)


MSE_SUM, CE_SUM = nn.MSELoss(reduction="sum"), nn.CrossEntropyLoss(reduction="sum")
MODELS: dict[str, ModelCase] = {
    "mlp": ModelCase(mlp, (5, 6)),
    "mlp, sum": ModelCase(mlp, (5, 6), CE_SUM),
    "mlp, one sample": ModelCase(mlp, (1, 6)),
    "tokens, mse": ModelCase(tokens, (4, 5, 3), nn.MSELoss()),
    "tokens, mse sum": ModelCase(tokens, (4, 5, 3), MSE_SUM),
    "grid of tokens": ModelCase(tokens, (3, 2, 3, 3), MSE_SUM),
    "cnn": ModelCase(cnn, (4, 2, 8, 9)),
    "residual": ModelCase(Residual, (4, 2, 5, 4)),
    "dense prediction": ModelCase(seq(layer("Conv2d", 2, 5, 3), layer("Tanh"), layer("Conv2d", 5, 4, 1)), (3, 2, 6, 5)),
    "conv1d same, circular": ModelCase(inner("Conv1d", 4, 4, 4, padding="same", padding_mode="circular"), (3, 2, 6)),
    "conv1d reflect, dilated": ModelCase(
        inner("Conv1d", 4, 4, 3, padding=2, dilation=2, padding_mode="reflect"), (3, 2, 6)
    ),
    "conv1d valid, replicate": ModelCase(
        inner("Conv1d", 4, 4, 3, padding="valid", padding_mode="replicate"), (3, 2, 6)
    ),
    "conv3d": ModelCase(
        seq(
            layer("Conv3d", 2, 4, 2, stride=(1, 2, 1), groups=2),
            layer("Tanh"),
            layer("Flatten"),
            layer("LazyLinear", 3),
        ),
        (3, 2, 3, 4, 3),
    ),
    "decoder": ModelCase(
        seq(
            layer("Linear", 3, 4 * 2 * 3),
            layer("Unflatten", 1, (4, 2, 3)),
            layer("ConvTranspose2d", 4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
            layer("ReLU"),
            layer("ConvTranspose2d", 6, 2, 2, dilation=2, bias=False),
        ),
        (3, 3),
        nn.MSELoss(),
    ),
    "transposed 1d": ModelCase(inner("ConvTranspose1d", 4, 4, 3, stride=2), (3, 2, 6)),
    "transposed 3d": ModelCase(
        seq(layer("ConvTranspose3d", 2, 3, 2, stride=2), layer("Flatten"), layer("LazyLinear", 3)), (2, 2, 2, 1, 2)
    ),
    "shared modules": ModelCase(Shared, (3, 2, 4)),
    "tied weights": ModelCase(Tied, (4, 6)),
    "tied weights of unlike layers": ModelCase(TiedUnlike, (3, 4, 5)),
    "tied embedding": ModelCase(TiedEmbedding, (3, 4), vocabulary=7),
    "recurrent use": ModelCase(Recurrent, (4, 5, 3)),
    # By the generic rule.
    "batch norm": ModelCase(inner("BatchNorm1d", 4), (3, 2, 6)),
    "batch norm 2d": ModelCase(
        seq(layer("Conv2d", 2, 3, 2), layer("BatchNorm2d", 3), layer("Flatten"), layer("LazyLinear", 3)), (3, 2, 4, 4)
    ),
    "batch norm of vectors": ModelCase(seq(layer("Linear", 3, 4), layer("BatchNorm1d", 4)), (5, 3)),
    "layer norm": ModelCase(inner("LayerNorm", (4, 6)), (3, 2, 6)),
    "rms norm": ModelCase(inner("RMSNorm", 6), (3, 2, 6)),
    "group norm": ModelCase(inner("GroupNorm", 2, 4), (3, 2, 6)),
    "instance norm": ModelCase(inner("InstanceNorm1d", 4, affine=True), (3, 2, 6)),
    "prelu": ModelCase(inner("PReLU", 4), (3, 2, 6)),
    "embedding": ModelCase(
        seq(layer("Embedding", 7, 3), layer("Flatten"), layer("LazyLinear", 3)), (4, 5), vocabulary=7
    ),
    "embedding with padding": ModelCase(
        seq(layer("Embedding", 7, 3, padding_idx=2), layer("Flatten"), layer("LazyLinear", 3)), (4, 5), vocabulary=7
    ),
    "embedding bag": ModelCase(seq(layer("EmbeddingBag", 7, 3), layer("Linear", 3, 3)), (4, 5), vocabulary=7),
    "bilinear": ModelCase(Pairs, (4, 5)),
    "own parameters": ModelCase(lambda layers: layers.Sequential(layers.Linear(3, 4), Scale(4)), (4, 3)),
    "attention": ModelCase(SelfAttention, (3, 5, 3)),
    "attention, as many tokens as samples": ModelCase(SelfAttention, (4, 4, 3)),
    "attention without bias": ModelCase(lambda layers: SelfAttention(layers, bias=False), (3, 5, 3)),
    "transformer": ModelCase(
        lambda layers: layers.Sequential(
            layers.Linear(3, 4),
            layers.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
            layers.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, norm_first=True),
            layers.Flatten(),
            layers.LazyLinear(3),
        ),
        (3, 5, 3),
    ),
    "rnn": ModelCase(lambda layers: Sequence(layers, "RNN"), (3, 4, 3)),
    "lstm": ModelCase(lambda layers: Sequence(layers, "LSTM"), (3, 4, 3)),
    "lstm of two layers": ModelCase(lambda layers: Sequence(layers, "LSTM", num_layers=2), (3, 4, 3)),
    "gru": ModelCase(lambda layers: Sequence(layers, "GRU", bidirectional=True), (3, 4, 3)),
}


def assert_quantities(
    model: nn.Module, expected: dict[str, Stats], tolerance: float = 1e-9, attributes: Iterable[str] = tuple(SAVED)
) -> None:
    """Gradients and the named attributes of every trainable parameter equal the oracle's; no other attribute is there.

    Errors are relative to the parameter's largest entry, or to 1e-3 of the model's largest where that is nothing.
    """
    parameters = dict(model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == set(expected)
    largest = max(stats.batch_grad.abs().max().item() for stats in expected.values())
    for name, stats in expected.items():
        parameter = parameters[name]
        size = max(stats.batch_grad.abs().max().item(), 1e-3 * largest)
        assert_close(f"{name}.grad", parameter.grad, stats.grad, tolerance, size)
        for attribute, statistic in SAVED.items():
            if attribute not in attributes:
                assert not hasattr(parameter, attribute), f"{name}.{attribute} was not asked for"
                continue
            value, reference = getattr(parameter, attribute), getattr(stats, statistic)
            assert not value.requires_grad
            squared = 1 if attribute == "grad_batch" else size
            assert_close(f"{name}.{attribute}", value, reference, tolerance, size * squared)


def assert_no_quantities(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        for attribute in SAVED:
            assert not hasattr(parameter, attribute), f"{name}.{attribute}"


def copied_parameters(target: nn.Module, source: nn.Module) -> nn.Module:
    """`target` with the parameters and buffers of `source`, copied."""
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    return target
