"""Drop-in layers: torch's, with the same constructors, parameters, state_dict and results, prepared for quantities."""

from torch import Tensor, nn

from backpack_cuda.rules.conv import conv_forward, conv_transpose_forward
from backpack_cuda.rules.embedding import embedding_forward
from backpack_cuda.rules.linear import linear_forward

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Embedding", "Linear"]


class Linear(nn.Linear):
    """torch.nn.Linear whose backward also forms what `with backpack(...)` asks for."""

    def forward(self, input: Tensor) -> Tensor:
        return linear_forward(self, super().forward, input)


class Conv1d(nn.Conv1d):
    """torch.nn.Conv1d whose backward also forms what `with backpack(...)` asks for."""

    def forward(self, input: Tensor) -> Tensor:
        return conv_forward(self, super().forward, input)


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d whose backward also forms what `with backpack(...)` asks for."""

    def forward(self, input: Tensor) -> Tensor:
        return conv_forward(self, super().forward, input)


class Conv3d(nn.Conv3d):
    """torch.nn.Conv3d whose backward also forms what `with backpack(...)` asks for."""

    def forward(self, input: Tensor) -> Tensor:
        return conv_forward(self, super().forward, input)


class ConvTranspose1d(nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d whose backward also forms what `with backpack(...)` asks for."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return conv_transpose_forward(self, super().forward, input, output_size)


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d whose backward also forms what `with backpack(...)` asks for."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return conv_transpose_forward(self, super().forward, input, output_size)


class ConvTranspose3d(nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d whose backward also forms what `with backpack(...)` asks for."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return conv_transpose_forward(self, super().forward, input, output_size)


class Embedding(nn.Embedding):
    """torch.nn.Embedding whose backward also forms what `with backpack(...)` asks for."""

    def forward(self, input: Tensor) -> Tensor:
        return embedding_forward(self, super().forward, input)
