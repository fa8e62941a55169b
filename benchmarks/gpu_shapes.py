"""The layers that gpu_report.py measures, as data: shapes of real networks, and what their weight gradients cost."""

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layer:
    """A Linear layer (no kernel) or a 2-d convolution on square images, with its batch."""

    name: str
    samples: int  # N
    inputs: int  # features or channels
    outputs: int
    positions: int = 1  # Linear: T
    size: int = 0  # convolutions: height and width of the input
    kernel: int = 0  # 0: a Linear layer
    stride: int = 1
    padding: int = 0
    groups: int = 1
    channels_last: bool = False
    count: int = 1  # how many such layers the network has

    @property
    def linear(self) -> bool:
        return self.kernel == 0

    @property
    def output_size(self) -> int:
        """Height and width of a convolution's output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def num_positions(self) -> int:
        """T: how many outer products a per-sample gradient sums."""
        return self.positions if self.linear else self.output_size**2

    @property
    def weight_shape(self) -> tuple[int, ...]:
        kernel = () if self.linear else (self.kernel, self.kernel)
        return (self.outputs, self.inputs // self.groups, *kernel)

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of input and grad_output."""
        if not self.linear:
            sizes = (self.inputs, self.size, self.size), (self.outputs, self.output_size, self.output_size)
        elif self.positions == 1:
            sizes = (self.inputs,), (self.outputs,)
        else:
            sizes = (self.positions, self.inputs), (self.positions, self.outputs)
        return (self.samples, *sizes[0]), (self.samples, *sizes[1])

    def text(self) -> str:
        """One line for a table."""
        if self.linear:
            return f"{self.name}: Linear {self.inputs}→{self.outputs}, N={self.samples}, T={self.positions}"
        groups = f", groups={self.groups}" if self.groups > 1 else ""
        layout = ", channels-last" if self.channels_last else ""
        return (
            f"{self.name}: {self.kernel}x{self.kernel}/{self.stride} {self.inputs}→{self.outputs} at {self.size}², "
            f"N={self.samples}{groups}{layout}"
        )

    def operands(self, device: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(input, grad_output), standard normal."""
        generator = torch.Generator(device).manual_seed(seed)
        made = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in self.shapes]
        if self.channels_last:
            made = [t.to(memory_format=torch.channels_last) for t in made]
        return made[0], made[1]

    def sizes(self) -> tuple:
        """The raw operators' arguments between the operands and what is wanted."""
        if self.linear:
            return ()
        return ((self.kernel,) * 2, (self.stride,) * 2, (self.padding,) * 2, (1, 1), self.groups)

    def flops(self) -> float:
        """Of the weight gradient: one product per sample, position and entry of the weight."""
        return 2.0 * self.samples * self.num_positions * prod(self.weight_shape)

    def operand_elements(self) -> int:
        return sum(map(prod, self.shapes))

    def small(self) -> "Layer":
        """The same kind of layer for a dry run on a CPU."""
        if self.linear:
            return replace(
                self,
                samples=min(self.samples, 4),
                inputs=min(self.inputs // 16, 48),
                outputs=min(self.outputs // 16, 64),
                positions=min(self.positions, 12),
            )
        groups = 1 if self.groups == 1 else max(2, self.groups // 32)
        return replace(
            self,
            samples=2,
            size=max(7, self.size // 14),
            inputs=groups if self.groups > 1 else max(3, self.inputs // 64),
            outputs=groups if self.groups > 1 else max(4, self.outputs // 64),
            groups=groups,
        )


def _gpt2(name: str, inputs: int, outputs: int) -> Layer:
    return Layer(f"GPT-2 {name}", 8, inputs, outputs, positions=1024)


def _conv(name: str, inputs: int, outputs: int, size: int, kernel: int, stride: int = 1, count: int = 1) -> Layer:
    sizes = {"size": size, "kernel": kernel, "stride": stride, "padding": kernel // 2, "count": count}
    return Layer(f"ResNet-50 {name}", 128, inputs, outputs, **sizes)


def _depthwise(channels: int, size: int, stride: int) -> Layer:
    return Layer("MobileNetV2", 128, channels, channels, size=size, kernel=3, stride=stride, padding=1, groups=channels)


MLP = [Layer("MLP", 4096, 4096, 4096)]
# The transformer block of GPT-2 small (Radford et al. 2019).
GPT2 = [
    _gpt2("projection", 768, 768),
    _gpt2("attention", 768, 2304),
    _gpt2("expand", 768, 3072),
    _gpt2("contract", 3072, 768),
]
# The distinct convolutions of ResNet-50 (He et al. 2015) on 224 x 224 images, with the stride in the 3x3 ones.
RESNET50 = [
    _conv("layer1", 64, 64, 56, 3, count=3),
    _conv("layer2", 128, 128, 28, 3, count=3),
    _conv("layer3", 256, 256, 14, 3, count=5),
    _conv("layer4", 512, 512, 7, 3, count=2),
    _conv("layer1", 64, 256, 56, 1, count=4),
    _conv("layer2", 128, 512, 28, 1, count=4),
    _conv("layer3", 256, 1024, 14, 1, count=6),
    _conv("layer4", 512, 2048, 7, 1, count=3),
    _conv("layer1", 256, 64, 56, 1, count=2),
    _conv("layer2", 512, 128, 28, 1, count=3),
    _conv("layer3", 1024, 256, 14, 1, count=5),
    _conv("layer4", 2048, 512, 7, 1, count=2),
    _conv("stem", 3, 64, 224, 7, 2),
    _conv("layer2", 128, 128, 56, 3, 2),
    _conv("layer3", 256, 256, 28, 3, 2),
    _conv("layer4", 512, 512, 14, 3, 2),
    _conv("layer1", 64, 64, 56, 1),
    _conv("layer2", 256, 128, 56, 1),
    _conv("layer3", 512, 256, 28, 1),
    _conv("layer4", 1024, 512, 14, 1),
    _conv("layer2", 256, 512, 56, 1, 2),
    _conv("layer3", 512, 1024, 28, 1, 2),
    _conv("layer4", 1024, 2048, 14, 1, 2),
]
# The distinct depthwise convolutions of MobileNetV2 (Sandler et al. 2018).
MOBILENETV2 = [
    _depthwise(96, 112, 2),
    _depthwise(144, 56, 1),
    _depthwise(384, 14, 1),
    _depthwise(960, 7, 1),
    _depthwise(32, 112, 1),
    _depthwise(144, 56, 2),
    _depthwise(192, 28, 1),
    _depthwise(192, 28, 2),
    _depthwise(576, 14, 1),
    _depthwise(576, 14, 2),
]

FAMILIES = {"mlp": MLP, "gpt2": GPT2, "resnet50": RESNET50, "mobilenetv2": MOBILENETV2}
# Rows of outer_norm: as the MLP's, and with an amount of memory that no cache holds.
OUTER_NORM = [Layer("rows of the MLP", 4096, 4096, 4096), Layer("many rows", 131072, 1024, 1024)]

PRECISIONS = {"bf16": torch.bfloat16, "tf32": torch.float32, "highest": torch.float32}


@dataclass(frozen=True)
class Group:
    """What is measured in one go, interleaved: all quantities of one layer in one precision."""

    family: str
    layer: Layer
    precision: str


# Those that come first; the others follow in groups().
LEADING = {"mlp": 1, "gpt2": 4, "resnet50": 4, "mobilenetv2": 2}


def leading_groups(families: list[str], precisions: list[str]) -> list[Group]:
    """The leading layers, in NCHW."""
    return [Group(f, layer, p) for p in precisions for f in families for layer in FAMILIES[f][: LEADING[f]]]


def groups(families: list[str], precisions: list[str]) -> list[Group]:
    """All of them in the order of their importance: a time budget drops them from the end.

    First the leading layers of every family in every precision, then the other layers; in channels-last after NCHW.
    """
    ordered = []
    for rank in range(2):
        for channels_last in (False, True):
            for precision in precisions:
                for family in families:
                    first = LEADING[family]
                    for layer in FAMILIES[family][:first] if rank == 0 else FAMILIES[family][first:]:
                        if not (channels_last and layer.linear):
                            ordered.append(Group(family, replace(layer, channels_last=channels_last), precision))
    return ordered
