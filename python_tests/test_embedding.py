"""nn.Embedding: every quantity against loops over positions and samples, in all its options."""

import copy
import functools
import resource

import pytest
import torch
import torch.nn.functional as F
from curvature_oracle import curvature, hessian_diagonals
from helpers import assert_close, named
from oracle import from_per_sample, model_statistics, per_sample_gradients
from torch import Tensor, nn

import backpack_cuda as bp
from backpack_cuda import backpack, extend
from backpack_cuda.extensions import (
    GGNMP,
    HMP,
    KFLR,
    BatchDiagGGNExact,
    BatchDiagHessian,
    BatchGrad,
    BatchL2Grad,
    DiagGGNExact,
    DiagGGNMC,
    DiagHessian,
    SqrtGGNExact,
    SumGradSquared,
    Variance,
)
from backpack_cuda.per_sample import columns, dense
from backpack_cuda.per_sample import embedding as embedding_use

FIRST_ORDER = {
    "grad_batch": "batch_grad",
    "batch_l2": "batch_l2",
    "sum_grad_squared": "sum_grad_squared",
    "variance": "variance",
}
OPTIONS = {
    "plain": {},
    "padding": {"padding_idx": 1},
    "padding from the end": {"padding_idx": -1},
    "max_norm": {"max_norm": 0.7},
    "scaled": {"scale_grad_by_freq": True},
    "scaled, padding": {"scale_grad_by_freq": True, "padding_idx": 2},
    "sparse": {"sparse": True},
    "sparse, padding, max_norm": {"sparse": True, "padding_idx": 0, "max_norm": 0.5, "norm_type": 1.0},
}
SHAPES = {
    "vector": (6,),
    "sequences": (5, 7),
    "grids": (3, 2, 4),
    "single positions": (4, 1),
    "one sample": (1, 6),
    "one token": (),
}
EMPTY = {"no samples": (0, 3), "no tokens": (0,), "no positions": (3, 0)}


def first_order() -> list:
    return [BatchGrad(), BatchL2Grad(), SumGradSquared(), Variance()]


def loop(tokens: Tensor, grad_output: Tensor, module: nn.Embedding) -> Tensor:
    """Per-sample gradients [N, E, H], one position after the other; grad_output [N, *, H]."""
    rows = torch.zeros(len(tokens), *module.weight.shape, dtype=torch.float64)
    occurrences = tokens.flatten().tolist()
    for n in range(len(tokens)):
        for token, g in zip(tokens[n].flatten().tolist(), grad_output[n].reshape(-1, rows.shape[2]), strict=True):
            if token != module.padding_idx:
                rows[n, token] += g.double().cpu() / (occurrences.count(token) if module.scale_grad_by_freq else 1)
    return rows


def assert_first_order(parameter: Tensor, gradients: Tensor, tolerance: float = 1e-12) -> None:
    """All first-order quantities of a parameter with the per-sample gradients [N, *P]."""
    exact = from_per_sample(gradients)
    for attribute, field in FIRST_ORDER.items():
        reference = getattr(exact, field) if len(gradients) or field != "variance" else exact.grad
        assert_close(attribute, getattr(parameter, attribute), reference, tolerance)


def backward(module: nn.Module, tokens: Tensor, grad_output: Tensor, *extensions, **options) -> None:
    with backpack(*extensions):
        (module(tokens) * grad_output).sum().backward(**options)


@named("shape", SHAPES | EMPTY)
@named("options", OPTIONS)
def test_first_order(options, shape, device):
    """Against a loop; output, weight and ordinary gradient are bit by bit those of torch's own layer."""
    stock = nn.Embedding(5, 3, **options).double().to(device)
    tokens = torch.randint(5, shape, device=device)
    grad_output = torch.randn(*shape, 3, dtype=torch.float64, device=device)
    module = extend(copy.deepcopy(stock))
    backward(module, tokens, grad_output, *first_order())
    assert torch.equal(module(tokens), stock(tokens))
    batched = (tokens, grad_output) if shape else (tokens[None], grad_output[None])  # torch fails at one sparse token
    (stock(batched[0]) * batched[1]).sum().backward()
    assert torch.equal(module.weight, stock.weight)
    assert module.weight.grad.layout == stock.weight.grad.layout
    assert_close("grad", module.weight.grad.to_dense(), stock.weight.grad.to_dense().cpu(), 1e-14)
    assert_first_order(module.weight, loop(*batched, module))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_types_of_tokens(dtype, scaled, device):
    """Also tokens that are not contiguous, and the layer class."""
    module = bp.Embedding(5, 3, scale_grad_by_freq=scaled, device=device, dtype=torch.float64)
    tokens = torch.randint(5, (4, 6), dtype=dtype, device=device).mT
    grad_output = torch.randn(3, 6, 4, dtype=torch.float64, device=device).permute(1, 2, 0)
    backward(module, tokens, grad_output, *first_order())
    assert_first_order(module.weight, loop(tokens, grad_output, module))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_types_of_the_weight(dtype, tolerance, device):
    """Squares are sums of float32, the per-sample gradients in the parameter's type."""
    module = extend(nn.Embedding(5, 3, padding_idx=0).to(device, dtype))
    tokens, grad_output = torch.randint(5, (4, 6), device=device), torch.randn(4, 6, 3, device=device).to(dtype)
    backward(module, tokens, grad_output, *first_order())
    assert module.weight.grad_batch.dtype == dtype
    exact = from_per_sample(loop(tokens, grad_output, module))
    assert_close("grad_batch", module.weight.grad_batch, exact.batch_grad, tolerance)
    for attribute in ("batch_l2", "sum_grad_squared", "variance"):
        assert getattr(module.weight, attribute).dtype == torch.float32
        assert_close(attribute, getattr(module.weight, attribute), getattr(exact, attribute), 1e-6)


def test_variance_does_not_cancel(device):
    """A mean that is 10,000 times the spread, in float32; a token of half the samples deviates by the mean."""
    tokens = torch.tensor([[0, 1], [0, 2]] * 50, device=device)
    grad_output = (1e4 + torch.randn(100, 2, 4)).to(device)
    module = extend(nn.Embedding(3, 4).to(device))
    backward(module, tokens, grad_output, Variance())
    expected = from_per_sample(loop(tokens, grad_output, module)).variance
    assert_close("variance of token 0", module.weight.variance[0], expected[0], 1e-2)
    assert_close("variance", module.weight.variance, expected, 1e-6)
    assert (module.weight.variance >= 0).all()


def test_padding_keeps_values_that_are_not_finite_out(device):
    module = extend(nn.Embedding(5, 3, padding_idx=4).double().to(device))
    tokens = torch.tensor([[4, 1], [0, 4]], device=device)
    grad_output = torch.where(tokens == 4, torch.nan, 1.0).double().unsqueeze(2).expand(2, 2, 3)
    backward(module, tokens, grad_output, *first_order())
    assert_first_order(module.weight, loop(tokens, grad_output, module))


@pytest.mark.parametrize("scaled", [False, True])
def test_subsampling(scaled, device):
    """The frequencies remain those of the whole batch."""
    module = extend(nn.Embedding(5, 3, scale_grad_by_freq=scaled).double().to(device))
    tokens, grad_output = torch.randint(5, (4, 6), device=device), torch.randn(4, 6, 3, device=device).double()
    backward(module, tokens, grad_output, BatchGrad(subsampling=[2, 0, 2]))
    assert_close("grad_batch", module.weight.grad_batch, loop(tokens, grad_output, module)[[2, 0, 2]], 1e-12)


def test_frozen_and_idle(device):
    """Nothing is prepared for a frozen weight; without extensions the gradient is torch's."""
    module = extend(nn.Embedding(5, 3).double().to(device))
    tokens = torch.randint(5, (4, 6), device=device)
    module.weight.requires_grad_(False)
    assert module(tokens).grad_fn is None
    module.weight.requires_grad_()
    grad_output = torch.randn(4, 6, 3, dtype=torch.float64, device=device)
    backward(module, tokens, grad_output)
    (expected,) = torch.autograd.grad((F.embedding(tokens, module.weight) * grad_output).sum(), module.weight)
    assert torch.equal(module.weight.grad, expected)
    assert not [name for name in FIRST_ORDER if hasattr(module.weight, name)]


def test_the_gradient_is_differentiable():
    """As torch's, also without extensions."""
    module, tokens = extend(nn.Embedding(5, 3, padding_idx=1).double()), torch.randint(5, (3, 4))

    def gradient(grad_output: Tensor) -> Tensor:
        return torch.autograd.grad(module(tokens), module.weight, grad_output, create_graph=True)[0]

    assert torch.autograd.gradcheck(gradient, torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True))


def test_autocast_leaves_it_alone(device):
    module = extend(nn.Embedding(5, 3).to(device))
    tokens = torch.randint(5, (4, 6), device=device)
    with torch.autocast(device.type, torch.bfloat16):
        output = module(tokens)
    assert output.dtype == torch.float32
    with backpack(*first_order()):
        output.sum().backward()
    assert_first_order(module.weight, loop(tokens, torch.ones(4, 6, 3), module), 1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Several uses of a weight
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_used_twice(options, device):
    """With different numbers of positions; frequencies are those of each call, as torch's."""
    module = extend(nn.Embedding(5, 3, **options).double().to(device))
    calls = [torch.randint(5, shape, device=device) for shape in ((4, 6), (4,), (4, 2, 2))]
    grads = [torch.randn(*tokens.shape, 3, device=device).double() for tokens in calls]
    with backpack(*first_order()):
        sum((module(t) * g).sum() for t, g in zip(calls, grads, strict=True)).backward()
    expected = sum(loop(t, g, module) for t, g in zip(calls, grads, strict=True))
    assert_close("sum", module.weight.grad.to_dense(), expected.sum(0), 1e-12)
    assert_first_order(module.weight, expected)


class Tied(nn.Module):
    """A language model: logits [N, C, T] by the embedding's own weight, which may be used a third time."""

    def __init__(self, **options):
        super().__init__()
        self.embedding, self.mix, self.out = nn.Embedding(5, 3, **options), nn.Linear(3, 3), nn.Linear(3, 5)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.mix(self.embedding(tokens)) + self.embedding(tokens.flip(1))
        return self.out(torch.tanh(h)).transpose(1, 2)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}], ids=str)
def test_tied_with_a_linear_layer(options, chunk, device, monkeypatch):
    """All samples at once, or sample by sample as where the weight is large."""
    if chunk:
        monkeypatch.setattr(columns, "_CHUNK_ELEMENTS", chunk)
        monkeypatch.setattr(dense, "_CHUNK_ELEMENTS", chunk)
    stock = Tied(**options).double()
    tokens, targets = torch.randint(5, (4, 6)), torch.randint(5, (4, 6))
    loss = nn.CrossEntropyLoss()
    expected = model_statistics(stock, loss, tokens, targets)
    exact = curvature(stock, lambda f: F.cross_entropy(f, targets), tokens)
    model = extend(stock.to(device))
    value = extend(loss)(model(tokens.to(device)), targets.to(device))
    with backpack(*first_order(), DiagGGNExact(), BatchDiagGGNExact(), SqrtGGNExact()):
        value.backward()
    for name, parameter in model.named_parameters():
        root = parameter.sqrt_ggn_exact.flatten(2)
        assert_close(name, torch.einsum("vnp,vnq->npq", root, root), exact.blocks(name), 1e-9)
        assert_first_order(parameter, expected[name].batch_grad)
        assert_close(name, parameter.diag_ggn_exact, exact.diag(name), 1e-9)
        assert_close(name, parameter.diag_ggn_exact_batch, exact.batch_diag(name), 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Second order
# ---------------------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """The embedding's output goes through an elementwise function at once, or after a Linear layer."""

    def __init__(self, deeper: bool, **options):
        super().__init__()
        self.embedding, self.out = nn.Embedding(5, 3, **options), nn.Linear(3, 2)
        self.mix = nn.Linear(3, 3) if deeper else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.tanh(self.mix(self.embedding(tokens))).flatten(1, -2).sum(1))


@pytest.mark.parametrize("deeper", [False, True])
@named("options", OPTIONS)
def test_second_order(options, deeper, device):
    """Diagonals and their terms, the square root and products, of the Gauss-Newton matrix and of the Hessian."""
    stock = Model(deeper, **options).double()
    tokens, targets = torch.randint(5, (4, 6)), torch.randn(4, 2, dtype=torch.float64)
    loss = functools.partial(F.mse_loss, target=targets)
    stock(tokens)  # max_norm changes the weight
    stock.embedding.scale_grad_by_freq = stock.embedding.sparse = False  # the oracle takes one sample at a time
    exact, hessian = curvature(stock, loss, tokens), hessian_diagonals(stock, loss, tokens)
    stock.embedding.scale_grad_by_freq = options.get("scale_grad_by_freq", False)
    stock.embedding.sparse = options.get("sparse", False)
    model = extend(stock.to(device))
    value = extend(nn.MSELoss())(model(tokens.to(device)), targets.to(device))
    diagonals = DiagGGNExact(), BatchDiagGGNExact(), DiagHessian(), BatchDiagHessian()
    with backpack(*diagonals, SqrtGGNExact(), GGNMP(), HMP()):
        value.backward()
    weight, name = model.embedding.weight, "embedding.weight"
    assert_close("diag_ggn_exact", weight.diag_ggn_exact, exact.diag(name), 1e-9)
    assert_close("diag_ggn_exact_batch", weight.diag_ggn_exact_batch, exact.batch_diag(name), 1e-9)
    assert_close("diag_h", weight.diag_h, hessian[name].sum(0), 1e-9)
    assert_close("diag_h_batch", weight.diag_h_batch, hessian[name], 1e-9)
    root = weight.sqrt_ggn_exact.cpu().flatten(2)
    assert_close("sqrt_ggn_exact", torch.einsum("vnp,vnq->npq", root, root), exact.blocks(name), 1e-9)
    identity = torch.eye(15, dtype=torch.float64, device=device).view(15, 5, 3)
    assert_close("ggnmp", weight.ggnmp(identity).view(15, 15), exact.blocks(name).sum(0), 1e-9)
    assert_close("hmp", weight.hmp(identity).view(15, 15).diag(), hessian[name].sum(0).flatten(), 1e-9)


@named("shape", {"no samples": (0, 3), "no positions": (3, 0)})
def test_second_order_of_nothing(shape, device):
    model, loss = extend(Model(True).double().to(device)), extend(nn.MSELoss(reduction="sum"))
    with backpack(DiagGGNExact(), BatchDiagGGNExact(), DiagHessian()):
        output = model(torch.zeros(shape, dtype=torch.long, device=device))
        loss(output, torch.zeros_like(output)).backward()
    weight = model.embedding.weight
    assert weight.diag_ggn_exact_batch.shape == (shape[0], 5, 3)
    assert not weight.diag_ggn_exact.any()
    assert not weight.diag_h.any()


def test_subsampled_square_root(device):
    model, loss = extend(Model(True).double().to(device)), extend(nn.MSELoss())
    tokens, targets = torch.randint(5, (4, 6), device=device), torch.randn(4, 2, dtype=torch.float64, device=device)
    whole, part = SqrtGGNExact(), SqrtGGNExact(subsampling=[3, 0, 3])
    part.savefield = "part"
    with backpack(whole, part):
        loss(model(tokens), targets).backward()
    weight = model.embedding.weight
    assert torch.equal(weight.part, weight.sqrt_ggn_exact[:, [3, 0, 3]])


def test_no_kronecker_factors(device):
    """An error before anything of the size of the weight's per-sample gradients is formed."""
    model, loss = Model(False), extend(nn.MSELoss())
    model.embedding = nn.Embedding(1 << 22, 3)
    extend(model.to(device))
    tokens, targets = torch.randint(5, (64, 6), device=device), torch.randn(64, 2, device=device)
    with backpack(KFLR()), pytest.raises(NotImplementedError, match=r"Embedding.weight of size \[4194304, 3\]"):
        loss(model(tokens), targets).backward()


# ---------------------------------------------------------------------------------------------------------------------
# How
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantity", ["batch_l2", "sum_grad_squared", "variance", "grad_batch"])
def test_differentiable(quantity, device):
    """d(quantity)/d(parameters) against that of per-sample gradients by autograd alone."""
    stock = Model(True, padding_idx=1).double()
    tokens, targets = torch.randint(5, (4, 6)), torch.randn(4, 2, dtype=torch.float64)
    parameters = [stock.embedding.weight, stock.mix.weight, stock.out.weight]

    def contribution(n: int) -> Tensor:
        return F.mse_loss(stock(tokens[n : n + 1]), targets[n : n + 1]) / 4

    rows = [torch.autograd.grad(contribution(n), parameters[:1], create_graph=True)[0] for n in range(4)]
    exact = getattr(from_per_sample(torch.stack(rows)), FIRST_ORDER[quantity])
    probe = torch.randn_like(exact)
    expected = torch.autograd.grad((exact * probe).sum(), parameters)
    model = extend(copy.deepcopy(stock).to(device))
    (extension,) = [ext for ext in first_order() if ext.savefield == quantity]
    with backpack(extension):
        value = F.mse_loss(model(tokens.to(device)), targets.to(device))
        torch.autograd.grad(value, list(model.parameters()), create_graph=True)
    result = getattr(model.embedding.weight, quantity)
    actual = torch.autograd.grad(
        (result * probe.to(device)).sum(), [model.embedding.weight, model.mix.weight, model.out.weight]
    )
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close(quantity, mine, theirs, 1e-10)


def test_curvature_is_differentiable(device):
    """The square root's derivative, by finite differences."""
    model, loss = extend(Model(True, scale_grad_by_freq=True).double().to(device)), extend(nn.CrossEntropyLoss())
    tokens, targets = torch.randint(5, (3, 4), device=device), torch.randint(2, (3,), device=device)
    weight = model.embedding.weight

    def diagonal(create_graph: bool) -> Tensor:
        with backpack(DiagGGNExact()):
            value = loss(model(tokens), targets)
            torch.autograd.grad(value, list(model.parameters()), create_graph=create_graph)
        return weight.diag_ggn_exact.cos().sum()

    (derivative,) = torch.autograd.grad(diagonal(True), model.mix.weight)
    step = 1e-6
    for i, j in ((0, 0), (2, 1)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                model.mix.weight[i, j] += sign * step
            values.append(diagonal(False))
            with torch.no_grad():
                model.mix.weight[i, j] -= sign * step
        assert abs((values[0] - values[1]) / (2 * step) - derivative[i, j]) < 1e-7


def test_memory_is_that_of_the_result(device):
    """Per-sample gradients of this batch would take 2 TiB."""
    n, e, h = 1 << 14, 1 << 20, 32
    model = extend(nn.Sequential(nn.Embedding(e, h), nn.Flatten(), nn.Linear(2 * h, 2)).to(device))
    tokens, targets = torch.randint(e, (n, 2), device=device), torch.randint(2, (n,), device=device)
    with backpack(BatchL2Grad(), SumGradSquared(), DiagGGNMC()):
        extend(nn.CrossEntropyLoss())(model(tokens), targets).backward()
    weight = model[0].weight
    assert weight.batch_l2.shape == (n,)
    assert weight.sum_grad_squared.shape == weight.diag_ggn_mc.shape == (e, h)
    assert ((weight.sum_grad_squared.sum(1) > 0) == (weight.grad.abs().sum(1) > 0)).all()


def test_large_results_are_written_where_they_are_not_zero(device):
    """Of 3 GiB of per-sample gradients a few pages; they are ordinary tensors, which may be changed and copied."""
    module = extend(nn.Embedding(1 << 18, 32, dtype=torch.bfloat16 if device.type == "cuda" else None).to(device))
    tokens = torch.randint(1 << 18, (100, 4), device=device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    backward(module, tokens, torch.ones(100, 4, 32, device=device), BatchGrad())
    rows = module.weight.grad_batch
    if device.type == "cpu":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10  # KiB
    assert rows.shape == (100, 1 << 18, 32)
    for n in (0, 99):
        expected = torch.zeros(1 << 18).index_add(0, tokens[n].cpu(), torch.ones(4))
        assert torch.equal(rows[n].cpu().float(), expected[:, None].expand(-1, 32))
        assert torch.equal(rows[n].clone().mul_(2).sum().cpu().float(), torch.tensor(4 * 32 * 2.0))
    rows[3] = 1
    assert (rows[3] == 1).all()


def test_sums_for_a_gpu(monkeypatch):
    """The way that is taken on CUDA, on the CPU."""
    monkeypatch.setattr(embedding_use, "_on_gpu", lambda tensor: True)
    for options in OPTIONS.values():
        module = extend(nn.Embedding(5, 3, **options).double())
        tokens, grad_output = torch.randint(5, (5, 7)), torch.randn(5, 7, 3, dtype=torch.float64)
        backward(module, tokens, grad_output, *first_order())
        assert_first_order(module.weight, loop(tokens, grad_output, module))
    test_second_order({"padding_idx": 1}, True, torch.device("cpu"))
    test_differentiable("variance", torch.device("cpu"))


def test_results_are_the_same_every_time(device):
    """Bit by bit, on one thread and on two."""
    module = extend(nn.Embedding(50, 40).to(device))
    tokens, grad_output = torch.randint(50, (16, 300), device=device), torch.randn(16, 300, 40, device=device)
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        backward(module, tokens, grad_output, *first_order())
        found.append([getattr(module.weight, name) for name in FIRST_ORDER])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_positions_of_a_sample_may_come_in_any_order():
    """Against gradients per sample of the stock layer, with a random number of repetitions."""
    module = nn.Embedding(4, 2).double()
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        n, t = torch.randint(1, 6, (2,), generator=generator).tolist()
        tokens = torch.randint(4, (n, t), generator=generator)
        grad_output = torch.randn(n, t, 2, dtype=torch.float64, generator=generator)
        (expected,) = per_sample_gradients(
            lambda i, x=tokens, g=grad_output: (F.embedding(x[i], module.weight) * g[i]).sum(), [module.weight], n
        )
        extended = extend(copy.deepcopy(module))
        backward(extended, tokens, grad_output, *first_order())
        assert_first_order(extended.weight, expected)
