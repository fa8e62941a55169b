"""What lives how long, and who sees it: contexts, threads, errors, attributes of modules, copies, memory."""

import copy
import ctypes
import functools
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from curvature_oracle import curvature
from curvature_tools import assert_exact_ggn, backward
from helpers import assert_close, named, some, subprocess_environment
from model_cases import MODELS, all_extensions, assert_no_quantities, assert_quantities
from oracle import model_statistics
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from backpack_cuda import (
    CTX,
    BackpropExtension,
    backpack,
    disable,
    extend,
    extensions,
    hook_run_extensions,
    hook_store_io,
    memory_cleanup,
    passes,
)
from backpack_cuda.extensions import (
    KFLR,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
)
from backpack_cuda.extensions.curvature import Curvature
from backpack_cuda.extensions.secondorder.hbp import BackpropStrategy, ExpectationApproximation, LossHessianStrategy
from backpack_cuda.stored import is_stored

PLAIN = MODELS["mlp"]


def prepared(case, device):
    """(extended model, inputs, targets, expected statistics) of a case."""
    inputs, targets = case.data()
    return case.prepared().to(device), inputs.to(device), targets.to(device), case.expected(inputs, targets)


def together(*functions) -> None:
    """Calls functions in threads of their own, which start at the same time; raises the first error."""
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait()
        function()

    with ThreadPoolExecutor(len(functions)) as pool:
        for future in [pool.submit(run, function) for function in functions]:
            future.result()


# ---------------------------------------------------------------------------------------------------------------------
# The context
# ---------------------------------------------------------------------------------------------------------------------


def test_nested_contexts(device):
    """The inner one replaces the outer one, all of it, until it exits."""
    inner_hook, outer_hook = (lambda module: None), (lambda module: None)
    outer, inner = BatchGrad(), BatchL2Grad()
    assert CTX.get_active_exts() == () and CTX.get_extension_hook()(nn.ReLU()) is None
    with backpack(outer, extension_hook=outer_hook, debug=True, retain_graph=True, memory_budget=7) as entered:
        assert entered is None
        with backpack(inner, extension_hook=inner_hook):
            assert CTX.get_active_exts() == (inner,) and CTX.get_extension_hook() is inner_hook
            assert not CTX.get_debug() and not CTX.get_retain_graph() and CTX.get_memory_budget() is None
            with backpack():
                assert CTX.get_active_exts() == ()
        assert CTX.get_active_exts() == (outer,) and CTX.get_extension_hook() is outer_hook
        assert CTX.get_debug() and CTX.get_retain_graph() and CTX.get_memory_budget() == 7
    assert CTX.get_active_exts() == () and not CTX.get_debug() and not CTX.get_retain_graph()


def test_one_context_object_used_again(device):
    """Inside of itself, and in threads at the same time."""
    model, inputs, targets, expected = prepared(PLAIN, device)
    other = PLAIN.prepared().to(device)
    context = backpack(*all_extensions())

    def step(model):
        for _ in range(5):
            model.zero_grad()
            with context:
                with context:
                    pass
                PLAIN.loss(model(inputs), targets).backward()
            assert CTX.get_active_exts() == ()

    together(lambda: step(model), lambda: step(other))
    assert_quantities(model, expected)
    assert_quantities(other, expected)


def test_ctx(device):
    """BackPACK's methods, as a program would call them to do what `backpack` does."""
    model, inputs, targets, expected = prepared(PLAIN, device)
    seen = []
    try:
        CTX.set_active_exts(list(all_extensions()))
        CTX.set_extension_hook(seen.append)
        CTX.set_retain_graph(True)
        CTX.set_debug(False)
        assert CTX.is_extension_active(BatchGrad) and CTX.is_extension_active(DiagGGNExact, BatchGrad)
        assert not CTX.is_extension_active(DiagGGNExact) and not CTX.is_extension_active()
        assert CTX.get_extension_hook() == seen.append and CTX.get_retain_graph() and not CTX.get_debug()
        PLAIN.loss(model(inputs), targets).backward()
    finally:
        CTX.set_active_exts(())
        CTX.set_extension_hook(None)
        CTX.set_retain_graph(False)
    assert_quantities(model, expected)
    assert model[0] in seen
    assert CTX.get_extension_hook()(model) is None


def test_what_is_set_inside_a_context_ends_with_it(device):
    with backpack(BatchGrad()):
        CTX.set_active_exts([BatchL2Grad()])
        CTX.set_debug(True)
        assert CTX.is_extension_active(BatchL2Grad)
    assert CTX.get_active_exts() == () and not CTX.get_debug()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, between graphs
def test_a_compiled_step_may_enter_contexts(device):
    """It runs, and a compiled model forms nothing; what is not compiled does."""
    torch._dynamo.reset()
    model, loss = small_model(device)
    inputs, targets = (t.to(device) for t in BATCHES[0])
    compiled = torch.compile(model, backend="eager")

    @functools.partial(torch.compile, backend="eager")
    def step():
        with backpack(BatchGrad()):
            with disable():
                pass
            loss(compiled(inputs), targets).backward()

    step()
    assert CTX.get_active_exts() == () and disable.should_store_io()
    assert model[0].weight.grad is not None
    with backpack(BatchGrad()):
        loss(model(inputs), targets).backward()
    assert model[0].weight.grad_batch.shape[0] == len(inputs)
    torch._dynamo.reset()


def test_remove_hooks(device):
    """Foreign hooks that were noted go; models keep working, extended again or not."""
    model, inputs, targets, expected = prepared(PLAIN, device)
    called = []
    CTX.add_hook_handle(model.register_forward_hook(lambda *args: called.append(args)))
    CTX.remove_hooks()
    CTX.remove_hooks()
    for again in (False, True):
        if again:
            for module in model.modules():
                module._backpack_extend = False
            extend(model)
        model.zero_grad()
        with backpack(*all_extensions()):
            PLAIN.loss(model(inputs), targets).backward()
        assert_quantities(model, expected)
    assert not called


def clean_up(module: nn.Module) -> None:
    """What Laplace does to a model that it extended."""
    for child in module.children():
        clean_up(child)
    module._backpack_extend = False
    memory_cleanup(module)


@pytest.mark.parametrize("store_io", [False, True])
def test_a_client_that_extends_and_cleans_up_at_each_call(store_io, device):
    """The model stays right, and no hook, forward or attribute is added at each turn."""
    inputs, targets = (t.to(device) for t in PLAIN.data())
    expected = PLAIN.expected(*PLAIN.data())
    model = PLAIN.stock().to(device)
    counts = set()
    for _ in range(3):
        extend(model, store_io=store_io)
        model.zero_grad()
        with backpack(*all_extensions()):
            PLAIN.loss(model(inputs), targets).backward()
        assert_quantities(model, expected)
        CTX.remove_hooks()
        clean_up(model)
        counts.add(sum(len(m._forward_hooks) + len(m._backward_hooks) + len(vars(m)) for m in model.modules()))
    assert len(counts) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Threads
# ---------------------------------------------------------------------------------------------------------------------


def test_threads_with_different_quantities(device):
    """Each thread's passes form what its own context asks for, also when all run at once."""
    cases = some(MODELS, "mlp", "cnn", "shared modules", "layer norm").values()
    kinds = (BatchGrad, BatchL2Grad, SumGradSquared, None)
    models = []

    def step(case, kind):
        model, inputs, targets, expected = prepared(case, device)
        for _ in range(10):
            model.zero_grad()
            if kind is None:
                case.loss(model(inputs), targets).backward()
            else:
                with backpack(kind()):
                    case.loss(model(inputs), targets).backward()
        models.append((model, expected, () if kind is None else [kind().savefield]))

    together(*[lambda case=case, kind=kind: step(case, kind) for case, kind in zip(cases, kinds, strict=True)])
    for model, expected, attributes in models:
        assert_quantities(model, expected, attributes=attributes)


def test_threads_with_the_same_model(device):
    """Graphs of one model in several threads: each pass counts the uses in its own graph alone."""
    case = MODELS["shared modules"]
    model, inputs, targets, expected = prepared(case, device)
    parameters = dict(model.named_parameters())
    lock = threading.Lock()

    def step():
        for _ in range(10):
            loss = case.loss(model(inputs), targets)
            with lock, backpack(*all_extensions()):
                model.zero_grad()
                loss.backward()
                assert_quantities(model, expected)

    together(*[step] * 4)
    assert all(p.grad is not None for p in parameters.values())


def test_second_order_in_threads(device):
    """Sweeps at the same time, in models with parts that run no sweep of their own."""
    cases = list(some(MODELS, "mlp", "cnn", "shared modules", "layer norm").values())
    done = []

    def step(case):
        inputs, targets = case.data()
        expected = curvature(case.stock(), lambda outputs: case.loss(outputs, targets), inputs)
        model, loss = case.prepared().to(device), copy.deepcopy(case.loss)
        for _ in range(3):
            backward(model, loss, inputs.to(device), targets.to(device), DiagGGNExact())
        done.append((model, expected))

    together(*[lambda case=case: step(case) for case in cases])
    for model, expected in done:
        assert_exact_ggn(model, expected, fields=["diag_ggn_exact"])


def deep(model, x: Tensor, depth: int) -> Tensor:
    """So many nested reentrant backward passes that the engine moves to threads of its own."""
    if depth == 0:
        return model(x)
    return checkpoint(lambda z: deep(model, z, depth - 1), x, use_reentrant=True)


@pytest.mark.parametrize("depth", [0, 1, 70])
def test_the_engines_threads_see_the_callers_context(depth, device):
    """In tensor hooks and layers, at any depth of reentrant checkpointing; at 70 no longer in the caller's thread."""
    names = set()

    def step(kinds):
        model, inputs, targets, expected = prepared(PLAIN, device)
        seen = []

        def note(gradient):
            names.add(threading.current_thread().name)
            seen.append([type(ext) for ext in CTX.get_active_exts()])

        class Noted(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                hidden = model[:2](x)
                if hidden.requires_grad:  # not in the first run of a checkpointed segment
                    hidden.register_hook(note)
                return model[2:](hidden)

        outputs = deep(Noted(), inputs.clone().requires_grad_(), depth)
        with backpack(*[kind() for kind in kinds]):
            PLAIN.loss(outputs, targets).backward()
        assert seen == [list(kinds)]
        assert_quantities(model, expected, attributes=[kind().savefield for kind in kinds])

    together(
        *[lambda kinds=kinds: step(kinds) for kinds in ((BatchGrad,), (BatchL2Grad, SumGradSquared), ())],
    )
    assert any(name.startswith("ThreadPool") for name in names) == (depth < 70)


def test_a_context_ends_with_its_thread_alone(device):
    """Its exit, by an error too, leaves the passes of other threads alone."""
    case = MODELS["shared modules"]
    model, inputs, targets, expected = prepared(case, device)
    other = PLAIN.prepared().to(device)
    other_inputs, other_targets = (t.to(device) for t in PLAIN.data())
    in_the_middle, ended = threading.Event(), threading.Event()

    def wait(gradient):
        in_the_middle.set()
        assert ended.wait(60)

    def slow():
        x = model.conv(inputs)  # its second use is differentiated before the wait, the first one after it
        x.register_hook(wait)
        x = model.conv(torch.relu(x)).flatten(1)
        with backpack(*all_extensions()):
            case.loss(model.out(model.linear(torch.sigmoid(model.linear(x)))), targets).backward()

    def fast():
        assert in_the_middle.wait(60)
        with pytest.raises(ZeroDivisionError), backpack(BatchGrad(), extension_hook=lambda module: 1 / 0):
            PLAIN.loss(other(other_inputs), other_targets).backward()
        with backpack(BatchGrad()):
            PLAIN.loss(other(other_inputs), other_targets).backward()
        ended.set()

    together(slow, fast)
    assert_quantities(model, expected)
    assert hasattr(other[0].weight, "grad_batch")


def test_disable_holds_for_one_thread(device):
    model, inputs, targets, expected = prepared(PLAIN, device)
    other = PLAIN.prepared().to(device)
    both = threading.Barrier(2)

    def disabled():
        with disable():
            both.wait()
            loss = PLAIN.loss(other(inputs), targets)
            both.wait()
        with backpack(*all_extensions()):
            loss.backward()

    def enabled():
        both.wait()
        assert disable.should_store_io()
        loss = PLAIN.loss(model(inputs), targets)
        both.wait()
        with backpack(*all_extensions()):
            loss.backward()

    together(disabled, enabled)
    assert_quantities(model, expected)
    assert_no_quantities(other)


PROGRAM = """
import sys, threading, torch
from torch import nn
from backpack_cuda import backpack, extend
from backpack_cuda.extensions import BatchGrad

def step():
    model = extend(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with backpack(BatchGrad(), extension_hook=lambda module: None):
        model(torch.ones(3, 2)).sum().backward()
        assert model[0].weight.grad_batch.shape == (3, 2, 2)

for _ in range(20):
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
def wait():
    with backpack(BatchGrad()):
        entered.set()
        threading.Event().wait()

entered = threading.Event()
threading.Thread(target=wait, daemon=True).start()
entered.wait()
context = backpack(BatchGrad(), extension_hook=lambda module: None)
context.__enter__()
step()
print("done")
"""


def test_threads_and_processes_end_inside_of_contexts():
    """Neither a thread's end nor the interpreter's stumbles over what is kept per thread."""
    result = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=subprocess_environment(),
        timeout=120,
    )
    assert result.returncode == 0 and result.stdout.strip() == "done" and not result.stderr, result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


class Failing(BatchGrad):
    """An extension that fails at a layer's result."""

    def __init__(self, at: torch.Size):
        super().__init__()
        self.at = at

    def quantity(self, stats, batch_size):
        if stats.batch_grad.shape[1:] == self.at:
            raise KeyError("from the extension")
        return super().quantity(stats, batch_size)


def failing_step(how: str, model, inputs, targets) -> None:
    """A pass with BatchGrad that fails when the last layer has its result."""
    ext, hook = BatchGrad(), None
    if how == "hook":

        def hook(module):
            if module is model[0]:
                raise KeyError("from the hook")

    elif how == "extension":
        ext = Failing(model[0].weight.shape)
    hidden = model[0](inputs)
    if how == "backward":

        def fail(gradient):
            raise KeyError("from a tensor hook")

        hidden.register_hook(fail)
    with backpack(ext, extension_hook=hook):
        PLAIN.loss(model[1:](hidden), targets).backward()


@pytest.mark.parametrize("inside", [False, True], ids=["caught outside", "caught inside"])
@pytest.mark.parametrize("how", ["hook", "extension", "backward"])
def test_errors(how, inside, device):
    """No part of a failed pass stays; the next pass, in the same context or not, is right and stays so."""
    model, inputs, targets, expected = prepared(PLAIN, device)
    if inside:
        with backpack(*all_extensions()):
            with pytest.raises(KeyError):
                failing_step(how, model, inputs, targets)
            assert_no_quantities(model)
            assert len(CTX.get_active_exts()) == 4
            model.zero_grad()
            PLAIN.loss(model(inputs), targets).backward()
    else:
        with pytest.raises(KeyError):
            failing_step(how, model, inputs, targets)
        assert CTX.get_active_exts() == ()
        assert_no_quantities(model)
        model.zero_grad()
        with backpack(*all_extensions()):
            PLAIN.loss(model(inputs), targets).backward()
    assert_quantities(model, expected)


def test_an_error_does_not_take_the_results_of_a_later_pass(device):
    """Nor does the end of the context in which it was caught."""
    model, inputs, targets, expected = prepared(PLAIN, device)
    fails = [True]

    def hook(module):
        if module is model[0] and fails[0]:
            raise KeyError("from the hook")

    with backpack(*all_extensions(), extension_hook=hook):
        with pytest.raises(KeyError) as error:  # which refers to the failed pass as long as it is kept
            PLAIN.loss(model(inputs), targets).backward()
        assert_no_quantities(model)
        fails[0] = False
        model.zero_grad()
        PLAIN.loss(model(inputs), targets).backward()
    assert_quantities(model, expected)
    del error
    assert_quantities(model, expected)


def test_an_error_frees_what_the_pass_held(device):
    """The first use of a shared module waits for the second, which never comes."""
    case = MODELS["shared modules"]
    model, inputs, targets, _ = prepared(case, device)
    x = model.conv(inputs)

    def fail(gradient):
        raise KeyError("from a tensor hook")

    x.register_hook(fail)
    hidden = torch.relu(x)
    alive = weakref.ref(hidden)
    with backpack(*all_extensions()):
        with pytest.raises(KeyError):
            case.loss(
                model.out(model.linear(torch.sigmoid(model.linear(model.conv(hidden).flatten(1))))), targets
            ).backward()
        del hidden, x
        assert alive() is None


def test_hook_of_a_frozen_layer_next_to_a_sweep(device):
    """Once per pass, not once per column."""
    model = extend(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))).to(device)
    model[1].requires_grad_(False)
    loss = extend(nn.MSELoss())
    outputs = model(torch.randn(3, 3, device=device))
    model[2].requires_grad_(False)  # too late for the forward pass
    seen = []
    with backpack(DiagGGNExact(), extension_hook=seen.append):
        loss(outputs, torch.randn(3, 2, device=device)).backward()
    assert len(seen) == len(set(seen)) and {model[0], model[1], model[3], loss} <= set(seen)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_disable_around_one_half_of_checkpointing(where, device):
    """A segment's two runs must save the same: the gradient of square weights is right."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh()).double()
    x = torch.randn(4, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    extend(model.to(device)).zero_grad()
    with disable() if where == "forward" else backpack():
        loss = checkpoint(model, x.to(device), use_reentrant=False).square().sum()
    with disable() if where == "backward" else backpack():
        loss.backward()
    for parameter, reference in zip(model.parameters(), expected, strict=True):
        assert_close(where, parameter.grad, reference, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

NEEDS_ARGUMENTS = {
    "HBP": lambda: extensions.HBP(
        Curvature.GGN,
        LossHessianStrategy.SAMPLING,
        BackpropStrategy.BATCH_AVERAGE,
        ExpectationApproximation.BOTEV_MARTENS,
    )
}
EVERY_EXTENSION = {
    name: NEEDS_ARGUMENTS.get(name, getattr(extensions, name))
    for name in extensions.__all__
    if isinstance(getattr(extensions, name), type)
    and issubclass(getattr(extensions, name), BackpropExtension)
    and name != "BackpropExtension"
}
# Batches of different size, which an extension that lives on must not mix.
BATCHES = [(torch.randn(n, 3), torch.randn(n, 2)) for n in (4, 2, 3)]


def small_model(device) -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    return extend(model).to(device), extend(nn.MSELoss())


def run_steps(model, loss, exts, count: int, **options) -> None:
    """`count` steps with the same extension objects."""
    device = next(model.parameters()).device
    for i in range(count):
        inputs, targets = (t.to(device) for t in BATCHES[i % len(BATCHES)])
        with backpack(*exts, **options):
            loss(model(inputs), targets).backward()


def live_tensors() -> int:
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def memory_in_use() -> int | None:
    """Bytes that malloc has handed out; None where it does not tell."""
    fields = ("arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost").split()
    mallinfo = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in fields]})
    try:
        call = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):  # another C library
        return None
    call.restype = mallinfo
    info = call()
    return info.uordblks + info.hblkhd


@named("make", EVERY_EXTENSION)
def test_every_extension_is_flat_without_collections_of_garbage(make, device):
    """No tensor more, and no cycle that holds a tensor, a graph or an object of ours; batch sizes change."""
    model, loss = small_model(device)
    exts = [make()]
    run_steps(model, loss, exts, 6)
    gc.collect()
    gc.disable()
    gc.freeze()  # what earlier tests left is not asked about
    try:
        run_steps(model, loss, exts, 3)
        before = live_tensors()
        run_steps(model, loss, exts, 30)
        assert live_tensors() == before
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds = {type(thing) for thing in gc.garbage}
        assert not {k for k in kinds if issubclass(k, Tensor | Node) or k.__module__.startswith("backpack_cuda")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.unfreeze()
        gc.enable()
    assert not exts[0].saved_quantities._saved_quantities


def test_a_thousand_steps_with_every_extension(device):
    """Neither Python's objects nor the memory below them grow."""
    model, loss = small_model(device)
    exts = [make() for make in EVERY_EXTENSION.values()]

    def state() -> tuple[int, int, int | None]:
        gc.collect()
        return live_tensors(), sys.getallocatedblocks(), memory_in_use()

    run_steps(model, loss, exts, 60)
    tensors, blocks, memory = state()
    run_steps(model, loss, exts, 1000)
    tensors_after, blocks_after, memory_after = state()
    assert tensors_after == tensors
    assert blocks_after - blocks < 500
    assert memory is None or memory_after - memory < 100_000
    run_steps(model, loss, exts, 1)
    for parameter in model.parameters():  # overwritten, not accumulated
        assert parameter.grad_batch.shape[0] == parameter.batch_l2.shape[0] == len(BATCHES[0][0])


@pytest.mark.parametrize("store_io", [False, True])
def test_forward_passes_without_backward(store_io, device):
    """Only what is stored on the modules stays, of the last pass."""
    model, loss = small_model(device)
    extend(model, store_io=store_io)
    inputs, targets = (t.to(device) for t in BATCHES[0])
    gc.collect()
    gc.disable()
    try:
        with backpack(BatchGrad()):
            loss(model(inputs), targets)
            before = live_tensors()
            for _ in range(20):
                loss(model(inputs), targets)
            assert live_tensors() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("make", [BatchGrad, BatchL2Grad, DiagGGNExact, SqrtGGNExact, KFLR, DiagHessian])
def test_create_graph_is_freed_when_its_results_are_dropped(make, device):
    """Gradients with a graph refer to the parameters they lie on: deleting both kinds of result frees the graph."""
    model, loss = small_model(device)
    inputs, targets = (t.to(device) for t in BATCHES[0])
    field = make().savefield
    gc.collect()
    gc.disable()
    try:
        before = live_tensors()
        for _ in range(2):
            with backpack(make()):
                value = loss(model(inputs.clone()), targets)
                gradients = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
            for parameter in model.parameters():
                delattr(parameter, field)
            del value, gradients, parameter
        assert live_tensors() == before
    finally:
        gc.enable()


def test_memory_of_models_that_are_dropped(device):
    """No table of ours remembers a model: nodes, architectures, passes. Nor does what is stored, before a backward."""
    gc.collect()
    before = set(passes._nodes)
    for store_io in (False, True):
        model, loss = small_model(device)
        extend(model, store_io=store_io)
        run_steps(model, loss, [BatchGrad(), DiagGGNExact()], 1)
        loss(model(BATCHES[0][0].to(device)), BATCHES[0][1].to(device))
        references = [weakref.ref(module) for module in model.modules()]
        del model
        gc.collect()
        assert all(reference() is None for reference in references)
    assert set(passes._nodes) <= before and not passes.Pass._of_task


# ---------------------------------------------------------------------------------------------------------------------
# Attributes of modules
# ---------------------------------------------------------------------------------------------------------------------


def stored(model: nn.Module) -> dict[str, set[str]]:
    """By the module's name the attributes that hold its inputs and outputs."""
    found = {name: {key for key in vars(module) if is_stored(key)} for name, module in model.named_modules()}
    return {name: keys for name, keys in found.items() if keys}


class Tuples(nn.Module):
    """Outputs that are tuples, with and without parameters; a child called `output`; a frozen layer in the middle."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(3, 4, batch_first=True)
        self.pool = nn.MaxPool1d(2, return_indices=True)
        self.norm = nn.LayerNorm(2).requires_grad_(False)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.output = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.frozen(self.norm(self.pool(self.recurrent(input=x)[0])[0])))


def test_store_io_is_complete_and_freed(device):
    """Every call that a backward pass reaches; not over a child of that name; nothing left afterwards."""
    model, x = extend(Tuples(), store_io=True).to(device), torch.randn(2, 3, 3, device=device)
    keys = list(model.state_dict())
    both = {"input0", "output"}
    for exts in ([], [BatchGrad()]):
        with backpack(*exts):
            loss = model(x).sum()
            children = ("recurrent", "pool", "norm", "frozen", "output")
            assert stored(model) == dict.fromkeys(children, both) | {"": {"input0"}}
            assert model.recurrent.input0 is x and torch.equal(model.pool.input0, model.recurrent.output)
            loss.backward()
            assert not stored(model)
    assert isinstance(model.output, nn.Linear) and list(model.state_dict()) == keys
    model.requires_grad_(False)
    model(x)
    assert not stored(model)


class Stepped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LSTMCell(3, 4), nn.LSTMCell(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x, self.first(x))[0]


def test_stored_tuples_have_no_graph(device):
    """So that models can be copied, and are freed, without a backward pass."""
    model, x = extend(Stepped(), store_io=True).to(device), torch.randn(2, 3, device=device)
    model(x)
    assert [t.shape for t in model.second.input1] == [(2, 4), (2, 4)]
    assert not any(t.requires_grad for t in model.second.input1)
    copy.deepcopy(model)
    reference = weakref.ref(model.second)
    gc.collect()
    gc.disable()
    try:
        del model
        assert reference() is None
    finally:
        gc.enable()


def test_store_io_and_retain_graph(device):
    """As in BackPACK: kept by `backpack(..., retain_graph=True)`, dropped by `memory_cleanup`; quantities need none."""
    inputs, targets = (t.to(device) for t in PLAIN.data())
    model = extend(PLAIN.stock().to(device), store_io=True)
    loss = PLAIN.loss(model(inputs), targets)
    with backpack(BatchGrad(), retain_graph=True):
        loss.backward(retain_graph=True)
    assert "0" in stored(model)
    loss.backward(retain_graph=True)  # outside of any context
    assert not stored(model)
    model.zero_grad()
    with backpack(*all_extensions()):
        loss.backward()
    assert_quantities(model, PLAIN.expected(*PLAIN.data()))
    PLAIN.loss(model(inputs), targets)
    for module in model.modules():
        memory_cleanup(module)
    assert not stored(model)


def test_an_input_that_is_a_parameter(device):
    """It does not become a parameter of the module, neither in the hook nor where inputs are stored."""
    image = nn.Parameter(torch.randn(4, 3, device=device))
    for store_io in (False, True):
        model = extend(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2)), store_io=store_io).to(device)
        keys, seen = list(model.state_dict()), []
        with backpack(BatchGrad(), extension_hook=lambda m, seen=seen: seen.append(m.input0.shape)):
            model(image).sum().backward()
        assert seen == [(4, 2), (4, 3)] and list(model.state_dict()) == keys
        assert model[0].weight.grad_batch.shape == (4, 2, 3)


def test_the_hook_of_frozen_modules(device):
    """Every module that gradients pass has its hook called once."""
    model = extend(Tuples()).to(device)
    seen = []
    with backpack(BatchGrad(), extension_hook=seen.append):
        model(torch.randn(2, 3, 3, device=device)).sum().backward()
    assert seen.count(model.norm) == seen.count(model.frozen) == seen.count(model.pool) == 1


@pytest.mark.parametrize("build", [lambda: nn.Linear(3, 2), lambda: nn.LayerNorm(3), lambda: nn.Conv1d(3, 2, 1)])
def test_keyword_inputs(build, device):
    """Quantities, and `input0` in the hook, as for positional ones."""
    module = extend(build()).to(device)
    x = torch.randn((4, 3, 5) if isinstance(module, nn.Conv1d) else (4, 3), device=device)
    results = []
    for call in (lambda: module(x), lambda: module(input=x)):
        seen = []
        with backpack(BatchGrad(), extension_hook=lambda m, seen=seen: seen.append(m.input0)):
            call().square().sum().backward()
        assert len(seen) == 1 and torch.equal(seen[0], x)
        results.append(module.weight.grad_batch)
    assert torch.equal(*results)


def test_backpacks_hooks(device):
    """`hook_store_io` and `hook_run_extensions`, registered by hand."""
    module, x = nn.Linear(3, 2).to(device), torch.randn(4, 3, device=device, requires_grad=True)
    module.register_forward_hook(hook_store_io)
    with torch.no_grad():
        module(x)
    with disable():
        module(x)
    assert not stored(module)
    output = module(x)
    assert module.input0 is x and torch.equal(module.output, output)
    module.register_full_backward_hook(hook_run_extensions)
    module(x).sum().backward()
    assert not stored(module)
    with backpack(BatchGrad()), pytest.raises(RuntimeError, match=r"extend\(module\)"):
        module(x).sum().backward()
    with backpack(BatchGrad()):
        extend(module)(x).sum().backward()
    assert module.weight.grad_batch.shape == (4, 2, 3) and not stored(module)


# ---------------------------------------------------------------------------------------------------------------------
# Copies, and changes after `extend`
# ---------------------------------------------------------------------------------------------------------------------


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def saved_and_loaded(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@named("copied", {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved_and_loaded})
@pytest.mark.parametrize("moment", ["graph alive", "after backward", "after create_graph", "inputs stored"])
def test_copies_in_the_middle(copied, moment, device):
    """The copy works by itself, extended again or not; the original goes on."""
    inputs, targets = (t.to(device) for t in PLAIN.data())
    expected = PLAIN.expected(*PLAIN.data())
    curved = curvature(PLAIN.stock(), lambda f: PLAIN.loss(f, targets.cpu()), inputs.cpu())
    model, loss = PLAIN.prepared().to(device), extend(copy.deepcopy(PLAIN.loss))
    extend(model, store_io=moment == "inputs stored")
    exts = [*all_extensions(), DiagGGNExact(), KFLR()]
    copies = []
    with backpack(*exts):
        value = loss(model(inputs), targets)
        if moment in ("graph alive", "inputs stored"):
            copies.append(copied(model))
        if moment == "after create_graph":
            torch.autograd.grad(value, list(model.parameters()), create_graph=True)
            value = loss(model(inputs), targets)
        else:
            value.backward()
    copies.append(copied(model))
    for other in (copies[0], copies[-1], extend(copied(copies[-1]))):
        other.zero_grad()
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        with backpack(*exts):
            copied(loss)(other(inputs), targets).backward()
        assert_quantities(other, expected)
        assert_exact_ggn(other, curved, fields=["diag_ggn_exact"])
    model.zero_grad()
    with backpack(*exts):
        loss(model(inputs), targets).backward()
    assert_quantities(model, expected)


def test_pickled_results(device):
    """pickle keeps the attributes of parameters, deepcopy does not: torch's rules, with ours on them."""
    model, loss = small_model(device)
    run_steps(model, loss, [BatchGrad(), KFLR()], 1)
    assert torch.equal(pickled(model)[0].weight.grad_batch, model[0].weight.grad_batch)
    assert not hasattr(copy.deepcopy(model)[0].weight, "grad_batch")


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.sin() * 2


def test_parametrised_after_extend(device):
    """A layer whose weight is computed from another parameter from now on."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    extend(model)
    parametrize.register_parametrization(model[0], "weight", Scaled())
    stock = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    parametrize.register_parametrization(stock[0], "weight", Scaled())
    stock.load_state_dict(model.state_dict())
    expected = model_statistics(stock, nn.MSELoss(), inputs, targets)
    curved = curvature(stock, lambda f: nn.functional.mse_loss(f, targets), inputs)
    for _ in range(2):
        model.to(device).zero_grad()
        backward(model, nn.MSELoss(), inputs.to(device), targets.to(device), *all_extensions(), DiagGGNExact())
        assert_quantities(model, expected)
        assert_exact_ggn(model, curved, fields=["diag_ggn_exact"])
    parametrize.remove_parametrizations(model[0], "weight")
    stock = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    stock.load_state_dict(model.state_dict())
    model.zero_grad()
    with backpack(*all_extensions()):
        nn.functional.mse_loss(model(inputs.to(device)), targets.to(device)).backward()
    assert_quantities(model, model_statistics(stock, nn.MSELoss(), inputs, targets))


def test_a_module_replaced_after_extend(device):
    """Without results until it is extended; the others have theirs."""
    model, loss = small_model(device)
    model[0] = nn.Linear(3, 3).to(device)
    run_steps(model, loss, [BatchGrad(), DiagGGNExact()], 1)
    assert not hasattr(model[0].weight, "grad_batch") and not hasattr(model[0].weight, "diag_ggn_exact")
    assert hasattr(model[2].weight, "grad_batch") and hasattr(model[2].weight, "diag_ggn_exact")
    extend(model)
    run_steps(model, loss, [BatchGrad(), DiagGGNExact()], 1)
    assert hasattr(model[0].weight, "grad_batch") and hasattr(model[0].weight, "diag_ggn_exact")


class MaybeScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_parameter("weight", None)

    def forward(self, input: Tensor) -> Tensor:
        return 2 * input if self.weight is None else input * self.weight


def test_first_and_last_parameters_of_a_module_extended_twice(device):
    """The hook runs once, whatever the module was when it was extended first."""
    torch.manual_seed(0)
    model = extend(nn.Sequential(nn.Linear(3, 4), MaybeScale(), nn.Linear(4, 2))).to(device)
    x, y = torch.randn(5, 3, device=device), torch.randn(5, 2, device=device)
    for weight in (nn.Parameter(torch.rand(4, device=device)), None, nn.Parameter(torch.rand(4, device=device))):
        model[1].weight, seen = weight, []
        extend(model)
        with backpack(BatchGrad(), extension_hook=seen.append):
            nn.MSELoss()(model(x), y).backward()
        assert seen == [model[2], model[1], model[0]]
        assert weight is None or torch.allclose(weight.grad_batch.sum(0), weight.grad)


def test_shallow_copies(device):
    """They are the original's as long as that lives; then they have to be extended."""
    layer = extend(nn.Linear(3, 2)).to(device)
    shallow, x = copy.copy(layer), torch.randn(4, 3, device=device)
    assert torch.equal(shallow(x), layer(x))
    del layer
    with pytest.raises(RuntimeError, match="extend"):
        shallow(x)
    extend(shallow)
    with backpack(BatchGrad()):
        shallow(x).sum().backward()
    assert torch.allclose(shallow.weight.grad_batch.sum(0), shallow.weight.grad)


def test_a_model_that_changes_its_type(device):
    """Results have the type of the parameters at the forward pass, whatever was there before."""
    model, loss = small_model(device)
    x, y = (t.to(device) for t in BATCHES[0])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
        model.to(dtype)
        with backpack(BatchGrad(), DiagGGNExact()):
            loss(model(x.to(dtype)), y.to(dtype)).backward()
        for parameter in model.parameters():
            assert parameter.grad_batch.dtype == parameter.dtype == dtype


def test_loading_a_state_in_the_middle(device):
    """New values take effect at the next forward pass; results stay until they are overwritten."""
    model, inputs, targets, expected = prepared(PLAIN, device)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    original = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    with backpack(*all_extensions()):
        PLAIN.loss(model(inputs), targets).backward()
    model.load_state_dict(original)
    model.zero_grad()
    with backpack(*all_extensions()):
        PLAIN.loss(model(inputs), targets).backward()
    assert_quantities(model, expected)
