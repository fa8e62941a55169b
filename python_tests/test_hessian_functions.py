"""Functions by the names of their graph nodes: each known one alone, and what is refused."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, named
from hessian_oracle import (
    Apply,
    assigned,
    check_diagonals,
    dense_diagonal,
    diagonal_from_sources,
    into_zeros,
    layers_of,
    sandwich,
    sources_of,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import backpack_cuda as bp
from backpack_cuda.curvature import functions
from backpack_cuda.curvature.residuals import residual_sources

# ---------------------------------------------------------------------------------------------------------------------
# Elementwise functions
# ---------------------------------------------------------------------------------------------------------------------

SMOOTH = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus(3, 2)": lambda x: F.softplus(x, 3.0, 2.0),
    "elu": F.elu,
    "elu(2)": lambda x: F.elu(x, 2.0),
    "selu": F.selu,
    "celu": F.celu,
    "celu(0.5)": lambda x: F.celu(x, 0.5),
    "logsigmoid": F.logsigmoid,
    "hardswish": F.hardswish,
    "tanhshrink": F.tanhshrink,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "expm1": torch.expm1,
    "2^x": lambda x: 2**x,
    "2^x by tensors": lambda x: torch.full_like(x, 2.0) ** x,
    "sin": torch.sin,
    "cos": torch.cos,
    "tan": lambda x: torch.tan(x.clamp(-1, 1)),
    "sinh": torch.sinh,
    "cosh": torch.cosh,
    "atan": torch.atan,
    "asinh": torch.asinh,
    "erf": torch.erf,
    "erfc": torch.erfc,
    "x * x": lambda x: x * x,
    "x^2": lambda x: x**2,
    "x^3": lambda x: x.pow(3),
    "x^1": lambda x: x.pow(1),
    "x^(1, 2, ..)": lambda x: x.pow(torch.arange(x.shape[-1]) % 3),
    "square": torch.square,
}
POSITIVE = {  # of x > 0
    "log": torch.log,
    "log2": torch.log2,
    "log10": torch.log10,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "1 / x": lambda x: 1 / x,
    "tensor / x": lambda x: torch.arange(1.0, len(x) + 1, dtype=x.dtype)[:, None] / x,
    "tensor / x broadcast": lambda x: (torch.arange(1.0, 5, dtype=x.dtype) / x[..., None]).sum(-1),
    "x^1.5": lambda x: x**1.5,
    "x^-2": lambda x: x**-2,
    "acosh": lambda x: torch.acosh(1 + x),
    "lgamma": torch.lgamma,
}
BOUNDED = {"asin": torch.asin, "acos": torch.acos, "atanh": torch.atanh, "erfinv": torch.erfinv}  # of -1 < x < 1
IN_PLACE = {
    "sigmoid_": torch.sigmoid_,
    "tanh_": torch.tanh_,
    "silu_": lambda x: F.silu(x, inplace=True),
    "elu_": F.elu_,
    "celu_": F.celu_,
    "selu_": F.selu_,
    "hardswish_": lambda x: F.hardswish(x, inplace=True),
    "mish_": lambda x: F.mish(x, inplace=True),
    "exp_": torch.exp_,
}
ELEMENTWISE = (
    SMOOTH
    | {name: lambda x, f=f: f(F.relu(x) + 0.5) for name, f in POSITIVE.items()}
    | {name: lambda x, f=f: f(x.clamp(-0.9, 0.9)) for name, f in BOUNDED.items()}
    | {name: lambda x, f=f: f(x * 1) for name, f in IN_PLACE.items()}
)


@named("function", ELEMENTWISE)
def test_elementwise_function(function):
    """Between layers, twice, against double backward."""
    model = nn.Sequential(nn.Linear(2, 3), Apply(function), nn.Linear(3, 3), Apply(function))
    check_diagonals(model, torch.randn(3, 2))


FAR = [0.0, 1e-30, 1e-8, 0.1, 0.5, 1.0, 1.7, 2.9, 5.0, 10.0, 15.0, 19.0, 30.0, 50.0, 88.0, 300.0, 1e3, 1e5, 1e15, 1e30]


def curvature_of(function: Callable, points: list[float], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """phi'' as the module forms it, by autograd, and phi, at the given points."""
    x = torch.tensor(points).to(dtype)[:, None]
    layer = nn.Linear(1, 1).to(dtype)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    z = bp.extend(layer)(x)
    y = function(z)
    with torch.no_grad():
        (source,) = residual_sources(y, torch.ones_like(y), layers_of(y), len(x))
    _, signs = source.root.form(0, 1)
    (first,) = torch.autograd.grad(y.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    return signs.squeeze(0), second.squeeze(1), y.detach().squeeze(1)


@named("function", {n: f for n, f in SMOOTH.items() if n not in ("x * x", "x^1", "x^(1, 2, ..)", "tan", "tanhshrink")})
def test_far_points(function):
    """Right and finite where the function is, in float64 against autograd (where that is), in float32 against both."""
    points = [sign * value for value in FAR for sign in (1, -1)]
    actual, expected, values = curvature_of(function, points, torch.float64)
    finite = values.isfinite() & (values.abs() < 1e100)
    assert actual[finite].isfinite().all()
    known = finite & expected.isfinite()
    torch.testing.assert_close(actual[known], expected[known], rtol=1e-7, atol=1e-12)
    single, _, values = curvature_of(function, points, torch.float32)
    finite = values.isfinite()
    assert single.dtype == torch.float32 and single[finite].isfinite().all()
    torch.testing.assert_close(single[finite].double(), actual[finite], rtol=2e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Functions without curvature of their own
# ---------------------------------------------------------------------------------------------------------------------

INDEX = torch.tensor([1, 0])


def like(x: Tensor, *shape: int) -> Tensor:
    """Numbers of x's type that are no two alike."""
    return torch.linspace(-1.0, 1.3, torch.Size(shape).numel(), dtype=x.dtype).view(shape)


FREE = {  # of x [N, 2, 3, 4]
    "add": lambda x: x + 2 * x.flip(1) + 1.0,
    "add in place": lambda x: assigned(x, lambda c: c.add_(x).mul_(2).div_(3)),
    "sub": lambda x: 1 - x - x.flip(1),
    "rsub": lambda x: torch.rsub(x, like(x, 4)),
    "neg": lambda x: -x,
    "mul": lambda x: 2 * x * like(x, 3, 4),
    "div": lambda x: x / 3 / (like(x, 3, 4) + 5),
    "mm": lambda x: x.flatten(0, 2).mm(like(x, 4, 2)).view(len(x), -1),
    "matmul": lambda x: like(x, 3, 3) @ (x @ like(x, 4, 2)),
    "mv": lambda x: x @ like(x, 4),
    "mv of matrices": lambda x: torch.stack([m.mv(like(x, 4)) for m in x.flatten(1, 2)]),
    "dot": lambda x: torch.stack([row.flatten().dot(like(x, 24)) for row in x])[:, None],
    "bmm": lambda x: x.flatten(1, 2).bmm(like(x, len(x), 4, 5)),
    "addmm": lambda x: torch.addmm(x[:, 0, 0, :1], x.flatten(1), like(x, 24, 5)),
    "addmv": lambda x: torch.stack([torch.addmv(like(x, 6), m, like(x, 4)) for m in x.flatten(1, 2)]),
    "addbmm": lambda x: torch.stack([torch.addbmm(like(x, 3, 2), m, like(x, 2, 4, 2)) for m in x]),
    "baddbmm": lambda x: torch.baddbmm(like(x, 2), x.flatten(1, 2), like(x, len(x), 4, 2)),
    "addr": lambda x: torch.stack([torch.addr(like(x, 24, 2), m.flatten(), like(x, 2)) for m in x]),
    "addcmul": lambda x: torch.addcmul(x, x.flip(1), like(x, 4), value=0.5),
    "addcdiv": lambda x: torch.addcdiv(x, x.flip(1), like(x, 4) + 3),
    "lerp": lambda x: torch.lerp(x, 2 * x.flip(1), 0.3),
    "lerp by a tensor": lambda x: torch.lerp(x, 2 * x.flip(1), like(x, 4)),
    "linear": lambda x: F.linear(x, like(x, 5, 4), like(x, 5)),
    "linear with trained weight": lambda x: F.linear(x, like(x, 5, 4).requires_grad_(), like(x, 5).requires_grad_()),
    "einsum": lambda x: torch.einsum("nchw,hwo->nco", x, like(x, 3, 4, 2)),
    "bilinear": lambda x: F.bilinear(x, like(x, *x.shape[:3], 2), like(x, 3, 4, 2)),
    "cross": lambda x: torch.linalg.cross(x, like(x, 3, 1).expand_as(x), dim=2),
    "kron": lambda x: torch.stack([torch.kron(m.flatten(1), like(x, 2, 2)) for m in x]),
    "conv1d": lambda x: F.conv1d(x.flatten(1, 2), like(x, 2, 6, 3), like(x, 2)),
    "conv2d": lambda x: F.conv2d(x, like(x, 3, 2, 2, 2), padding=1),
    "conv3d": lambda x: F.conv3d(x[:, None], like(x, 2, 1, 2, 2, 2)),
    "conv transpose": lambda x: F.conv_transpose2d(x, like(x, 2, 3, 2, 2), stride=2),
    "sum": lambda x: torch.stack([m.sum() for m in x])[:, None] + x.sum((1, 2)),
    "mean": lambda x: torch.stack([m.mean() for m in x])[:, None] + x.mean((1, 2)),
    "nansum": lambda x: x.nansum(1),
    "cumsum": lambda x: x.cumsum(2),
    "trace": lambda x: torch.stack([m[0].trace() for m in x])[:, None],
    "diff": lambda x: x.diff(),
    "trapezoid": lambda x: torch.trapezoid(x),
    "view": lambda x: x.view(len(x), -1).view(len(x), 4, 6).reshape(len(x), 3, 8),
    "reshape": lambda x: x.transpose(1, 2).reshape(len(x), -1),
    "permute": lambda x: x.permute(0, 3, 1, 2).movedim(1, 2).swapaxes(2, 3).mT,
    "t": lambda x: torch.stack([m[0].t() for m in x]),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1).tile(2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 1).repeat_interleave(torch.tensor([1, 2, 1]), 2),
    "squeeze": lambda x: x[:, :1].squeeze().unsqueeze(1).squeeze(1).unsqueeze(1).squeeze((1,)),
    "flip": lambda x: x.flip(2),
    "roll": lambda x: x.roll(1, 2),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "unfold": lambda x: x.unfold(2, 2, 1),
    "as_strided": lambda x: (x * 1).as_strided((len(x), 3, 2), (24, 4, 2), 1),
    "F.unfold": lambda x: F.unfold(x, 2),
    "F.fold": lambda x: F.fold(x.reshape(len(x), 4, 6), (3, 4), 2),
    "diagonal": lambda x: x.diagonal(0, 2, 3),
    "diag": lambda x: torch.stack([m[0].diag() for m in x]),
    "diag_embed": lambda x: x.diag_embed(),
    "tril": lambda x: x.tril() + 2 * x.triu(1),
    "block_diag": lambda x: torch.stack([torch.block_diag(*m) for m in x]),
    "select": lambda x: x[:, 1, 2],
    "slice": lambda x: x[:, :, 1:, ::2],
    "index": lambda x: x[:, [1, 0, 1]],
    "index_select": lambda x: x.index_select(2, torch.tensor([0, 2, 2])),
    "gather": lambda x: x.gather(1, INDEX[None, :, None, None].expand(x.shape)),
    "take_along_dim": lambda x: x.take_along_dim(INDEX[None, :, None, None], 1),
    "take": lambda x: torch.stack([m.take(INDEX) for m in x]),
    "masked_select": lambda x: torch.stack([m.masked_select(like(x, 2, 3, 4) > 0) for m in x]),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 1.0).masked_fill(x < -0.5, x.new_tensor(2.0)),
    "masked_scatter": lambda x: torch.stack([m.masked_scatter(like(m, 2, 3, 4) > 0, 2 * m.flip(0)) for m in x]),
    "scatter": lambda x: like(x, *x.shape).scatter(1, INDEX[None, :, None, None].expand(x.shape), x),
    "scatter a value": lambda x: x.scatter(1, INDEX[None, :1, None, None].expand(len(x), 1, 3, 4), 1.0),
    "scatter_add": lambda x: like(x, *x.shape).scatter_add(1, INDEX[None, :, None, None].expand(x.shape), x),
    "scatter_reduce": lambda x: like(x, *x.shape).scatter_reduce(
        1, INDEX[None, :, None, None].expand(x.shape), x, "sum"
    ),
    "index_add": lambda x: x.index_add(1, INDEX, 2 * x),
    "index_copy": lambda x: x.index_copy(1, INDEX[:1], 2 * x[:, :1]),
    "index_fill": lambda x: x.index_fill(1, INDEX[:1], 1.0),
    "index_put": lambda x: x.index_put((torch.arange(len(x)), INDEX[:1]), 2 * x[:, 0]),
    "put": lambda x: torch.stack([m.put(INDEX, 2 * m.flatten()[2:4]) for m in x]),
    "mask assigned": lambda x: assigned(x, lambda c: c.__setitem__(x > 0.5, 0.0)),
    "slice assigned": lambda x: assigned(x, lambda c: c.__setitem__((slice(None), 0), 3 * x[:, 1])),
    "slices of zeros assigned": into_zeros,
    "slice scaled in place": lambda x: assigned(x, lambda c: c[:, 0].mul_(3)),
    "filled in place": lambda x: assigned(x, lambda c: c[:, 0].fill_(3.0)),
    "all filled in place": lambda x: x + assigned(x, lambda c: c.fill_(3.0)),
    "zeroed in place": lambda x: x + assigned(x, lambda c: c.zero_()),
    "copied in place": lambda x: torch.zeros_like(x).copy_(x),
    "slice_scatter": lambda x: x.slice_scatter(2 * x[:, :1], 1, 0, 1),
    "select_scatter": lambda x: x.select_scatter(2 * x[:, 0], 1, 1),
    "diagonal_scatter": lambda x: x.diagonal_scatter(2 * x.diagonal(0, 2, 3), 0, 2, 3),
    "as_strided_scatter": lambda x: torch.as_strided_scatter(x, 2 * x[:, 0, 0], (len(x), 4), (24, 1)),
    "split": lambda x: torch.cat([2 * part for part in x.split(1, 1)] + list(x.split([1, 2], 2)[0].split(1, 1)), 2),
    "chunk": lambda x: torch.stack([3 * x.chunk(2, 3)[1], x.tensor_split(2, 3)[0]], 1),
    "unsafe chunk": lambda x: x.unsafe_chunk(2, 3)[1] + x.unsafe_split_with_sizes((2, 2), 3)[0],
    "unbind": lambda x: torch.stack([2 * part for part in x.unbind(1)], 3),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), "reflect"),
    "reflect 1d": lambda x: F.pad(x[:, 0], (1, 1), "reflect"),
    "reflect 3d": lambda x: F.pad(x[:, None], (1, 1, 1, 1, 1, 1), "reflect"),
    "replicate": lambda x: F.pad(x, (1, 1, 1, 1), "replicate"),
    "replicate 1d": lambda x: F.pad(x[:, 0], (1, 1), "replicate"),
    "replicate 3d": lambda x: F.pad(x[:, None], (1, 1, 1, 1, 1, 1), "replicate"),
    "circular": lambda x: F.pad(x, (1, 1, 1, 1), "circular"),
    "contiguous": lambda x: x.contiguous(memory_format=torch.channels_last).transpose(1, 2).contiguous(),
    "to": lambda x: x.to(torch.float64, copy=True).clone(),
    "alias": lambda x: torch.ops.aten.alias(x),
    "detached sum": lambda x: x + x.detach().square() * x.detach(),
    "relu": lambda x: F.relu(x) + F.relu_(x - 0.3),
    "relu in place": lambda x: F.relu(assigned(x, lambda c: c.mul_(2)), inplace=True),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "prelu": lambda x: F.prelu(x, like(x, 2)),
    "rrelu": lambda x: F.rrelu(x),
    "rrelu in train mode": lambda x: repeatable(F.rrelu, x, training=True),
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5) + F.relu6(x),
    "shrink": lambda x: F.hardshrink(x, 0.3) + F.softshrink(x, 0.2),
    "threshold": lambda x: F.threshold(x, 0.1, 2.0),
    "abs": lambda x: x.abs(),
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp_min(0.1) + x.clamp_max(0.2) + x.clamp(like(x, 4), like(x, 4) + 1),
    "maximum": lambda x: torch.maximum(x, x.flip(1)) + torch.minimum(x, 2 * x.flip(1)) + x.clamp_min(like(x, 4)),
    "fmax": lambda x: torch.fmax(x, x.flip(1)) + torch.fmin(x, 2 * x.flip(1)),
    "max": lambda x: x.amax(1) + x.max(1)[0] + 2 * x.amin(1) + x.min(1)[0] + x.aminmax(dim=1)[0],
    "max of all": lambda x: torch.stack([m.max() + m.min() + m.median() + m.nanmedian() for m in x])[:, None],
    "sort": lambda x: x.sort(3)[0] + x.topk(4, 3)[0] + x.kthvalue(2, 3)[0][..., None] + x.median(3)[0][..., None],
    "mode": lambda x: x.mode(3)[0] + x.nanmedian(3)[0],
    "quantile": lambda x: x.quantile(0.3, 3),
    "cummax": lambda x: x.cummax(3)[0] + x.cummin(3)[0],
    "where": lambda x: torch.where(x > 0, 2 * x, x.flip(1)),
    "steps": lambda x: x * x.sign() + x * (3 * x).floor() + x * x.ceil() + x * (3 * x).round() + x * (2 * x).trunc(),
    "rounded quotients": lambda x: x + torch.div(like(x, 4), x, rounding_mode="floor").clamp(-3, 3),
    "remainder": lambda x: x % 0.7 + torch.fmod(x, 0.3) + x.frac() + x.remainder(like(x, 4).abs() + 1),
    "max_pool": lambda x: F.max_pool2d(x, 2, 1) + F.max_pool3d(x[:, None], (1, 2, 2), 1)[:, 0],
    "max_pool1d": lambda x: F.max_pool1d(x[:, 0], 2),
    "adaptive_max_pool": lambda x: F.adaptive_max_pool2d(x, 2) + F.adaptive_max_pool3d(x[:, None], (2, 2, 2))[:, 0],
    "adaptive_max_pool1d": lambda x: F.adaptive_max_pool1d(x[:, 0], 3),
    "fractional_max_pool": lambda x: F.fractional_max_pool2d(
        x, 2, output_size=2, _random_samples=torch.full((len(x), 2, 2), 0.4, dtype=x.dtype)
    ),
    "fractional_max_pool3d": lambda x: F.fractional_max_pool3d(
        x[:, None], (1, 1, 2), output_size=(1, 2, 2), _random_samples=torch.full((len(x), 1, 3), 0.4, dtype=x.dtype)
    ),
    "max_unpool": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2, output_size=(3, 4)),
    "max_unpool3d": lambda x: F.max_unpool3d(*F.max_pool3d(x[:, None], (1, 1, 2), return_indices=True), (1, 1, 2)),
    "avg_pool": lambda x: F.avg_pool2d(x, 2, 1) + F.avg_pool3d(x[:, None], (1, 2, 2), 1)[:, 0],
    "avg_pool1d": lambda x: F.avg_pool1d(x[:, 0], 2),
    "adaptive_avg_pool": lambda x: F.adaptive_avg_pool2d(x, 2) + F.adaptive_avg_pool3d(x[:, None], (2, 2, 2))[:, 0],
    "adaptive_avg_pool1d": lambda x: F.adaptive_avg_pool1d(x[:, 0], 3),
    "nearest": lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "nearest 1d": lambda x: F.interpolate(x[:, 0], 5) + F.interpolate(x[:, 0], 5, mode="nearest-exact"),
    "nearest 3d": lambda x: F.interpolate(x[:, None], 3) + F.interpolate(x[:, None], 3, mode="nearest-exact"),
    "linear 1d": lambda x: F.interpolate(x[:, 0], 6, mode="linear"),
    "bilinear 2d": lambda x: F.interpolate(x, 4, mode="bilinear") + F.interpolate(x, 4, mode="bicubic"),
    "antialias": lambda x: (
        F.interpolate(x, 2, mode="bilinear", antialias=True) + F.interpolate(x, 2, mode="bicubic", antialias=True)
    ),
    "trilinear": lambda x: F.interpolate(x[:, None], 3, mode="trilinear"),
    "area": lambda x: F.interpolate(x, 2, mode="area"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.reshape(len(x), 8, 3, 1), 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x.reshape(len(x), 1, 4, 6), 2),
    "channel_shuffle": lambda x: F.channel_shuffle(x.reshape(len(x), 4, 3, 2), 2),
    "grid_sample": lambda x: F.grid_sample(x, like(x, len(x), 3, 3, 2), align_corners=False),
    "grid_sample 3d": lambda x: F.grid_sample(x[:, None], like(x, len(x), 2, 2, 2, 3), align_corners=False),
    "affine_grid": lambda x: F.affine_grid(x[:, 0, :2, :3], (len(x), 1, 2, 2), align_corners=False),
    "dropout": lambda x: repeatable(F.dropout, x, 0.5) + repeatable(F.dropout2d, x, 0.5),
    "alpha_dropout": lambda x: repeatable(F.alpha_dropout, x, 0.5, True),
    "native dropout": lambda x: repeatable(torch.native_dropout, x, 0.5, True)[0],
    "batch_norm": lambda x: F.batch_norm(x, like(x, 2), like(x, 2) + 2, like(x, 2), like(x, 2)),
    "embedding": lambda x: torch.stack([F.embedding(INDEX, m.flatten(0, 1)) for m in x]),
    "fft": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.complex(like(x, 3), like(x, 3)), 4),
    "complex fft": lambda x: torch.view_as_real(torch.fft.fft2(torch.complex(x, 2 * x)).conj().resolve_conj()),
    "real and imaginary part": lambda x: (
        torch.fft.ifft(x).real + torch.view_as_complex(torch.stack([x, 2 * x], -1)).imag
    ),
}


def repeatable(function: Callable, *args, **kwargs):
    """The same random draws at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return function(*args, **kwargs)


@named("function", FREE)
def test_free_function(function):
    """Linear and piecewise linear functions behind an elementwise one."""
    check_diagonals(sandwich(lambda x: function(x).flatten(1)), torch.randn(2, 1))


# Functions that torch does not differentiate twice, or to NaN, as others that it does.
EQUIVALENT = {
    "0^x": (lambda x: 0 ** x.abs() + x**2, torch.square),
    "hardsigmoid": (F.hardsigmoid, lambda x: (x / 6 + 0.5).clamp(0, 1)),
    "embedding_bag": (
        lambda x: torch.stack([F.embedding_bag(INDEX[None], m.flatten(0, 1), mode="sum")[0] for m in x]),
        lambda x: x.flatten(1, 2)[:, :2].sum(1),
    ),
    "embedding_bag with weights": (
        lambda x: torch.stack(
            [F.embedding_bag(INDEX[None], m.flatten(0, 1), mode="sum", per_sample_weights=like(x, 1, 2))[0] for m in x]
        ),
        lambda x: -1.0 * x[:, 0, 1] + 1.3 * x[:, 0, 0],
    ),
}


@named("function, equivalent", EQUIVALENT)
def test_function_without_second_derivative(function, equivalent):
    model, x = sandwich(function).double(), torch.randn(2, 1, dtype=torch.float64)
    twin = copy.deepcopy(model)
    twin[3].function = equivalent
    actual = diagonal_from_sources(bp.extend(model), lambda f: f.square().sum(), x)
    assert_close("weight", actual[0], dense_diagonal(twin, lambda f: f.square().sum(), x)[0], 1e-7)


def function_names(output: Tensor) -> set[str]:
    found, seen, stack = set(), {None}, [output.grad_fn]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            found.add(functions.function_name(node.name()))
            stack.extend(operand for operand, _ in node.next_functions)
    return found


def test_every_known_function_is_tested():
    """But those of CUDA and of other versions of torch."""
    found = set()
    x = torch.linspace(-0.9, 0.9, 48, dtype=torch.float64).view(2, 2, 3, 4).requires_grad_()
    for function in [*FREE.values(), *(function for function, _ in EQUIVALENT.values())]:
        found |= function_names(function(x * 1))
    for function in ELEMENTWISE.values():
        found |= function_names(function(x[:, 0, 0] * 1))
    known = functions.LINEAR | functions.STEPS | functions.BATCH_NORMS
    known = known.union(functions.LINEAR_IF, functions.LINEAR_BUT_IN, functions.PRODUCTS, functions.ELEMENTWISE)
    missing = {"NativeLayerNorm", "NativeGroupNorm"}  # in test_model
    missing |= {"ReshapeAlias", "UnsafeSplitWithSizes", "CudnnBatchNorm", "MiopenBatchNorm", "Linear"}
    assert sorted(known - found - missing) == []


# ---------------------------------------------------------------------------------------------------------------------
# Functions that are refused
# ---------------------------------------------------------------------------------------------------------------------


class Sigmoid(torch.autograd.Function):
    """Not what its name says."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad_output):
        return 2 * ctx.saved_tensors[0] * grad_output


REFUSED = {  # of x [N, 2, 3, 4]: a word of the message, the function
    "layer_norm": ("native_layer_norm", lambda x: F.layer_norm(x, (4,))),
    "group_norm": ("native_group_norm", lambda x: F.group_norm(x, 1)),
    "instance_norm": ("training mode", lambda x: F.instance_norm(x)),
    "rms_norm": ("mul multiplies", lambda x: F.rms_norm(x, (4,))),
    "batch_norm in training mode": ("training mode", lambda x: F.batch_norm(x, None, None, training=True)),
    "local_response_norm": ("div multiplies", lambda x: F.local_response_norm(x, 2)),
    "normalize": ("linalg_vector_norm", lambda x: F.normalize(x)),
    "softmax": ("softmax", lambda x: x.softmax(1)),
    "log_softmax": ("log_softmax", lambda x: x.log_softmax(1)),
    "logsumexp": ("logsumexp", lambda x: x.logsumexp(1)),
    "glu": ("glu", lambda x: F.glu(x)),
    "attention": ("scaled_dot_product", lambda x: F.scaled_dot_product_attention(x, x, x)),
    "product": ("mul multiplies .* Linear.weight", lambda x: x * x.flip(1)),
    "product in place": ("in place", lambda x: assigned(x, lambda c: c[:, 0].mul_(x[:, 1]))),
    "gate": ("mul multiplies", lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True))),
    "quotient": ("div multiplies", lambda x: x / (1 + x.abs())),
    "bmm": ("bmm multiplies", lambda x: x @ x.mT),
    "einsum": ("bmm multiplies|mul multiplies", lambda x: torch.einsum("nchw,nchv->nhv", x, x)),
    "mv": ("mv multiplies", lambda x: torch.stack([m[0] @ m[1, 0] for m in x])),
    "bilinear": ("trilinear multiplies", lambda x: F.bilinear(x, x.flip(1), like(x, 3, 4, 4))),
    "convolution by a varying kernel": ("convolution multiplies", lambda x: F.conv2d(x, x[:, :, :2, :2])),
    "prelu with varying weight": ("prelu", lambda x: F.prelu(x, x[0, :, 0, 0])),
    "lerp by a varying weight": ("lerp", lambda x: torch.lerp(like(x, 4), like(x, 4) + 1, x)),
    "addcdiv by a varying divisor": ("addcdiv", lambda x: torch.addcdiv(x, like(x, 4), x + 5)),
    "varying grid": (
        "grid_sampler2_d",
        lambda x: F.grid_sample(like(x, len(x), 2, 3, 4), x[..., :2], align_corners=False),
    ),
    "prod": ("prod", lambda x: x.prod(1)),
    "scatter_reduce by prod": (
        "scatter_reduce",
        lambda x: (2 * x).scatter_reduce(1, INDEX[None, :, None, None].expand(x.shape), x, "prod"),
    ),
    "cumprod": ("cumprod", lambda x: x.cumprod(1)),
    "var": ("var", lambda x: x.var(1)),
    "std": ("std", lambda x: x.std(1)),
    "norm": ("linalg_vector_norm", lambda x: x.norm(dim=1)),
    "cdist": ("cdist", lambda x: torch.cdist(x, like(x, 2, 4))),
    "hypot": ("hypot", lambda x: torch.hypot(x, x.flip(1))),
    "atan2": ("atan2", lambda x: torch.atan2(x, 2 * x)),
    "logit": ("logit", lambda x: x.logit(0.1)),
    "softmin": ("softmax", lambda x: F.softmin(x, 1)),
    "gumbel_softmax": ("softmax", lambda x: F.gumbel_softmax(x)),
    "linalg.solve": ("linalg_solve", lambda x: torch.linalg.solve(x[..., :3] + 5 * torch.eye(3), x)),
    "modulus of complex numbers": ("abs", lambda x: torch.fft.fft(x).abs()),
    "angle": ("angle", lambda x: torch.fft.fft(x).angle()),
    "complex exponential": ("exp", lambda x: torch.fft.fft(x).exp().real),
    "elementwise in place on a view": ("in place", lambda x: assigned(x, lambda c: c[:, 0].sigmoid_())),
    "user's function": ("Sigmoid, of which nothing is known", lambda x: Sigmoid.apply(x)),
    "reentrant checkpoint": ("use_reentrant=False", lambda x: checkpoint(torch.sigmoid, x, use_reentrant=True)),
}


@named("word, function", REFUSED)
def test_refused_function(word, function):
    """An unknown function of what depends on a parameter is an error that names it."""
    model = bp.extend(sandwich(lambda x: function(x).flatten(1)))
    with pytest.raises(NotImplementedError, match=word):
        sources_of(model, lambda f: f.square().sum(), torch.randn(2, 1))


@named("word, function", {n: f for n, f in REFUSED.items() if "checkpoint" not in n and n != "gumbel_softmax"})
def test_refused_function_below_the_layers(word, function):
    """Before the first layer, and without a gradient, anything goes."""
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 2, 3, 4)
    x = function(x.requires_grad_()).flatten(1)
    model = nn.Sequential(nn.Linear(x.shape[1], 2), Apply(torch.tanh), nn.Linear(2, 2)).double()
    actual = diagonal_from_sources(bp.extend(copy.deepcopy(model)), lambda f: f.square().sum(), x)
    expected = dense_diagonal(model, lambda f: f.square().sum(), x)
    for a, e in zip(actual, expected, strict=True):
        assert_close("diagonal", a, e, 1e-10)


def test_reentrant_checkpoint_below_the_layers():
    """It may hide layers, so that it is refused wherever it is."""
    hidden = bp.extend(nn.Linear(3, 3))
    model = nn.Sequential(Apply(lambda x: checkpoint(hidden, x, use_reentrant=True)), bp.extend(nn.Linear(3, 3)))
    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        sources_of(model, lambda f: f.square().sum(), torch.randn(2, 3, requires_grad=True))
