"""Square roots of the losses' Hessians against double backward of torch's own losses in float64."""

import importlib
from dataclasses import dataclass, field
from math import prod, sqrt

import pytest
import torch
from helpers import assert_close, examples, named
from property_testing import given, settings, st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from backpack_cuda.curvature import register_loss
from backpack_cuda.curvature.losses import LossHessian, is_loss, loss_hessian
from backpack_cuda.curvature.square_root import SquareRoot

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """A loss module with its arguments, all drawn from a seed."""

    loss: type[nn.Module]
    shape: tuple[int, ...]  # of the prediction
    options: dict = field(default_factory=dict)  # tensors of options are drawn from the shapes given here
    soft: bool = False
    ignored: float = 0.0  # share of the targets
    spread: float = 2.0  # of the logits
    seed: int = 0

    def make(self, device="cpu", dtype=torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)

        def positive(*shape: int) -> Tensor:
            return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2).to(device, dtype)

        options = {k: positive(*v) if k in ("weight", "pos_weight") else v for k, v in self.options.items()}
        prediction = torch.randn(*self.shape, generator=generator, dtype=torch.float64) * self.spread
        if self.loss is nn.CrossEntropyLoss and not self.soft:
            positions = (self.shape[0], *self.shape[2:])
            target = torch.randint(self.shape[1], positions, generator=generator).to(device)
            drop = torch.rand(positions, generator=generator).to(device) < self.ignored
            target[drop] = options.get("ignore_index", -100)
        elif self.loss is nn.BCEWithLogitsLoss and not self.soft:
            target = positive(*self.shape).round().clamp(max=1)
        else:
            target = positive(*self.shape) / 2
        return self.loss(**options), prediction.to(device, dtype), target

    def double(self) -> tuple[nn.Module, Tensor, Tensor]:
        return self.make()


def case(loss: str, shape: tuple[int, ...], soft=False, ignored=0.0, spread=2.0, seed=0, **options) -> Case:
    """`case("MSE", ...)`."""
    return Case(getattr(nn, f"{loss}Loss"), shape, options, soft, ignored, spread, seed)


NAMED = {
    "mse": case("MSE", (4, 3)),
    "mse scalars": case("MSE", (4,)),
    "mse images": case("MSE", (2, 2, 3, 2)),
    "mse sum": case("MSE", (3, 2), reduction="sum"),
    "ce": case("CrossEntropy", (4, 5)),
    "ce sum": case("CrossEntropy", (4, 5), reduction="sum"),
    "ce tokens": case("CrossEntropy", (2, 3, 4)),
    "ce images": case("CrossEntropy", (2, 3, 2, 3), reduction="sum"),
    "ce default ignore_index": case("CrossEntropy", (4, 3, 2), ignored=0.4),
    "ce ignored class": case("CrossEntropy", (5, 3), ignore_index=1),
    "ce weights": case("CrossEntropy", (4, 3, 2), weight=(3,), ignored=0.3),
    "ce smoothing": case("CrossEntropy", (4, 3), label_smoothing=0.3, ignored=0.3),
    "ce all options": case(
        "CrossEntropy", (4, 3, 2), weight=(3,), label_smoothing=0.2, ignore_index=2, ignored=0.2, seed=1
    ),
    "ce all options sum": case(
        "CrossEntropy", (4, 3), weight=(3,), label_smoothing=0.2, ignore_index=-1, ignored=0.5, reduction="sum"
    ),
    "ce soft": case("CrossEntropy", (4, 3), soft=True),
    "ce soft all options": case("CrossEntropy", (3, 4, 2), soft=True, weight=(4,), label_smoothing=0.3),
    "ce two classes": case("CrossEntropy", (4, 2)),
    "ce one class": case("CrossEntropy", (4, 1)),
    "ce one sample": case("CrossEntropy", (1, 4)),
    "bce": case("BCEWithLogits", (4, 1)),
    "bce scalars": case("BCEWithLogits", (4,), reduction="sum"),
    "bce soft": case("BCEWithLogits", (4, 3), soft=True),
    "bce images": case("BCEWithLogits", (2, 3, 2)),
    "bce weights": case("BCEWithLogits", (4, 3), weight=(4, 1), pos_weight=(3,), soft=True),
    "bce position weights": case("BCEWithLogits", (2, 3, 2), pos_weight=(3, 1), weight=(2,), reduction="sum"),
}


@st.composite
def any_case(draw) -> Case:
    loss = draw(st.sampled_from(["MSE", "CrossEntropy", "BCEWithLogits"]))
    options = {"reduction": draw(st.sampled_from(["mean", "sum"]))}
    soft, ignored = draw(st.booleans()), 0.0
    samples = draw(st.integers(1, 3))
    if loss == "CrossEntropy":
        classes = draw(st.integers(1, 5))
        shape = (samples, classes, *draw(st.lists(st.integers(1, 3), max_size=2)))
        if draw(st.booleans()):
            options["weight"] = (classes,)
        if draw(st.booleans()):
            options["label_smoothing"] = draw(st.sampled_from([0.1, 0.5, 1.0]))
        if not soft:
            ignored = draw(st.sampled_from([0.0, 0.5]))
            options["ignore_index"] = draw(st.sampled_from([-100, -1, 0, classes - 1, classes]))
    else:
        shape = (samples, *draw(st.lists(st.integers(1, 3), max_size=3)))
        if loss == "BCEWithLogits":
            for name in ("weight", "pos_weight"):
                if draw(st.booleans()):
                    kept = draw(st.integers(0, len(shape)))  # trailing dimensions, some of them 1
                    options[name] = tuple(draw(st.sampled_from([1, n])) for n in shape[len(shape) - kept :])
    spread = draw(st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    return case(loss, shape, soft, ignored, spread, draw(st.integers(0, 1000)), **options)


def hessian_blocks(loss: nn.Module, prediction: Tensor, target: Tensor) -> Tensor:
    """[N, D, D]: per sample, row by row, the Hessian of loss(prediction, target); all other blocks are zero."""
    prediction = prediction.detach().requires_grad_()
    samples, size = prediction.shape[0], prod(prediction.shape[1:])
    gradient = torch.autograd.grad(loss(prediction, target), prediction, create_graph=True)[0].reshape(samples, size)
    blocks = prediction.new_zeros(samples, size, size)
    for n in range(samples):
        for i in range(size if gradient.requires_grad else 0):
            row = torch.autograd.grad(gradient[n, i], prediction, retain_graph=True)[0].reshape(samples, size)
            blocks[n, i] = row[n]
            others = [m for m in range(samples) if m != n]
            assert not row[others].any(), "samples depend on each other"
    return blocks


def columns_of(root: SquareRoot) -> Tensor:
    columns, signs = root.form(0, root.count)
    assert signs is None
    return columns


def blocks_of(root: SquareRoot, prediction: Tensor) -> Tensor:
    """[N, D, D] = sum_v S_vn S_vn^T in float64."""
    columns = columns_of(root)
    assert columns.shape == (root.count, *prediction.shape) and columns.dtype == prediction.dtype
    columns = columns.double().cpu().reshape(root.count, prediction.shape[0], prod(prediction.shape[1:]))
    return torch.einsum("vni,vnj->nij", columns, columns)


def check_square_roots(case: Case) -> None:
    loss, prediction, target = case.double()
    hessian = loss_hessian(loss, prediction, target)
    expected = hessian_blocks(loss, prediction, target)
    if torch.isnan(loss(prediction, target)):  # all targets ignored: a loss of 0 / 0 without any gradient
        expected = expected.nan_to_num()
    assert hessian.prediction is prediction
    scale = max(expected.abs().max().item(), 1e-3)  # the expectation itself cancels where probabilities are near 1
    assert_close("exact", blocks_of(hessian.exact, prediction), expected, 1e-12, scale)
    assert_close("reduced", blocks_of(hessian.reduced, prediction), expected, 1e-12, scale)


@named("case", NAMED)
def test_named_cases(case):
    check_square_roots(case)


@settings(max_examples=examples(150))
@given(case=any_case())
def test_random_cases(case):
    check_square_roots(case)


@named("case", NAMED)
def test_numbers_of_columns(case):
    """BackPACK's for `exact`; one fewer per position for `reduced` softmax."""
    loss, prediction, target = case.double()
    hessian = loss_hessian(loss, prediction, target)
    assert hessian.exact.count == prod(prediction.shape[1:])
    fewer = prod(prediction.shape[2:]) if case.loss is nn.CrossEntropyLoss and prediction.shape[1] > 1 else 0
    assert hessian.reduced.count == hessian.exact.count - fewer


@named("case", NAMED)
def test_normalisation_is_the_ratio_of_sum_and_mean(case):
    loss, prediction, target = case.double()
    normalisation = float(loss_hessian(loss, prediction, target).normalisation)
    if loss.reduction == "sum":
        assert normalisation == 1
    else:
        mean = loss(prediction, target)
        loss.reduction = "sum"
        assert loss(prediction, target).item() == pytest.approx(normalisation * mean.item())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named("case", NAMED)
def test_dtypes(case, dtype, device):
    """Columns are rounded once, to the prediction's type."""
    loss, prediction, target = case.make(device, dtype)
    hessian = loss_hessian(loss, prediction, target)
    loss64 = case.loss(**{k: v.double() if isinstance(v, Tensor) else v for k, v in options_of(loss).items()})
    target64 = target.double() if target.is_floating_point() else target
    reference = loss_hessian(loss64, prediction.double(), target64)
    tolerance = max(torch.finfo(dtype).eps, 1e-6 if dtype != torch.float64 else 1e-14)
    for name in ("exact", "reduced"):
        root, wide = getattr(hessian, name), getattr(reference, name)
        assert columns_of(root).device.type == device.type
        assert_close(name, columns_of(root), columns_of(wide).cpu(), tolerance)
    assert columns_of(hessian.sampled(3)).dtype == dtype
    assert torch.isfinite(columns_of(hessian.sampled(3))).all()


def options_of(loss: nn.Module) -> dict:
    names = ("reduction", "weight", "pos_weight", "label_smoothing", "ignore_index")
    return {name: getattr(loss, name) for name in names if hasattr(loss, name)}


# ---- extremes

EXTREMES = {
    "saturated": torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [0.0, 0.0, 1e4]]),
    "minus infinity": torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, 0.0, -torch.inf], [1.0, 2.0, -torch.inf]]),
    "equal": torch.full((3, 3), 1e4),
    "underflow of p, not of its root": torch.tensor([[0.0, -100.0, -101.0], [-170.0, 0.0, -90.0], [-90.0, -90.0, 0.0]]),
}


def softmax_covariance(logits: Tensor) -> Tensor:
    """[N, C, C] = diag(p) - p p^T without a difference of nearly equal numbers."""
    p = logits.softmax(1)
    products = p.unsqueeze(2) * p.unsqueeze(1) * (1 - torch.eye(p.shape[1], dtype=p.dtype))
    return torch.diag_embed(products.sum(2)) - products


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named("logits", EXTREMES)
def test_extreme_logits(logits, dtype):
    """Finite columns and derivatives, and the right Hessian."""
    for loss, target in ((nn.CrossEntropyLoss(), torch.tensor([0, 1, 2])), (nn.BCEWithLogitsLoss(), torch.ones(3, 3))):
        prediction = logits.to(dtype).requires_grad_()
        hessian = loss_hessian(loss, prediction, target)
        for root in (hessian.exact, hessian.reduced, hessian.sampled(4)):
            columns = columns_of(root)
            gradient = torch.autograd.grad(columns.double().square().sum(), prediction)[0]
            assert torch.isfinite(columns).all() and torch.isfinite(gradient).all()
        wide = prediction.detach().double()
        if isinstance(loss, nn.CrossEntropyLoss):
            expected = softmax_covariance(wide) / 3
        else:
            expected = torch.diag_embed(wide.sigmoid() * (-wide).sigmoid()) / 9
        scale = max(expected.abs().max().item(), torch.finfo(dtype).tiny)
        for root in (hessian.exact, hessian.reduced):
            blocks = blocks_of(root, prediction.detach())
            assert_close("columns", blocks, expected, 4 * max(torch.finfo(dtype).eps, 1e-6), scale)


@pytest.mark.parametrize("likely", range(4))
@pytest.mark.parametrize("reduced", [False, True])
def test_confident_predictions_lose_no_digits(likely, reduced):
    """The diagonal p (1 - p) where 1 - p is far below float32's resolution of p."""
    logits = torch.tensor([[-20.0, -19.0, -24.0, -9.0]])
    logits[0, likely] = 4.0
    hessian = loss_hessian(nn.CrossEntropyLoss(), logits, torch.tensor([0]))
    actual = columns_of(hessian.reduced if reduced else hessian.exact).double().square().sum(0)[0]
    expected = softmax_covariance(logits.double())[0].diagonal()
    assert ((actual - expected).abs() <= 3e-6 * expected).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"weight": (3,)}, {"label_smoothing": 0.2}, {"ignore_index": 1}], ids=str)
def test_all_targets_ignored(options, reduction):
    """No gradient, so no Hessian, though the mean itself is 0 / 0."""
    ignoring = case("CrossEntropy", (4, 3, 2), ignored=1.0, reduction=reduction, **options)
    loss, prediction, target = ignoring.double()
    hessian = loss_hessian(loss, prediction, target)
    for root in (hessian.exact, hessian.reduced, hessian.sampled(3)):
        assert not columns_of(root).any()
    assert hessian.normalisation == (0 if reduction == "mean" else 1)


def test_indices_of_one_byte():
    """Class 156 is the default ignore_index -100 modulo 256."""
    loss, prediction = nn.CrossEntropyLoss(), torch.randn(2, 160, dtype=torch.float64)
    target = torch.tensor([156, 3], dtype=torch.uint8)
    assert torch.equal(loss(prediction, target), loss(prediction, target.long()))
    assert loss_hessian(loss, prediction, target).normalisation == 2


EMPTY = {
    "mse": case("MSE", (0, 3)),
    "mse scalars": case("MSE", (0,)),
    "ce": case("CrossEntropy", (0, 3)),
    "ce tokens": case("CrossEntropy", (0, 3, 2), weight=(3,)),
    "ce soft": case("CrossEntropy", (0, 3), soft=True, label_smoothing=0.1),
    "ce no positions": case("CrossEntropy", (2, 3, 0)),
    "bce": case("BCEWithLogits", (0, 2), weight=(2,), pos_weight=(2,)),
    "bce no outputs": case("BCEWithLogits", (2, 0)),
}


@named("case", EMPTY)
def test_empty_batches(case):
    loss, prediction, target = case.double()
    hessian = loss_hessian(loss, prediction, target)
    assert hessian.exact.count == prod(prediction.shape[1:])
    for root in (hessian.exact, hessian.reduced, hessian.sampled(2)):
        assert columns_of(root).shape == (root.count, *prediction.shape)


# ---- sampling


@named("case", NAMED)
def test_samples_are_unbiased(case):
    """Mean of the outer products over all pairs of samples' entries: their Hessian, and 0 across samples."""
    loss, prediction, target = case.double()
    count = 20_000
    root = loss_hessian(loss, prediction, target).sampled(count)
    assert root.count == count
    draws = columns_of(root).reshape(count, prediction.numel()) * sqrt(count)  # [M, N D]
    blocks = hessian_blocks(loss, prediction, target)
    expected = torch.block_diag(*blocks)
    mean = draws.T @ draws / count
    deviation = (draws.square().T @ draws.square() / count - mean.square()).clamp(min=0).sqrt()
    # 5.5 standard errors; Poisson's where an event is too rare for a normal distribution.
    rare = 30 / count * draws.square().amax(0)
    bound = 5.5 * deviation / sqrt(count) + torch.maximum(rare.unsqueeze(0), rare.unsqueeze(1))
    assert ((mean - expected).abs() <= bound + 1e-12).all()
    first = draws.mean(0).abs()  # of gradients under the model: 0
    assert (first <= 5.5 * draws.std(0) / sqrt(count) + 30 / count * draws.abs().amax(0)).all()


@named("case", NAMED)
def test_samples_follow_the_seed(case, device):
    loss, prediction, target = case.make(device, torch.float32)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return columns_of(loss_hessian(loss, prediction, target).sampled(100))

    assert torch.equal(draw(1), draw(1))
    if draw(1).any():
        assert not torch.equal(draw(1), draw(2))


@named("case", NAMED)
def test_chunks_are_parts_of_the_whole(case, device):
    """And samples are drawn when they are asked for, not when they are formed."""
    loss, prediction, target = case.make(device, torch.float32)
    hessian = loss_hessian(loss, prediction, target)
    for root in (hessian.exact, hessian.reduced, hessian.sampled(5)):
        whole = columns_of(root)
        for size in (1, 2, 3):
            bounds = range(0, root.count, size)
            parts = [root.form(begin, min(begin + size, root.count))[0] for begin in bounds]
            assert torch.equal(torch.cat(parts), whole)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


def test_a_chunk_never_forms_the_other_columns():
    loss, prediction, target = case("CrossEntropy", (2, 30, 50)).double()
    hessian = loss_hessian(loss, prediction, target)
    for root in (hessian.exact, hessian.reduced):
        with Largest() as largest:
            root.form(700, 703)
        assert largest.elements == 3 * prediction.numel()
    for loss, prediction, target in (case("MSE", (2, 500)).double(), case("BCEWithLogits", (2, 500)).double()):
        with Largest() as largest:
            loss_hessian(loss, prediction, target).exact.form(3, 6)
        assert largest.elements <= 3 * prediction.numel()


# ---- derivatives


@pytest.mark.parametrize("columns", ["exact", "reduced", "sampled"])
@named("case", {k: v for k, v in NAMED.items() if v.loss is not nn.MSELoss})
def test_columns_are_differentiable(case, columns):
    loss, prediction, target = case.double()

    def form(prediction: Tensor) -> Tensor:
        torch.manual_seed(0)
        root = getattr(loss_hessian(loss, prediction, target), columns)
        return columns_of(root(2) if columns == "sampled" else root)

    prediction.requires_grad_()
    assert torch.autograd.gradcheck(form, prediction)
    if prediction.numel() <= 12:
        assert torch.autograd.gradgradcheck(form, prediction)
    with torch.no_grad():
        assert not form(prediction).requires_grad


# ---- against BackPACK

BACKPACK = {
    "mse": ("mseloss.MSELossDerivatives", case("MSE", (4, 3))),
    "mse sum": ("mseloss.MSELossDerivatives", case("MSE", (4, 3), reduction="sum")),
    "ce": ("crossentropyloss.CrossEntropyLossDerivatives", case("CrossEntropy", (4, 3))),
    "ce sum": ("crossentropyloss.CrossEntropyLossDerivatives", case("CrossEntropy", (4, 3), reduction="sum")),
    "ce tokens": ("crossentropyloss.CrossEntropyLossDerivatives", case("CrossEntropy", (4, 3, 5))),
    "ce images": ("crossentropyloss.CrossEntropyLossDerivatives", case("CrossEntropy", (2, 3, 2, 4))),
    "bce": ("bcewithlogitsloss.BCELossWithLogitsDerivatives", case("BCEWithLogits", (4, 1))),
    "bce sum": ("bcewithlogitsloss.BCELossWithLogitsDerivatives", case("BCEWithLogits", (4, 1), reduction="sum")),
}


@named("derivatives, case", BACKPACK)
def test_the_columns_of_backpack(derivatives, case):
    """Column by column, in BackPACK's order."""
    pytest.importorskip("backpack", reason="BackPACK is not installed")
    module_name, class_name = derivatives.split(".")
    theirs = getattr(importlib.import_module(f"backpack.core.derivatives.{module_name}"), class_name)()
    loss, prediction, target = case.double()
    loss.input0, loss.input1, loss.output = prediction, target, loss(prediction, target)
    hessian = loss_hessian(loss, prediction, target)
    assert_close("exact", columns_of(hessian.exact), theirs.sqrt_hessian(loss, None, None), 1e-12)
    sampled = columns_of(hessian.sampled(6))
    assert sampled.shape == theirs.sqrt_hessian_sampled(loss, None, None, mc_samples=6).shape


# ---- host synchronisation


class Reads(TorchDispatchMode):
    """Counts the operations at which the host would wait for a CUDA device."""

    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "multinomial", "unique", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in self.waiting
        if function.overloadpacket.__name__ == "index":
            self.count += any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return function(*args, **(kwargs or {}))


@named("case", NAMED)
def test_values_are_read_only_where_a_check_needs_them(case):
    loss, prediction, target = case.double()

    def reads() -> int:
        with Reads() as mode:
            hessian = loss_hessian(loss, prediction, target)
            for root in (hessian.exact, hessian.reduced, hessian.sampled(2)):
                root.form(0, root.count)
        return mode.count

    weights = sum(name in case.options for name in ("weight", "pos_weight"))
    soft = case.soft and case.loss is nn.CrossEntropyLoss
    each_time = soft or "pos_weight" in case.options
    assert reads() == weights + each_time
    assert reads() == each_time
    if weights:
        with torch.no_grad():
            getattr(loss, "weight" if "weight" in case.options else "pos_weight").mul_(2)
        assert reads() == 1 + each_time


# ---- keyword arguments, subclasses, errors


def test_keyword_arguments():
    loss, prediction, target = NAMED["ce"].double()
    expected = columns_of(loss_hessian(loss, prediction, target).exact)
    for hessian in (
        loss_hessian(loss, input=prediction, target=target),
        loss_hessian(loss, prediction, target=target),
        loss_hessian(loss, target=target, input=prediction),
    ):
        assert isinstance(hessian, LossHessian) and torch.equal(columns_of(hessian.exact), expected)
    with pytest.raises(TypeError):
        loss_hessian(loss, prediction)


def test_a_loss_is_known_by_its_forward():
    class Renamed(nn.MSELoss):
        pass

    class Changed(nn.MSELoss):
        def forward(self, input, target):
            return super().forward(input, target) ** 2

    assert all(map(is_loss, (nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss(), Renamed())))
    assert not any(map(is_loss, (Changed(), nn.L1Loss(), nn.Linear(1, 1), nn.BCELoss(), nn.NLLLoss())))
    with pytest.raises(NotImplementedError, match=r"loss L1Loss: make it known by .*register_loss\(L1Loss"):
        loss_hessian(nn.L1Loss(), torch.zeros(2), torch.zeros(2))


LOGITS, CLASSES = torch.zeros(4, 3), torch.zeros(4, dtype=torch.long)
NEGATIVE = torch.tensor([1.0, -0.5, 1.0])
ERRORS = {
    "mse none": (nn.MSELoss(reduction="none"), LOGITS, LOGITS, ValueError, "Output must be scalar.*got 'none'"),
    "ce none": (nn.CrossEntropyLoss(reduction="none"), LOGITS, CLASSES, ValueError, "Output must be scalar"),
    "bce none": (nn.BCEWithLogitsLoss(reduction="none"), LOGITS, LOGITS, ValueError, "Output must be scalar"),
    "mse broadcast": (nn.MSELoss(), LOGITS, LOGITS[:, :1], ValueError, r"target: expected.*\[4, 3\].*got \[4, 1\]"),
    "mse scalar": (nn.MSELoss(), LOGITS[0, 0], LOGITS[0, 0], ValueError, "expected at least 1 dimension"),
    "bce broadcast": (nn.BCEWithLogitsLoss(), LOGITS, LOGITS[0], ValueError, r"target: expected.*got \[3\]"),
    "ce unbatched": (nn.CrossEntropyLoss(), LOGITS[0], CLASSES[0], ValueError, "at least 2 dimensions .*batch"),
    "ce target shape": (nn.CrossEntropyLoss(), LOGITS, CLASSES[:3], ValueError, r"expected class indices \[4\]"),
    "ce integer probabilities": (nn.CrossEntropyLoss(), LOGITS, LOGITS.long(), TypeError, "expected probabilities"),
    "ce float indices": (nn.CrossEntropyLoss(), LOGITS, LOGITS[:, 0], TypeError, "expected class indices"),
    "ce negative target": (nn.CrossEntropyLoss(), LOGITS, NEGATIVE.expand(4, 3), ValueError, "down to -0.5"),
    "ce negative weight": (nn.CrossEntropyLoss(weight=NEGATIVE), LOGITS, CLASSES, ValueError, "weight.*got -0.5"),
    "ce weight shape": (nn.CrossEntropyLoss(weight=torch.ones(2)), LOGITS, CLASSES, ValueError, r"\[3\], got \[2\]"),
    "bce negative weight": (nn.BCEWithLogitsLoss(weight=NEGATIVE), LOGITS, LOGITS, ValueError, "weight.*got -0.5"),
    "bce negative pos_weight": (
        nn.BCEWithLogitsLoss(pos_weight=NEGATIVE),
        LOGITS,
        LOGITS,
        ValueError,
        "pos_weight.*got -0.5",
    ),
    "bce target beyond 1": (
        nn.BCEWithLogitsLoss(pos_weight=torch.zeros(3)),
        LOGITS,
        LOGITS + 2,
        ValueError,
        "between 0 and 1",
    ),
    "bce weight shape": (nn.BCEWithLogitsLoss(weight=torch.ones(4)), LOGITS, LOGITS, ValueError, r"got \[4\]"),
    "bce pos_weight rank": (
        nn.BCEWithLogitsLoss(pos_weight=torch.ones(1, 1, 1)),
        LOGITS,
        LOGITS,
        ValueError,
        r"got \[1, 1, 1\]",
    ),
    "prediction type": (nn.MSELoss(), LOGITS.long(), LOGITS, TypeError, "MSELoss input: expected float32"),
    "prediction no tensor": (nn.MSELoss(), 1.0, LOGITS, TypeError, "input: expected a Tensor, got float"),
    "target no tensor": (nn.CrossEntropyLoss(), LOGITS, 1, TypeError, "target: expected a Tensor, got int"),
    "mse target no tensor": (nn.MSELoss(), LOGITS, 1, TypeError, "target: expected a Tensor, got int"),
}


@named("loss, prediction, target, error, message", ERRORS)
def test_errors(loss, prediction, target, error, message):
    with pytest.raises(error, match=message):
        loss_hessian(loss, prediction, target)


# ---- registered losses


class PoissonLoss(nn.Module):
    """Poisson regression with a factor per sample: the Hessian is diag(factor * exp(f))."""

    def forward(self, rate, counts, factors=None):
        losses = rate.exp() - counts * rate
        return (losses if factors is None else losses * factors).sum()


def poisson_root(module: nn.Module, rate: Tensor, counts: Tensor, factors: Tensor | None = None) -> Tensor:
    entries = (0.5 * rate).exp()  # [N, D]
    if factors is not None:
        entries = entries * factors.sqrt()
    return torch.diag_embed(entries).movedim(1, 0)  # [D, N, D]


def poisson_operands() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(4, 3, dtype=torch.float64),
        torch.randint(4, (4, 3)).double(),
        torch.rand(4, 1, dtype=torch.float64),
    )


def test_a_registered_loss():
    assert not is_loss(PoissonLoss())
    register_loss(PoissonLoss, poisson_root)
    loss, (rate, counts, factors) = PoissonLoss(), poisson_operands()
    assert is_loss(loss)
    expected = hessian_blocks(lambda f, y: loss(f, y, factors), rate, counts)
    for hessian in (
        loss_hessian(loss, rate, counts, factors),
        loss_hessian(loss, rate, factors=factors, counts=counts),
        loss_hessian(loss, counts=counts, factors=factors, rate=rate),
    ):
        assert hessian.prediction is rate and hessian.normalisation == 1
        assert_close("exact", blocks_of(hessian.exact, rate), expected, 1e-12)
        assert_close("reduced", blocks_of(hessian.reduced, rate), expected, 1e-12)
        assert_close("sampled", blocks_of(hessian.sampled(20_000), rate), expected, 0.05)
        draws = columns_of(hessian.sampled(20_000))  # [M, N, D]
        across = torch.einsum("mi,mj->ij", draws[:, 0], draws[:, 1])
        assert_close("across samples", across, torch.zeros(3, 3), 0.05, expected.abs().max().item())
        root = hessian.sampled(4)
        assert torch.equal(columns_of(root), torch.cat([root.form(v, v + 1)[0] for v in range(4)]))
    assert torch.autograd.gradcheck(
        lambda rate: columns_of(loss_hessian(loss, rate, counts, factors).exact), rate.requires_grad_()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_registered_loss_in_every_type(dtype):
    register_loss(PoissonLoss, poisson_root)
    rate, counts = (operand.to(dtype) for operand in poisson_operands()[:2])
    assert columns_of(loss_hessian(PoissonLoss(), rate, counts).sampled(3)).dtype == dtype


def test_registration_holds_for_the_same_forward():
    class Renamed(PoissonLoss):
        pass

    class Changed(PoissonLoss):
        def forward(self, rate, counts):
            return -super().forward(rate, counts)

    class Halved(nn.MSELoss):
        def forward(self, input, target):
            return super().forward(input, target) / 2

    register_loss(PoissonLoss, poisson_root)
    assert is_loss(Renamed()) and not is_loss(Changed()) and not is_loss(Halved())
    register_loss(Halved, lambda module, input, target: torch.zeros(1, *input.shape))
    assert is_loss(Halved()) and loss_hessian(Halved(), LOGITS, LOGITS).exact.count == 1
    assert loss_hessian(nn.MSELoss(), LOGITS, LOGITS).exact.count == 3


RETURNED = {
    "no tensor": (None, TypeError, "hessian_sqrt of Custom: expected a Tensor, got NoneType"),
    "one column without V": (LOGITS, ValueError, r"expected \[V, \*prediction.shape\].*got \[4, 3\]"),
    "samples first": (torch.zeros(4, 3, 3), ValueError, r"prediction \[4, 3\], got \[4, 3, 3\]"),
    "type": (torch.zeros(3, 4, 3, dtype=torch.float64), TypeError, "expected torch.float32.*got torch.float64"),
    "device": (torch.zeros(3, 4, 3, device="meta"), ValueError, "device cpu, got meta"),
}


@named("returned, error, message", RETURNED)
def test_what_a_registered_function_returns_is_checked(returned, error, message):
    class Custom(nn.Module):
        def forward(self, prediction):
            return prediction.sum()

    register_loss(Custom, lambda module, prediction: returned)
    with pytest.raises(error, match=message):
        loss_hessian(Custom(), LOGITS)


def test_registration_checks_its_arguments():
    with pytest.raises(TypeError, match="module_class: expected a subclass of torch.nn.Module"):
        register_loss(nn.MSELoss(), poisson_root)
    with pytest.raises(TypeError, match="hessian_sqrt: expected a function, got str"):
        register_loss(PoissonLoss, "root")
    register_loss(PoissonLoss, poisson_root)
    with pytest.raises(TypeError, match="PoissonLoss input: expected a Tensor"):
        loss_hessian(PoissonLoss(), 1.0, LOGITS)
