"""Every known error of BackPACK 1.7.1, one test each: that it is still there, and that we are right."""

import importlib
import warnings

import pytest
import torch
from backpack_matrix import COLUMNS, RIGHT, ROWS, WRONG
from backpack_verdicts import after_one_step, reference, verdict
from curvature_oracle import curvature
from helpers import assert_close
from oracle import from_per_sample, model_statistics, per_sample_gradients
from torch import Tensor, nn

pytest.importorskip("backpack", reason="BackPACK is not installed")
LIBRARIES = "backpack", "backpack_cuda"


@pytest.fixture(autouse=True)
def without_backpacks_warnings():
    """Those that BackPACK, or torch about BackPACK's hooks, gives on every program."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing|The Kronecker factors stored")
        yield


def parts(library: str):
    """`backpack`, `extend`, and the module `extensions` of a library."""
    module = importlib.import_module(library)
    return module.backpack, module.extend, importlib.import_module(f"{library}.extensions")


def assert_wrong_there(*cells: tuple[str, str], dtype: torch.dtype = torch.float64) -> None:
    """BackPACK's verdict on the (row, column) of the matrix is wrong, ours is right."""
    for name, column in cells:
        assert verdict("backpack", name, column, dtype)[0] == WRONG, (name, column)
        assert verdict("backpack_cuda", name, column)[0] == RIGHT, (name, column)


def test_1_squared_norms_of_grouped_convolutions():
    assert_wrong_there(("Conv2d, groups", "BatchL2Grad"), ("ConvTranspose2d, groups", "BatchL2Grad"))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_2_padding_of_convolutions(mode):
    name = f"Conv2d, padding_mode='{mode}'"
    assert_wrong_there(*((name, column) for column in COLUMNS))
    assert_wrong_there(*(("Conv2d, padding='same'", column) for column in ("BatchGrad", "SumGradSquared", "Variance")))


@pytest.mark.parametrize("modify", ["clip", "abs"])
def test_3_products_with_the_positive_curvature_hessian(modify):
    """BackPACK multiplies the residual by the output gradient twice; ours is that of the recursion."""
    row, oracle = ROWS["Tanh"], reference("Tanh")
    for library in LIBRARIES:
        backpack, extend, extensions = parts(library)
        model = extend(row.model(library))
        with backpack(extensions.PCHMP(modify=modify)):
            extend(row.loss())(model(oracle.inputs), oracle.targets).backward()
            vectors, expected = oracle.products("0.weight", "pchmp", modify)
            product = model[0].weight.pchmp(vectors)
        error = (product - expected).abs().max() / expected.abs().max()
        assert error > 1e-3 if library == "backpack" else error < 1e-9


def test_4_divisor_override_of_average_pooling():
    columns = [c for c in list(COLUMNS)[4:] if c != "KFAC"]  # whose draws differ
    assert_wrong_there(*(("AvgPool2d, divisor_override", column) for column in columns), dtype=torch.float32)


def test_5_ignored_targets_of_cross_entropy():
    columns = [c for c in list(COLUMNS)[4:] if c != "KFAC"]
    assert_wrong_there(*(("CrossEntropyLoss, targets -100", column) for column in columns))


def test_6_dropout_of_zeros():
    """An activation of exactly 0 that dropout keeps: its derivative is not 0."""

    def build():
        model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.0), nn.Linear(2, 3)).double()
        nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
        return model

    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))
    theirs, ours = (after_one_step(library, build, x, y, "DiagGGNExact") for library in LIBRARIES)
    torch.manual_seed(0)
    expected = curvature(build(), lambda outputs: nn.functional.cross_entropy(outputs, y), x)
    assert theirs[0].weight.diag_ggn_exact.abs().max() == 0
    assert_close("0.weight", ours[0].weight.diag_ggn_exact, expected.diag("0.weight"), 1e-9)


class WithState(nn.Module):
    """An LSTM with an initial state for every sample, and the loss of what `choose` takes of its results."""

    def __init__(self, choose):
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.choose = choose

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 2]
        state = x[:, 0, 0].expand(1, 3, len(x)).mT.contiguous()  # [1, N, 3]
        return self.choose(*self.lstm(x, (state, -state)))


@pytest.mark.parametrize("result", ["output", "cell state"])
def test_7_lstm_with_a_state(result):
    """BackPACK takes an initial state for 0, and forms nothing where the loss comes from the final state."""

    def build():
        return WithState((lambda out, states: out[:, -1]) if result == "output" else (lambda out, states: states[1][0]))

    x, y = torch.randn(4, 3, 2, dtype=torch.float64), torch.randint(3, (4,))
    torch.manual_seed(0)
    model = build().double()
    expected = model_statistics(model, nn.CrossEntropyLoss(), x, y)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Extension saving to .*WithState")
        theirs, ours = (dict(after_one_step(lib, build, x, y, "BatchGrad").named_parameters()) for lib in LIBRARIES)
    name = "lstm.weight_hh_l0"
    if result == "output":
        error = (theirs[name].grad_batch - expected[name].batch_grad).abs().max()
        assert error > 1e-2 * expected[name].batch_grad.abs().max()
    else:
        assert not hasattr(theirs[name], "grad_batch")
    for name, parameter in ours.items():
        assert_close(name, parameter.grad_batch, expected[name].batch_grad, 1e-9)


@pytest.mark.parametrize(
    "name, column",
    [("AvgPool2d", "DiagGGN"), ("Embedding", "BatchGrad"), ("MaxPool2d", "KFRA"), ("MSELoss", "KFRA")],
)
def test_8_types(name, column):
    """float64 is an error there."""
    assert isinstance(verdict("backpack", name, column)[1], RuntimeError)
    assert verdict("backpack_cuda", name, column) == (RIGHT, None)


def test_8_autocast():
    """The second order under autocast is an error there; ours is that of float32 up to bfloat16's rounding."""
    x, y = torch.randn(8, 5), torch.randint(3, (8,))
    found = {}
    for library in LIBRARIES:
        backpack, extend, extensions = parts(library)
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            model = extend(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = extend(nn.CrossEntropyLoss())(model(x), y)
            with backpack(extensions.DiagGGNExact()):
                if library == "backpack" and dtype == torch.bfloat16:
                    with pytest.raises(RuntimeError):
                        loss.backward()
                else:
                    loss.backward()
                    found[library, dtype] = model[0].weight.diag_ggn_exact.double()
    exact = found["backpack", torch.float32]
    assert_close("float32", found["backpack_cuda", torch.float32], exact, 1e-5)
    assert_close("bfloat16", found["backpack_cuda", torch.bfloat16], exact, 0.05)


def test_9_a_module_used_twice():
    def build():
        layer = nn.Linear(3, 3)
        return nn.Sequential(layer, nn.Tanh(), layer)

    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randint(3, (4,))
    with pytest.raises(AttributeError, match="output|input0"):
        after_one_step("backpack", build, x, y, "BatchGrad", "DiagGGNExact")
    ours = dict(after_one_step("backpack_cuda", build, x, y, "BatchGrad", "DiagGGNExact").named_parameters())
    torch.manual_seed(0)
    model = build().double()
    gradients = model_statistics(model, nn.CrossEntropyLoss(), x, y)
    ggn = curvature(model, lambda outputs: nn.functional.cross_entropy(outputs, y), x)
    for name, parameter in ours.items():
        assert_close(name, parameter.grad_batch, gradients[name].batch_grad, 1e-9)
        assert_close(name, parameter.diag_ggn_exact, ggn.diag(name), 1e-9)


def test_9_two_forward_passes_before_the_backward_pass():
    """BackPACK differentiates the first loss with the inputs of the second forward pass, or fails."""
    first, second = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    y = torch.randint(3, (4,))
    for library in LIBRARIES:
        backpack, extend, extensions = parts(library)
        torch.manual_seed(0)
        model = extend(nn.Sequential(nn.Linear(3, 3)).double())
        loss = nn.functional.cross_entropy(model(first), y)
        model(second)
        with backpack(extensions.BatchGrad()):
            loss.backward()
        expected = per_sample_gradients(
            lambda n, m=model: nn.functional.cross_entropy(m(first[n : n + 1]), y[n : n + 1]) / 4,
            list(model.parameters()),
            4,
        )
        error = (model[0].weight.grad_batch - expected[0]).abs().max()
        assert error > 1e-2 if library == "backpack" else error < 1e-12


@pytest.mark.parametrize("name", ["HMP", "GGNMP", "PCHMP"])
def test_10_products_after_a_further_forward_pass(name):
    """BackPACK's products read the layers' last inputs when they are called."""
    first, second = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    y = torch.randint(3, (4,))
    for library in LIBRARIES:
        backpack, extend, extensions = parts(library)
        torch.manual_seed(0)
        model = extend(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double())
        ext = getattr(extensions, name)()
        with backpack(ext):
            extend(nn.CrossEntropyLoss())(model(first), y).backward()
        product = getattr(model[0].weight, ext.savefield)
        v = torch.randn(2, 3, 3, dtype=torch.float64)
        before = product(v)
        model(second)
        assert torch.allclose(product(v), before) == (library == "backpack_cuda")


def test_11_saved_quantities_of_an_extension_that_is_used_again():
    """With an input that requires a gradient BackPACK keeps what it backpropagated, under a memory address."""
    for library in LIBRARIES:
        backpack, extend, extensions = parts(library)
        model, loss_function = extend(nn.Sequential(nn.Linear(3, 3))), extend(nn.CrossEntropyLoss())
        ext = extensions.DiagGGNExact()
        for _ in range(3):
            x = torch.randn(4, 3, requires_grad=True)
            with backpack(ext):
                loss_function(model(x), torch.randint(3, (4,))).backward()
        left = len(ext.saved_quantities._saved_quantities)
        assert left > 0 if library == "backpack" else left == 0


def test_12_average_pooling_draws_no_random_numbers():
    x, y = torch.randn(4, 1, 4, 4), torch.randint(4, (4,))
    for library in LIBRARIES:
        backpack, extend, extensions = parts(library)
        model = extend(nn.Sequential(nn.Conv2d(1, 1, 1), nn.AvgPool2d(2), nn.Flatten()))
        loss = extend(nn.CrossEntropyLoss())(model(x), y)
        before = torch.get_rng_state()
        with backpack(extensions.DiagGGNExact()):
            loss.backward()
        assert torch.equal(torch.get_rng_state(), before) == (library == "backpack_cuda")


def test_13_variance_that_is_small_against_the_mean():
    """In float32, E[g^2] - E[g]^2 has no digit left where the spread is 1e-4 of the mean."""
    x = (1 + 1e-4 * torch.randn(16, 3, dtype=torch.float64)).float()
    gradient = torch.ones(16, 2)
    errors = {}
    for library in LIBRARIES:
        backpack, extend, extensions = parts(library)
        model = extend(nn.Sequential(nn.Linear(3, 2)))
        with backpack(extensions.Variance()):
            model(x).backward(gradient)
        expected = from_per_sample(torch.einsum("no,ni->noi", gradient.double(), x.double())).variance
        errors[library] = ((model[0].weight.variance - expected).abs().max() / expected.max()).item()
    assert errors["backpack"] > 0.1 and errors["backpack_cuda"] < 1e-4
