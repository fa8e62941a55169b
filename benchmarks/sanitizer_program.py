"""Calls every operator on small odd shapes: the program that gpu_report.py runs under compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/sanitizer_program.py --device cuda

Small integers have exact sums, so that every result is also compared with float64.
"""

import source_tree  # noqa: F401 (first, so that the package is found)

# isort: split

import argparse
import contextlib
from collections.abc import Iterator

import torch
from gpu_shapes import Layer
from torch.nn.functional import unfold

import backpack_cuda  # noqa: F401  (loads the operators)
from backpack_cuda.ops import composite, dispatch
from backpack_cuda.ops.geometry import ConvGeometry

LAYERS = [
    Layer("short rows", 5, 33, 17),
    Layer("few positions", 4, 70, 35, positions=3),
    Layer("many positions", 3, 40, 130, positions=77),
    Layer("aligned", 3, 64, 128, positions=64),
    Layer("3x3", 3, 5, 34, size=9, kernel=3, padding=1),
    Layer("channels-last", 2, 8, 16, size=8, kernel=3, padding=1, channels_last=True),
    Layer("strided", 2, 12, 20, size=11, kernel=3, stride=2, padding=1),
    Layer("1x1", 3, 20, 9, size=7, kernel=1),
    Layer("grouped", 2, 12, 8, size=8, kernel=3, padding=1, groups=4),
    Layer("depthwise", 2, 18, 18, size=9, kernel=3, padding=1, groups=18),
]
WANTS = (31, 13, 4, 2)
# Switches of the CUDA kernels that force each way and tile once; see csrc/cuda/common/options.h.
FORCED = [(), (("way", 1), ("tile", 1)), (("way", 1), ("tile", 2)), (("way", 2),), (("way", 3),), (("t_splits", 2),)]


def operands(layer: Layer, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """(input, grad_output) of small integers."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randint(-2, 3, shape, generator=generator).to(device, dtype) for shape in layer.shapes]
    return [t.to(memory_format=torch.channels_last) for t in made] if layer.channels_last else made


def expected_results(layer: Layer, input: torch.Tensor, grad_output: torch.Tensor) -> list[torch.Tensor]:
    """All ten results in float64."""
    pair = input.cpu().double(), grad_output.cpu().double()
    if layer.linear:
        stats = composite.linear(*pair, 31, 31)
    else:
        stats = composite.conv(ConvGeometry(*layer.sizes()), *pair, 31, 31)
    return [*stats[0], *stats[1]]


@contextlib.contextmanager
def forced(switches: tuple[tuple[str, int], ...]) -> Iterator[None]:
    """Sets test switches of the CUDA kernels."""
    old = [(name, torch.ops.backpack_cuda._cuda_option(name, value)) for name, value in switches]
    try:
        yield
    finally:
        for name, value in old:
            torch.ops.backpack_cuda._cuda_option(name, value)


def check(what: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """One rounding to the type of the result, and a little for centered squares."""
    bound = 1.01 * torch.finfo(actual.dtype).eps + 1e-5
    error = (actual.cpu().double() - expected).abs().max() if expected.numel() else torch.zeros(())
    size = expected.abs().max() if expected.numel() else torch.zeros(())
    if actual.shape != expected.shape or not error <= bound * size:
        raise SystemExit(f"WRONG: {what}: error {error:.1e} at size {size:.1e}")


def run_columns(layer: Layer, input: torch.Tensor, grad_output: torch.Tensor, what: str) -> int:
    """Column statistics of three columns, with signs; the number of calls."""
    columns = torch.stack([grad_output, -grad_output.roll(1, 0), grad_output.roll(1, -1)])  # [V, N, ...]
    signs = torch.tensor([1.0, -1.0, 2.0])[:, None].expand(3, layer.samples).contiguous()
    rows = []  # of each column, weight and bias: G_vn
    for column in columns:
        results = expected_results(layer, input, column)
        rows.append((results[1], results[6]))
    arguments = input, columns, signs.to(input.device), 7, 7
    if layer.linear:
        made = dispatch.linear_column_stats(*arguments)
    else:
        made = dispatch.conv_column_stats(ConvGeometry(*layer.sizes()), *arguments)
    bias = dispatch.bias_column_stats(columns, -1 if layer.linear else 2, arguments[2], 7)
    for name, stats, index in (("weight", made[0], 0), ("bias", made[1], 1), ("bias alone", bias, 1)):
        factor = torch.stack([row[index] for row in rows])  # [V, N, *P]
        batch_diag = torch.einsum("vn,vn...->n...", signs.double(), factor.square())
        check(f"{what}, factor of the {name}", stats.factor, factor)
        check(f"{what}, batch_diag of the {name}", stats.batch_diag, batch_diag)
        check(f"{what}, diag of the {name}", stats.diag, batch_diag.sum(0))
    return 2


def run_factor(layer: Layer, input: torch.Tensor, what: str) -> int:
    """The input's Kronecker factor, without and with the homogeneous coordinate; the number of calls."""
    x, scale = input.cpu().double(), 0.5
    if layer.linear:
        rows = x.reshape(1, -1, layer.inputs)
        made = [dispatch.linear_kron_factor(input, scale, homogeneous=h)[None] for h in (False, True)]
    else:
        patches = unfold(x, layer.kernel, padding=layer.padding, stride=layer.stride)  # [N, C * k * k, T]
        rows = patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)  # [groups, N * T, D]
        geometry, positions = ConvGeometry(*layer.sizes()), (layer.output_size,) * 2
        made = [dispatch.conv_kron_factor(input, geometry, positions, scale, homogeneous=h) for h in (False, True)]
        made = [factor if layer.groups > 1 else factor[None] for factor in made]
    for factor, homogeneous in zip(made, (False, True), strict=True):
        full = torch.cat([rows, torch.ones_like(rows[..., :1])], -1) if homogeneous else rows
        check(f"{what}, factor, homogeneous={homogeneous}", factor, scale * full.mT @ full)
    return 2


def run_layer(layer: Layer, device: str, dtype: torch.dtype, tf32: bool) -> int:
    """Every set of results of one layer; the number of calls."""
    input, grad_output = operands(layer, device, dtype)
    family, what = "linear" if layer.linear else "conv", f"{layer.name}, {dtype}, tf32={tf32}"
    expected = expected_results(layer, input, grad_output)
    for want in WANTS:
        call = getattr(torch.ops.backpack_cuda, f"{family}_grad_stats")
        results = call(input, grad_output, *layer.sizes(), want, want, tf32)
        for index, (value, reference) in enumerate(zip(results, expected, strict=True)):
            if want >> index % 5 & 1:
                check(f"{what}, result {index} of want {want}", value, reference)
    weights = torch.arange(1.0, layer.samples + 1, device=device)
    call = getattr(torch.ops.backpack_cuda, f"{family}_weighted_grad")
    rows = expected[1]
    reference = torch.tensordot(weights.cpu().double(), rows, 1)
    check(f"{what}, weighted", call(input, grad_output, weights, *layer.sizes(), tf32), reference)
    if layer.linear and layer.positions == 1:
        check(f"{what}, outer_norm", torch.ops.backpack_cuda.outer_norm(input, grad_output), expected[2])
    channel_dim = -1 if layer.linear else 1
    for value, reference in zip(
        torch.ops.backpack_cuda.bias_grad_stats(grad_output, channel_dim, 31), expected[5:], strict=True
    ):
        check(f"{what}, bias", value, reference)
    calls = run_columns(layer, input, grad_output, what) + run_factor(layer, input, what)
    return len(WANTS) + 2 + calls


def main() -> None:
    """Runs everything, or a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--few", action="store_true", help="without forced ways, for slow tools")
    args = parser.parse_args()
    calls = 0
    for switches in FORCED[: 1 if args.few or args.device == "cpu" else None]:
        with forced(switches):
            for layer in LAYERS:
                for dtype, tf32 in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
                    calls += run_layer(layer, args.device, dtype, tf32)
    print(f"{calls} calls, all right")


if __name__ == "__main__":
    main()
