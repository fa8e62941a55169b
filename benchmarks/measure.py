"""Time, peak memory and correctness of the cells (library, quantity) of one model.

`time_model` and `measure_memory` change the state of their process: call them through `in_new_process`.
"""

import ctypes
import gc
import multiprocessing
import random
import re
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from correctness import compare, reference_results
from models import EVERY_CASE
from peers import EVERY_LIBRARY, QUANTITIES, Peer
from torch import Tensor

M_MMAP_THRESHOLD = -3  # from malloc.h


@dataclass(frozen=True)
class Options:
    """How to measure."""

    rounds: int = 30  # times each cell is timed
    slow_rounds: int = 2  # the same for cells that take more than `slow_ratio` plain steps
    slow_ratio: float = 30.0
    once_seconds: float = 10.0  # a cell whose first step takes longer is timed in one more step only
    warm_steps: int = 1  # untimed steps of the same cell before each timed one, as in a training loop
    threads: int = 2
    device: str = "cpu"
    seed: int = 0  # of the order of the cells
    precision: str = "highest"  # of float32 matrix products, as torch.set_float32_matmul_precision has it
    memory: bool = False  # time_model also measures the peak memory of each step (on a GPU)


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)` in a fresh process, so that nothing measured before has left its traces.

    The process is forked from a server that has imported torch but never computed anything.

    Raises:
        concurrent.futures.process.BrokenProcessPool: if the process died, say for lack of memory.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "backpack_cuda", "backpack", "opacus.grad_sample"])
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def prepare_process(options: Options) -> None:
    """Settings of a measuring process."""
    gc.freeze()  # collections need not look at everything that was imported
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.precision)
    if options.device == "cuda":
        torch.backends.cudnn.allow_tf32 = options.precision != "highest"
    warnings.simplefilter("ignore")  # BackPACK and Opacus warn of their hooks, and of layers without a rule


# --- time --------------------------------------------------------------------------------------------------


def seconds_of(step: Callable[[], None], device: str) -> float:
    """How long `step` takes; on a GPU between two events on its stream."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def summary(seconds: list[float], plain_seconds: list[float]) -> dict[str, Any]:
    """Median time, ratio of the medians, and quartiles of the ratios within the rounds.

    A slow cell takes part in the first rounds only.
    """
    ratio = statistics.median(seconds) / statistics.median(plain_seconds)
    ratios = [own / plain for own, plain in zip(seconds, plain_seconds, strict=False)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * [ratio]
    return {
        "milliseconds": 1e3 * statistics.median(seconds),
        "ratio": ratio,
        "quartiles": [quartiles[0], quartiles[2]],
        "rounds": len(seconds),
    }


def refusal(peer: Peer, quantity: str, inputs: Tensor, labels: Tensor) -> str | None:
    """Why `peer` does not have this quantity of its model, in one line; None where it has. Tried on two samples."""
    try:
        peer.prepare(quantity, inputs[:2], labels[:2])
        peer.step(quantity, inputs[:2], labels[:2])
    except (NotImplementedError, AssertionError, ValueError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        peer.drop()
    return None


def time_model(model_name: str, cells: list[tuple[str, str]], options: Options) -> dict[str, Any]:
    """Check the numbers of every cell (library, quantity) of a model, then time it against plain torch.

    Each round runs the plain step and then every cell, in random order, since a step inherits caches and heap of
    its predecessor. Gradients and results are dropped after every step, outside of the timing.

    Returns: {"plain": {...}, "cells": [{"library", "quantity", "milliseconds", "ratio", ...}, ...]}; a cell that its
        library refuses has "refused" instead of numbers
    """
    prepare_process(options)
    model, inputs, labels = EVERY_CASE[model_name].make(options.device)
    plain = Peer(model)
    peers = {library: EVERY_LIBRARY[library](model) for library in dict(cells)}
    refused = {cell: refusal(peers[cell[0]], cell[1], inputs, labels) for cell in cells}
    cells = [cell for cell in cells if refused[cell] is None]

    def timed(peer: Peer, quantity: str, warm_steps: int, keep: bool = False) -> float:
        for _ in range(warm_steps):
            peer.prepare(quantity, inputs, labels)
            peer.step(quantity, inputs, labels)
            peer.drop()
        peer.prepare(quantity, inputs, labels)
        seconds = seconds_of(lambda: peer.step(quantity, inputs, labels), options.device)
        if not keep:
            peer.drop()
        return seconds

    cell_seconds: dict[tuple[str, str], list[float]] = {cell: [] for cell in cells}
    extensions = [extension for _, quantity in cells for extension in QUANTITIES[quantity]]
    reference = reference_results(model, inputs, labels, extensions)
    checks, repeated = {}, []
    for cell in cells:
        library, quantity = cell
        first = timed(peers[library], quantity, 0, keep=True)
        checks[cell] = compare(peers[library], quantity, reference)
        peers[library].drop()
        if first <= options.once_seconds:
            repeated.append(cell)
        elif first <= 3 * options.once_seconds:
            # Once more: the first step also pays for memory that the system had not handed out before.
            cell_seconds[cell].append(timed(peers[library], quantity, 0))
        else:
            cell_seconds[cell].append(first)
    del reference

    slow_seconds = options.slow_ratio * min(timed(plain, "none", 1) for _ in range(3))
    slow = {cell for cell in repeated if timed(peers[cell[0]], cell[1], 0) > slow_seconds}

    order = random.Random(options.seed)
    plain_seconds: list[float] = []
    gc.disable()
    for number in range(options.rounds):
        gc.collect()
        plain_seconds.append(timed(plain, "none", options.warm_steps))
        due = [cell for cell in repeated if cell not in slow or number < options.slow_rounds]
        for cell in order.sample(due, len(due)):
            library, quantity = cell
            warm_steps = 0 if cell in slow else options.warm_steps
            cell_seconds[cell].append(timed(peers[library], quantity, warm_steps))
    gc.enable()

    if options.memory:
        plain_rise = rise_during(lambda: plain.step("none", inputs, labels), options.device)
        plain.drop()
        for library, quantity in cells:
            rise = rise_during(lambda p=peers[library], q=quantity: p.step(q, inputs, labels), options.device)
            checks[library, quantity]["extra_bytes"] = rise - plain_rise
            peers[library].drop()

    return {
        "plain": summary(plain_seconds, plain_seconds),
        "cells": [
            {"library": cell[0], "quantity": cell[1]} | summary(cell_seconds[cell], plain_seconds) | checks[cell]
            for cell in cells
        ]
        + [{"library": cell[0], "quantity": cell[1], "refused": why} for cell, why in refused.items() if why],
    }


# --- memory ------------------------------------------------------------------------------------------------


def resident_bytes(field: str) -> int:
    """`field` of this process: "VmRSS", "VmHWM" (peak of VmRSS since its reset), "RssAnon" (without mapped files)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def return_free_memory() -> None:
    """Give freed memory back to the system, so that using it again counts as a rise."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def allocated_bytes(device: str) -> int:
    """Memory in use now."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return_free_memory()
    return resident_bytes("RssAnon")


def rise_during(step: Callable[[], None], device: str) -> int:
    """How far memory rises above its level before `step`, while it runs."""
    if device == "cuda":
        before = allocated_bytes(device)
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM = VmRSS
    before = resident_bytes("VmRSS")
    step()
    return resident_bytes("VmHWM") - before


def measure_memory(model_name: str, library: str, quantity: str, options: Options) -> dict[str, Any]:
    """Peak memory of a step with `quantity` over that of a plain torch step.

    Returns: in bytes, "extra_bytes" (the peak over plain torch's; results and what is kept between steps included),
    "kept_bytes" (workspaces: what the first step leaves behind when its results are dropped) and "result_bytes"; or
    "refused", see `refusal`
    """
    prepare_process(options)
    # Blocks from 64 KiB go back to the system when they are freed: resident is what is alive, not what once was.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    model, inputs, labels = EVERY_CASE[model_name].make(options.device)

    def measure(peer: Peer, quantity: str) -> tuple[int, int, int]:
        before = allocated_bytes(options.device)
        begin = time.perf_counter()
        rise = rise_during(lambda: peer.step(quantity, inputs, labels), options.device)
        seconds = time.perf_counter() - begin
        result_bytes = peer.result_bytes(quantity)
        peer.drop()
        kept = max(0, allocated_bytes(options.device) - before)
        if seconds > options.once_seconds:
            return rise - kept, kept, result_bytes
        rises = []
        for _ in range(3):
            rises.append(rise_during(lambda: peer.step(quantity, inputs, labels), options.device))
            peer.drop()
        return statistics.median(rises), kept, result_bytes

    plain, peer = Peer(model), EVERY_LIBRARY[library](model)
    # These steps also load code.
    why = refusal(plain, "none", inputs, labels) or refusal(peer, quantity, inputs, labels)
    if why:
        return {"refused": why}
    plain_rise, _, _ = measure(plain, "none")
    rise, kept, result_bytes = measure(peer, quantity)
    return {"extra_bytes": rise + kept - plain_rise, "kept_bytes": kept, "result_bytes": result_bytes}
