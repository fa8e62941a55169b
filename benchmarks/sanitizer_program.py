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

import backpack_cuda  # noqa: F401  (loads the operators)
from backpack_cuda.ops import composite
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
    return len(WANTS) + 2


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
