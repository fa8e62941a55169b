"""Which computation serves which operands on a GPU, without one: fake CUDA tensors go through the public calls."""

import contextlib
import re

import pytest
import torch
from helpers import assert_close, named, some
from op_cases import CASES, HALVES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import backpack_cuda as bp
from backpack_cuda import _lib
from backpack_cuda.ops import composite, dispatch, library
from backpack_cuda.stats import Stats, Want

FAMILIES = some(CASES, "linear", "linear_tokens", "conv2d_grouped", "conv_transpose1d")
LIBRARY = {"linear": "aten::mm", "conv": "aten::convolution_backward", "conv_transpose": "aten::convolution_backward"}


class Calls(TorchDispatchMode):
    """Records the operators that are called: [(name, arguments)]."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made.append((function._schema.name, args))
        return function(*args, **(kwargs or {}))

    def named(self, prefix: str) -> list[tuple[str, tuple]]:
        return [(name, args) for name, args in self.made if name.startswith(prefix)]


@contextlib.contextmanager
def fake_gpu(monkeypatch, kernels: bool):
    """CUDA tensors without a GPU, and a library that says whether it has CUDA kernels; yields the calls made."""
    monkeypatch.setattr(_lib, "has_kernel", lambda operator, device_type: kernels or device_type == "cpu")
    with FakeTensorMode(), Calls() as calls:
        yield calls


def fake_operands(case, dtype=torch.float32):
    return [torch.empty(shape, dtype=dtype, device="cuda") for shape in (case.input_shape, case.output_shape())]


@pytest.fixture(autouse=True)
def keep_precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@named("case", FAMILIES)
def test_statistics_are_the_kernels_task(case, dtype, monkeypatch):
    with fake_gpu(monkeypatch, kernels=True) as calls:
        operands = fake_operands(case, dtype)
        for want in ("batch_l2", "batch_grad", ("grad", "batch_l2"), ("grad", "sum_grad_squared")):
            case.public(*operands, want)
        weights = torch.empty(case.input_shape[0], device="cuda")
        case.public_weighted(*operands, weights)
    name = f"backpack_cuda::{case.family}"
    assert [call for call, _ in calls.named("backpack_cuda::")] == 4 * [f"{name}_grad_stats"] + [
        f"{name}_weighted_grad"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@named("case", FAMILIES)
def test_a_gradient_alone_is_the_librarys(case, dtype, monkeypatch):
    """cuBLAS or cuDNN in the operands' type, whether or not the kernels are there."""
    with fake_gpu(monkeypatch, kernels=True) as calls:
        operands = fake_operands(case, dtype)
        calls.made.clear()
        grad = case.public(*operands, "grad").grad
        assert grad.shape == case.weight_shape and grad.dtype == dtype
    assert not calls.named("backpack_cuda::")
    assert len(calls.named(LIBRARY[case.family])) == 1


@pytest.fixture
def composites(monkeypatch) -> list[str]:
    """The composites that are called; they return nothing. (Fake CUDA tensors cannot be sliced without a GPU.)"""
    called = []
    for name in ("linear", "conv", "bias", "linear_weighted_grad", "conv_weighted_grad"):
        results = Stats() if name == "bias" else None if "weighted" in name else (Stats(), Stats())
        monkeypatch.setattr(composite, name, lambda *_, name=name, results=results: (called.append(name), results)[1])
    return called


@named("case", FAMILIES)
def test_float64_goes_through_torch(case, monkeypatch, composites):
    with fake_gpu(monkeypatch, kernels=True) as calls:
        operands = fake_operands(case, torch.float64)
        case.public(*operands, ("grad", "batch_grad", "sum_grad_squared"))
        case.public_weighted(*operands, torch.empty(case.input_shape[0], dtype=torch.float64, device="cuda"))
        bp.ops.bias_grad_stats(operands[1], "batch_l2")
        assert not calls.named("backpack_cuda::")
        bp.ops.outer_norm(*(torch.empty(3, 4, dtype=torch.float64, device="cuda") for _ in range(2)))
    family = case.family.partition("_")[0]
    assert composites == [family, f"{family}_weighted_grad", "bias"]
    assert [name for name, _ in calls.named("backpack_cuda::")] == ["backpack_cuda::outer_norm"]


@pytest.mark.parametrize(
    "set_precision, one_pass",
    [
        (lambda: torch.set_float32_matmul_precision("highest"), False),
        (lambda: torch.set_float32_matmul_precision("high"), True),
        (lambda: torch.set_float32_matmul_precision("medium"), True),
        (lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), True),
        (lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"), True),
    ],
    ids=["highest", "high", "medium", "allow_tf32", "fp32_precision"],
)
@named("case", FAMILIES)
def test_precision_is_read_at_each_call(case, set_precision, one_pass, monkeypatch):
    torch.set_float32_matmul_precision("highest")
    try:
        set_precision()
        with fake_gpu(monkeypatch, kernels=True) as calls:
            operands = fake_operands(case)
            case.public(*operands, ("grad", "batch_l2"))
            case.public_weighted(*operands, torch.empty(case.input_shape[0], device="cuda"))
            # A trailing argument with its default value is left out.
            assert [args[-1] is True for _, args in calls.named("backpack_cuda::")] == 2 * [one_pass]
            calls.made.clear()
            case.public(*fake_operands(case, torch.bfloat16), ("grad", "batch_l2"))
            assert not any(args[-1] is True for _, args in calls.named("backpack_cuda::"))
        with Calls() as calls:
            case.public(*case.operands(), ("grad", "batch_l2"))
        assert not any(args[-1] is True for _, args in calls.named("backpack_cuda::"))
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


CALLS = {
    "linear_grad_stats": lambda x: bp.ops.linear_grad_stats(x(3, 4), x(3, 5), "batch_l2"),
    "conv_grad_stats": lambda x: bp.ops.conv_grad_stats(x(3, 4, 8), x(3, 5, 6), 3),
    "conv_transpose_grad_stats": lambda x: bp.ops.conv_transpose_grad_stats(x(3, 4, 6), x(3, 5, 8), 3),
    "bias_grad_stats": lambda x: bp.ops.bias_grad_stats(x(3, 5)),
    "outer_norm": lambda x: bp.ops.outer_norm(x(3, 4), x(3, 5)),
    "linear_column_stats": lambda x: bp.ops.linear_column_stats(x(3, 4), x(2, 3, 5)),
    "conv_column_stats": lambda x: bp.ops.conv_column_stats(x(3, 4, 8), x(2, 3, 5, 6), 3),
    "conv_transpose_column_stats": lambda x: bp.ops.conv_transpose_column_stats(x(3, 4, 6), x(2, 3, 5, 8), 3),
    "bias_column_stats": lambda x: bp.ops.bias_column_stats(x(2, 3, 5)),
    "linear_weighted_grad": lambda x: bp.ops.linear_weighted_grad(x(3, 4), x(3, 5), x(3)),
    "conv_weighted_grad": lambda x: bp.ops.conv_weighted_grad(x(3, 4, 8), x(3, 5, 6), x(3), 3),
    "conv_transpose_weighted_grad": lambda x: bp.ops.conv_transpose_weighted_grad(x(3, 4, 6), x(3, 5, 8), x(3), 3),
}


@named("name, call", {name: (name, call) for name, call in CALLS.items()})
def test_a_build_without_cuda_says_what_to_do(name, call, monkeypatch):
    with fake_gpu(monkeypatch, kernels=False), pytest.raises(RuntimeError, match=rf"^{name}: ") as caught:
        call(lambda *shape: torch.empty(shape, device="cuda"))
    for part in ("nvcc", "CUDACXX", "pip install --no-build-isolation .", "make build", "BACKPACK_CUDA_WITH_CUDA=ON"):
        assert part in str(caught.value)
    assert len(re.findall(r"[.!?](\s|$)", str(caught.value).replace("isolation .`", ""))) == 1, "one sentence"


@named("case", FAMILIES)
def test_layers_work_in_a_build_without_cuda(case, monkeypatch, composites):
    """What they call goes through PyTorch's operations."""
    with fake_gpu(monkeypatch, kernels=False) as calls:
        operands = fake_operands(case)
        if case.family == "linear":
            dispatch.linear_stats(*operands, Want.BATCH_L2, Want.BATCH_L2)
        else:
            dispatch.conv_stats(case.geometry(), *operands, Want.BATCH_L2, Want.BATCH_L2)
    assert composites == [case.family.partition("_")[0]]
    assert not calls.named("backpack_cuda::")


@pytest.mark.skipif(_lib.has_kernel("linear_grad_stats", "cuda"), reason="built with CUDA kernels")
def test_this_build_without_cuda_says_what_to_do():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="nvcc"):
        CALLS["linear_grad_stats"](lambda *shape: torch.empty(shape, device="cuda"))


@named("case", CASES)
def test_the_librarys_gradient(case, device):
    """What a gradient alone is computed by on a GPU."""
    operands = case.operands(device)
    if case.family == "linear":
        grad = library.linear_weight_grad(*operands)
    else:
        grad = library.conv_weight_grad(case.geometry(), *operands)
    assert grad.is_contiguous()
    assert_close("grad", grad, case.oracle(*operands)[0].grad, 1e-5)


@named("case", CASES)
def test_composite_statistics(case, device):
    """What float64 operands on a GPU go through: chunk by chunk, in every statistic."""
    operands = case.operands(device, torch.float64)
    if case.family == "linear":
        weight, bias = composite.linear(*operands, 31, 31)
    else:
        weight, bias = composite.conv(case.geometry(), *operands, 31, 31)
    for actual, expected in zip((weight, bias), case.oracle(*operands), strict=True):
        for value, reference in zip(actual, expected, strict=True):
            torch.testing.assert_close(value.cpu(), reference, rtol=1e-10, atol=1e-12)
