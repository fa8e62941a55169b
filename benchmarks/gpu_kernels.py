"""Times the operators on layers of gpu_shapes.py, beside PyTorch's weight gradient and the same of torch calls.

How: every round runs all cells of a group once, in random order, and the host waits for the GPU only at its end. Before
each cell 512 MB are overwritten, so that no operand lies in the L2 cache; the launches of short cells are queued
meanwhile. Times are those between two events on the stream, medians over the rounds.
"""

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from gpu_shapes import OUTER_NORM, PRECISIONS, Group, Layer
from measure import summary
from torch import Tensor
from torch.nn.functional import unfold

from backpack_cuda.ops import library
from backpack_cuda.ops.geometry import ConvGeometry

GRAD, BATCH_GRAD, BATCH_L2, SQUARED, CENTERED = 1, 2, 4, 8, 16
NAMES = {GRAD: "grad", BATCH_GRAD: "batch_grad", BATCH_L2: "batch_l2", SQUARED: "squared", CENTERED: "centered"}
WANTS = {
    "grad": GRAD,
    "grad + l2": GRAD | BATCH_L2,
    "grad + squared": GRAD | SQUARED,
    "grad + l2 + squared": GRAD | BATCH_L2 | SQUARED,
    "grad + centered": GRAD | CENTERED,
    "grad + batch_grad": GRAD | BATCH_GRAD,
    "l2": BATCH_L2,
}
WEIGHTED = "weighted grad"
HOPPER = "grad + l2 + squared, wgmma"  # by the path of sm_90a, which only the switch "way" chooses
HOPPER_WAY = 4
# Largest difference from the composed result, relative in norm: the rounding of both.
TOLERANCE = {"highest": 1e-4, "tf32": 5e-3, "bf16": 3e-2}
FLUSH_BYTES = 512 << 20
LARGEST_RESULT = 6 << 30  # bytes: larger per-sample gradients are not measured
MIB = 1 << 20


def quantities(precision: str) -> tuple[str, ...]:
    """What is measured in this precision."""
    return (*WANTS, WEIGHTED, *((HOPPER,) if precision == "bf16" else ()))


def wanted(quantity: str) -> int:
    """The statistics that a quantity consists of."""
    return WANTS.get(quantity, GRAD if quantity == WEIGHTED else WANTS["grad + l2 + squared"])


class Device:
    """Clock, cache and memory of the machine under test."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cuda = name == "cuda"
        self.hopper = self.cuda and torch.cuda.get_device_capability() == (9, 0)
        # On a CPU, where nothing that is measured counts, nothing is overwritten.
        self.scratch = torch.empty(FLUSH_BYTES if self.cuda else 1, dtype=torch.uint8, device=name)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def round_seconds(self, steps: dict[Any, Callable[[], Any]], order: random.Random) -> dict[Any, float]:
        """How long each of `steps` takes, run once each in random order."""
        marks = {}
        for name in order.sample(list(steps), len(steps)):
            self.scratch.zero_()
            if self.cuda:
                marks[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                marks[name][0].record()
                steps[name]()
                marks[name][1].record()
            else:
                begin = time.perf_counter()
                steps[name]()
                marks[name] = time.perf_counter() - begin
        self.synchronize()
        if not self.cuda:
            return marks
        return {name: begin.elapsed_time(end) / 1e3 for name, (begin, end) in marks.items()}

    def seconds(self, step: Callable[[], Any], rounds: int = 7) -> float:
        """Median time of one step."""
        step()
        order = random.Random(0)
        return statistics.median(self.round_seconds({"": step}, order)[""] for _ in range(rounds))

    def extra_bytes(self, step: Callable[[], Any]) -> int | None:
        """Peak memory during a step beyond its results; None where it is not known."""
        if not self.cuda:
            return None
        self.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = step()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(t.nbytes for t in tensors(results))


def tensors(results: Any) -> list[Tensor]:
    """The tensors of one call's results."""
    if isinstance(results, Tensor):
        return [results]
    return list(results.values() if isinstance(results, dict) else results)


@contextlib.contextmanager
def precision_mode(precision: str):
    """PyTorch's switches for one of PRECISIONS; both for matrix products and for convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if precision == "highest" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def cuda_option(name: str, value: int):
    """Forces a choice of the CUDA kernels."""
    before = torch.ops.backpack_cuda._cuda_option(name, value)
    try:
        yield
    finally:
        torch.ops.backpack_cuda._cuda_option(name, before)


# --- The three ways to a result -------------------------------------------------------------------------------


def library_gradient(layer: Layer, input: Tensor, grad_output: Tensor) -> Tensor:
    """The weight gradient alone by cuBLAS or cuDNN (oneDNN on a CPU)."""
    if layer.linear:
        return library.linear_weight_grad(input, grad_output)
    return library.conv_weight_grad(ConvGeometry(*layer.sizes()), input, grad_output)


def operator(layer: Layer, quantity: str, input: Tensor, grad_output: Tensor, weights: Tensor, tf32: bool):
    """This package's operator: the five statistics of the weight, or the weighted gradient."""
    family = "linear" if layer.linear else "conv"
    if quantity == WEIGHTED:
        call = getattr(torch.ops.backpack_cuda, f"{family}_weighted_grad")
        return call(input, grad_output, weights, *layer.sizes(), tf32)
    call = getattr(torch.ops.backpack_cuda, f"{family}_grad_stats")
    if quantity == HOPPER:
        with cuda_option("way", HOPPER_WAY):
            return call(input, grad_output, *layer.sizes(), wanted(quantity), 0, tf32)[:5]
    return call(input, grad_output, *layer.sizes(), wanted(quantity), 0, tf32)[:5]


def per_sample(layer: Layer, input: Tensor, grad_output: Tensor) -> Tensor:
    """G_n [N, *weight] by one batched product; of convolutions, with an im2col matrix where the kernel needs one."""
    if layer.linear:
        n, t = layer.samples, layer.positions
        return grad_output.reshape(n, t, -1).mT @ input.reshape(n, t, -1)
    n, g = len(input), layer.groups
    b = grad_output.reshape(n, g, layer.outputs // g, -1)
    if layer.kernel == 1:
        a = input[:, :, :: layer.stride, :: layer.stride]
    else:
        a = unfold(input, layer.kernel, padding=layer.padding, stride=layer.stride)
    a = a.reshape(n, g, layer.weight_shape[1] * layer.kernel**2, -1)
    return (b @ a.mT).reshape(n, *layer.weight_shape)


def composed(layer: Layer, quantity: str, input: Tensor, grad_output: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The same results from torch calls, as an expert would write them: G_n are formed only where T > 1."""
    if quantity == WEIGHTED:
        scaled = (grad_output * weights.view(-1, *(1,) * (grad_output.dim() - 1))).to(grad_output.dtype)
        return {WEIGHTED: library_gradient(layer, input, scaled)}
    want = wanted(quantity)
    if want == GRAD:
        return {"grad": library_gradient(layer, input, grad_output)}
    made: dict[str, Tensor] = {}
    if layer.linear and layer.positions == 1 and not want & BATCH_GRAD:
        a, b = input.float(), grad_output.float()
        if want & (GRAD | CENTERED):
            made["grad"] = library_gradient(layer, input, grad_output)
        if want & BATCH_L2:
            made["batch_l2"] = a.square().sum(1) * b.square().sum(1)
        if want & (SQUARED | CENTERED):
            squared = b.square().T @ a.square()
            made["squared" if want & SQUARED else "centered"] = (
                squared if want & SQUARED else squared - made["grad"].float().square() / layer.samples
            )
        return made
    if (
        layer.linear
        and want == BATCH_L2
        and layer.positions * (layer.inputs + layer.outputs) < prod(layer.weight_shape)
    ):
        gram = (input @ input.mT).float() * (grad_output @ grad_output.mT).float()
        return {"batch_l2": gram.sum((1, 2))}
    rows = per_sample(layer, input, grad_output)
    if want & GRAD:
        made["grad"] = rows.sum(0)
    if want & BATCH_GRAD:
        made["batch_grad"] = rows
    if want & BATCH_L2:
        made["batch_l2"] = torch.linalg.vector_norm(rows.flatten(1), dim=1, dtype=torch.float32).square()
    if want & SQUARED:
        made["squared"] = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).square()
    if want & CENTERED:
        made["centered"] = rows.float().var(0, correction=0) * layer.samples
    return made


def by_name(quantity: str, results: Any) -> dict[str, Tensor]:
    """The operator's results under the names of `composed`."""
    if quantity == WEIGHTED:
        return {WEIGHTED: results}
    want = wanted(quantity)
    return {name: results[bit.bit_length() - 1] for bit, name in NAMES.items() if want & bit}


def difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ||actual - expected|| / ||expected||; NaN counts as infinite."""
    worst = 0.0
    for name, reference in actual.items():
        other = expected[name].float()
        norm = torch.linalg.vector_norm
        error = (norm(reference.float() - other) / norm(other).clamp(min=1e-30)).item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


# --- Measuring ------------------------------------------------------------------------------------------------


@dataclass
class Ceilings:
    """What the machine can do, measured in the same run."""

    copy: float  # bytes per second, read plus written
    products: dict[str, float] = field(default_factory=dict)  # precision -> flop/s of a large matrix product

    def of(self, precision: str) -> float:
        """The rate that a product in this precision is compared with."""
        # "highest" sums three products of TF32 terms on the tensor cores.
        return self.products["tf32"] / 3 if precision == "highest" else self.products[precision]


def measure_ceilings(device: Device) -> Ceilings:
    """Copy bandwidth and matrix products of random data."""
    count = 1 << 30 if device.cuda else 1 << 20  # bytes
    source, target = (torch.empty(count, dtype=torch.uint8, device=device.name) for _ in range(2))
    ceilings = Ceilings(copy=2 * count / device.seconds(lambda t=target, s=source: t.copy_(s)))
    del source, target
    size = 8192 if device.cuda else 128
    for precision, dtype in PRECISIONS.items():
        a, b = (torch.randn(size, size, device=device.name).to(dtype) for _ in range(2))
        with precision_mode(precision):
            ceilings.products[precision] = 2.0 * size**3 / device.seconds(lambda a=a, b=b: a @ b)
    return ceilings


def result_bytes(layer: Layer, want: int, element: int) -> int:
    """Bytes of the results."""
    weight = prod(layer.weight_shape)
    sizes = {
        GRAD: weight * element,
        BATCH_GRAD: layer.samples * weight * element,
        BATCH_L2: 4 * layer.samples,
        SQUARED: 4 * weight,
        CENTERED: 4 * weight,
    }
    return sum(size for bit, size in sizes.items() if want & bit)


def work(layer: Layer, quantity: str, element: int) -> tuple[float, int]:
    """(flops, bytes) that the results need at least: every operand read once, every result written once."""
    want = wanted(quantity)
    flops = layer.flops()
    if layer.num_positions == 1 and layer.linear:
        products = bool(want & (GRAD | CENTERED)) + bool(want & (SQUARED | CENTERED))
        flops = products * layer.flops() + (2.0 * layer.operand_elements() if want & BATCH_L2 else 0.0)
    return flops, layer.operand_elements() * element + result_bytes(layer, want, element)


def rates(seconds: float, flops: float, num_bytes: int, precision: str, ceilings: Ceilings) -> dict[str, float]:
    """Achieved rates; `share`: the time that the measured ceilings allow at least, over the time taken."""
    floor = max(flops / ceilings.of(precision), num_bytes / ceilings.copy)
    return {
        "tflops": flops / seconds / 1e12,
        "gbytes": num_bytes / seconds / 1e9,
        "share": floor / seconds,
    }


Step = Callable[[], Any]


def measure_cells(
    library: Step, pairs: dict[str, tuple[Step, Step]], precision: str, device: Device, rounds: int, seed: int = 0
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Time, memory and agreement of pairs (step of this package, the same of torch calls) that return tensors by name.

    Returns: the figures of `library`, to whose time all ratios are; and those of each pair by its name
    """
    steps: dict[tuple[str, str], Step] = {("library", ""): library}
    cells: dict[str, dict[str, Any]] = {name: {} for name in pairs}
    with precision_mode(precision):
        library()
        extra = {("library", ""): device.extra_bytes(library)}
        for name, pair in pairs.items():
            made = {}
            for kind, step in zip(("own", "composed"), pair, strict=True):
                try:
                    made[kind] = step()
                    device.synchronize()
                    extra[kind, name] = device.extra_bytes(step)
                    steps[kind, name] = step
                except (RuntimeError, NotImplementedError) as error:  # torch.OutOfMemoryError is a RuntimeError
                    field = "error" if kind == "own" else "composed_error"
                    cells[name][field] = str(error).splitlines()[0][:200]
            if len(made) == 2:
                cells[name]["difference"] = difference(made["own"], made["composed"])
                cells[name]["right"] = cells[name]["difference"] <= TOLERANCE[precision]
            del made
        order = random.Random(seed)
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
        device.round_seconds(steps, order)  # warm-up
        gc.disable()
        for _ in range(rounds):
            for key, value in device.round_seconds(steps, order).items():
                seconds[key].append(value)
        gc.enable()
    plain = seconds.pop(("library", ""))
    for (kind, name), own in seconds.items():
        figures = summary(own, plain) | {"extra_bytes": extra[kind, name]}
        cells[name] |= figures if kind == "own" else {"composed": figures}
    return {"extra_bytes": extra["library", ""]} | summary(plain, plain), cells


def measure_group(group: Group, device: Device, ceilings: Ceilings, rounds: int, seed: int = 0) -> dict[str, Any]:
    """All quantities of one layer in one precision, each against the library's gradient and the composed result."""
    layer, precision = group.layer, group.precision
    dtype = PRECISIONS[precision]
    input, grad_output = layer.operands(device.name, dtype, seed)
    operands = input, grad_output, torch.rand(layer.samples, device=device.name)
    cells: dict[str, dict[str, Any]] = {}
    pairs: dict[str, tuple[Step, Step]] = {}
    for quantity in quantities(precision):
        cells[quantity] = {}
        if quantity == HOPPER and not (layer.linear and device.hopper):
            continue
        if result_bytes(layer, wanted(quantity), dtype.itemsize) > LARGEST_RESULT:
            cells[quantity]["skipped"] = f"the result would take more than {LARGEST_RESULT >> 30} GiB"
            continue
        pairs[quantity] = (
            lambda q=quantity: by_name(q, operator(layer, q, *operands, precision == "tf32")),
            lambda q=quantity: composed(layer, q, *operands),
        )
    library, measured = measure_cells(
        lambda: library_gradient(layer, input, grad_output), pairs, precision, device, rounds, seed
    )
    library |= rates(library["milliseconds"] / 1e3, *work(layer, "grad", dtype.itemsize), precision, ceilings)
    for quantity, cell in measured.items():
        if "milliseconds" in cell:
            need = work(layer, quantity, dtype.itemsize)
            cell |= rates(cell["milliseconds"] / 1e3, *need, precision, ceilings)
        cells[quantity] = cell
    return {
        "family": group.family,
        "layer": layer.text(),
        "positions": layer.num_positions,
        "precision": precision,
        "library": library,
        "cells": cells,
    }


def measure_outer_norm(device: Device, ceilings: Ceilings, small: bool) -> list[dict[str, Any]]:
    """Rows of outer_norm, whose limit is one read of its operands."""
    rows = []
    for layer in OUTER_NORM:
        layer = layer.small() if small else layer
        for name, dtype in {"float32": torch.float32, "bf16": torch.bfloat16}.items():
            input, grad_output = layer.operands(device.name, dtype)
            seconds = device.seconds(lambda a=input, b=grad_output: torch.ops.backpack_cuda.outer_norm(a, b), 15)
            extra = device.extra_bytes(lambda a=input, b=grad_output: torch.ops.backpack_cuda.outer_norm(a, b))
            expected = input.double().square().sum(1) * grad_output.double().square().sum(1)
            made = torch.ops.backpack_cuda.outer_norm(input, grad_output)
            num_bytes = layer.operand_elements() * dtype.itemsize + 4 * layer.samples
            rows.append(
                {
                    "layer": f"{layer.name}: [{layer.samples}, {layer.inputs}] and [{layer.samples}, {layer.outputs}]",
                    "dtype": name,
                    "milliseconds": 1e3 * seconds,
                    "gbytes": num_bytes / seconds / 1e9,
                    "share": num_bytes / seconds / ceilings.copy,
                    "extra_bytes": extra,
                    "difference": difference({"": made.double()}, {"": expected}),
                }
            )
    return rows
