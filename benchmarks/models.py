"""The models of the benchmark, built of stock torch layers; every library adapts its own copy."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A model with its batch."""

    description: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]  # [N, ...]
    vocabulary: int = 0  # where it is not 0, the inputs are tokens

    def make(self, device: str) -> tuple[nn.Module, Tensor, Tensor]:
        """Model, input [N, ...] and labels [N], the same in every process."""
        torch.manual_seed(0)
        model = self.build()
        inputs = torch.randint(self.vocabulary, self.input_shape) if self.vocabulary else torch.randn(self.input_shape)
        labels = torch.randint(CLASSES, self.input_shape[:1])
        return model.to(device), inputs.to(device), labels.to(device)


def mlp() -> nn.Module:
    """784-512-512-10."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, CLASSES))


def net_3c3d() -> nn.Module:
    """The CIFAR-10 network "3c3d" of DeepOBS (Schneider et al. 2019): three convolutions, three dense layers."""

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, stride=2, ceil_mode=True)

    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), nn.ReLU(), pool()),
        *(nn.Conv2d(64, 96, 3), nn.ReLU(), pool()),
        *(nn.ZeroPad2d(1), nn.Conv2d(96, 128, 3), nn.ReLU(), pool()),
        *(nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()),
        nn.Linear(256, CLASSES),
    )


def seq() -> nn.Module:
    """Dense layers 128-512-128 applied to each of 64 positions: weights with a sequence dimension."""
    return nn.Sequential(
        nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 128), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 128, CLASSES)
    )


class EncoderLayer(nn.Module):
    """A transformer encoder layer (pre-norm, GELU), written out so that its Linear layers are called as such."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> [N, T, width]."""
        split = self.query_key_value(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each [N, heads, T, width / heads]
        attended = scaled_dot_product_attention(query, key, value)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.contract(gelu(self.expand(self.norm_mlp(x))))


class Encoder(nn.Module):
    """Two encoder layers and a classifier on the mean over positions."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(EncoderLayer(width, heads), EncoderLayer(width, heads))
        self.classify = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> [N, CLASSES]."""
        return self.classify(self.layers(x).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer, and a classifier on its output at all positions."""

    def __init__(self, layer: type[nn.RNNBase], positions: int, inputs: int, hidden: int) -> None:
        super().__init__()
        self.recurrent = layer(inputs, hidden, batch_first=True)
        self.flatten = nn.Flatten()
        self.classify = nn.Linear(positions * hidden, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, positions, inputs] -> [N, CLASSES]."""
        return self.classify(self.flatten(self.recurrent(x)[0]))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015), with group norm: samples stay independent."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(min(32, outputs), outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(min(32, outputs), outputs)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(y + self.shortcut(x))


def resnet18(width: int = 64) -> nn.Module:
    """ResNet-18 for 224 x 224 images."""
    blocks, channels = [], width
    for stage in range(4):
        for block in range(2):
            blocks.append(ResidualBlock(channels, width << stage, 2 if stage and not block else 1))
            channels = width << stage
    return nn.Sequential(
        *(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.GroupNorm(min(32, width), width), nn.ReLU()),
        *(nn.MaxPool2d(3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)),
    )


class Block(nn.Module):
    """One transformer block and a classifier on the mean over positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.block = EncoderLayer(width, heads)
        self.classify = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> [N, CLASSES]."""
        return self.classify(self.block(x).mean(1))


def curved() -> nn.Module:
    """A convolution and two dense layers with activations that are not piecewise linear."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(8 * 3 * 3, 32), nn.Tanh(), nn.Linear(32, CLASSES)),
    )


def embedding() -> nn.Module:
    """Vectors of 32 tokens, and a classifier on them."""
    return nn.Sequential(nn.Embedding(2000, 64), nn.Flatten(), nn.Linear(32 * 64, CLASSES))


CASES = {
    "mlp": Case("784-512-512-10, N = 128", mlp, (128, 784)),
    "3c3d": Case("DeepOBS 3c3d on CIFAR-10 shapes, N = 64", net_3c3d, (64, 3, 32, 32)),
    "seq": Case("Linear 128-512-128 on [16, 64, 128], then a classifier", seq, (16, 64, 128)),
    "encoder": Case("2-layer transformer encoder, d = 256, T = 128, N = 16", Encoder, (16, 128, 256)),
    "curved": Case("a small network with Sigmoid and Tanh on 8 x 8 images, N = 32", curved, (32, 1, 8, 8)),
    "rnn": Case("RNN 64-128 on [32, 32, 64], then a classifier", lambda: Recurrent(nn.RNN, 32, 64, 128), (32, 32, 64)),
    "lstm": Case("LSTM 64-128 on [32, 32, 64], the same", lambda: Recurrent(nn.LSTM, 32, 64, 128), (32, 32, 64)),
    "embedding": Case("2000 tokens to 64 features on [32, 32], then a classifier", embedding, (32, 32), 2000),
}
# Whole steps of gpu_report.py.
GPU_CASES = {
    "3c3d-large": Case("DeepOBS 3c3d on CIFAR-10 shapes, N = 256", net_3c3d, (256, 3, 32, 32)),
    "resnet18": Case("ResNet-18 with group norm on 224 x 224 images, N = 32", resnet18, (32, 3, 224, 224)),
    "gpt2-block": Case("a block of GPT-2 small, T = 1024, N = 8", lambda: Block(768, 12), (8, 1024, 768)),
}
SMALL_GPU_CASES = {  # for a dry run on a CPU
    "3c3d-small": Case("3c3d, N = 2", net_3c3d, (2, 3, 32, 32)),
    "resnet18-small": Case("a narrow ResNet-18 on 64 x 64 images, N = 2", lambda: resnet18(4), (2, 3, 64, 64)),
    "gpt2-block-small": Case("a narrow transformer block, N = 2", lambda: Block(32, 4), (2, 8, 32)),
}
EVERY_CASE = CASES | GPU_CASES | SMALL_GPU_CASES
