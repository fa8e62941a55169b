"""Kronecker factors under each convention: against sums over explicit patches, and where they are exact."""

import pytest
import torch
from curvature_oracle import curvature, joined, layer_uses, square_root
from curvature_tools import CONVENTIONS, assert_factors, assert_nothing_saved, backward, expected_factors
from helpers import assert_close, named, some
from model_cases import LAYERS, MODELS, SelfAttention, Shared, Tied
from torch import Tensor, nn

from backpack_cuda import backpack, extend
from backpack_cuda.extensions import KFAC, KFLR, DiagGGNExact

# Name -> (layer, shape of a batch of inputs); each is followed by Tanh, Flatten and a Linear layer.
LAYER_CASES = {
    "linear": (lambda: nn.Linear(4, 3), (4, 4)),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), (4, 4)),
    "linear, positions": (lambda: nn.Linear(4, 3), (3, 3, 4)),
    "linear, grid": (lambda: nn.Linear(3, 2), (2, 2, 3, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2), (3, 2, 8)),
    "conv1d, groups": (lambda: nn.Conv1d(4, 6, 2, groups=2), (3, 4, 5)),
    "conv1d, circular": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), (3, 2, 4)),
    "conv1d, same, reflect": (lambda: nn.Conv1d(2, 3, 3, padding="same", padding_mode="reflect"), (3, 2, 4)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (2, 3), padding=(1, 0)), (2, 2, 4, 5)),
    "conv2d, stride": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), (2, 2, 5, 6)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, (3, 1), dilation=(1, 2), padding="same"), (2, 2, 4, 3)),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (2, 3, 4, 4)),
    "conv2d, replicate": (lambda: nn.Conv2d(2, 3, 2, padding=1, padding_mode="replicate"), (2, 2, 3, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 2), stride=(1, 2, 1), padding=(0, 1, 0)), (2, 2, 2, 3, 3)),
    "conv3d, groups": (lambda: nn.Conv3d(2, 2, 2, groups=2, dilation=(1, 2, 1)), (2, 2, 2, 3, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1, output_padding=1), (3, 2, 4)),
    "transposed 1d, groups": (lambda: nn.ConvTranspose1d(4, 6, 2, stride=3, groups=2), (3, 4, 3)),
    "transposed 1d, dilated": (lambda: nn.ConvTranspose1d(2, 3, 3, dilation=2, padding=2), (3, 2, 4)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 3, (2, 3), stride=(1, 2), padding=(0, 1)), (2, 2, 3, 2)),
    "transposed 2d, depthwise": (lambda: nn.ConvTranspose2d(2, 4, 2, stride=2, groups=2), (2, 2, 2, 3)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1), padding=(1, 0, 0)), (2, 2, 3, 2, 2)),
}  # fmt: skip


def model_around(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    layer = layer.double()
    with torch.no_grad():
        size = layer(torch.zeros(shape).double())[0].numel()
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(size, 3)).double()


def data_for(model: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        return inputs, torch.randint(model(inputs).shape[1], shape[:1])


@named("build, shape", LAYER_CASES)
def test_the_patches_of_the_oracle(build, shape):
    """sum_r b a^T is the gradient that autograd forms: rows, groups and orders of the oracle are the layer's."""
    model = model_around(build(), shape)
    inputs, targets = data_for(model, shape)
    expected = curvature(model, lambda f: nn.functional.cross_entropy(f, targets), inputs)
    roots = square_root(expected.hessian)
    layer, (use,) = model[0], layer_uses(model, inputs, roots)["0"]
    products = torch.einsum("vnrgo,nrgi->vngoi", use.columns, use.patches)
    gradients = expected.columns(roots, "0.weight")
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # [C_in, C_out / groups, *kernel]
        gradients = gradients.unflatten(2, (layer.groups, -1)).transpose(3, 4)  # [V, N, G, C_out/G, C_in/G, *k]
    assert_close("weight", products.flatten(), gradients.flatten(), 1e-12)
    if layer.bias is not None:
        assert_close("bias", use.columns.sum(2).flatten(2), expected.columns(roots, "0.bias"), 1e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
@named("build, shape", LAYER_CASES)
def test_kflr(build, shape, convention, device):
    model = model_around(build(), shape)
    inputs, targets = data_for(model, shape)
    expected = curvature(model, lambda f: nn.functional.cross_entropy(f, targets), inputs)
    factors = expected_factors(model, inputs, square_root(expected.hessian), convention)
    kflr = KFLR(convention=convention)
    backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), kflr)
    assert_factors(model, "kflr", factors)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("how", list(LAYERS))
@named("case", some(MODELS, "cnn", "decoder", "shared modules", "tied weights", "recurrent use", "tokens, mse"))
def test_kflr_of_models(case, how, convention, device):
    """Uses of a shared or tied weight are further positions r."""
    inputs, targets = case.data()
    stock = case.stock()
    expected = curvature(stock, lambda f: case.loss(f, targets), inputs)
    factors = expected_factors(stock, inputs, square_root(expected.hessian), convention)
    model = case.prepared(how).to(device)
    backward(model, case.loss, inputs.to(device), targets.to(device), KFLR(convention=convention))
    assert_factors(model, "kflr", factors)


@named("build, shape", some(LAYER_CASES, "linear", "linear, no bias"))
def test_the_conventions_agree_for_one_position(build, shape, device):
    results = []
    for convention in CONVENTIONS:
        torch.manual_seed(0)
        model = model_around(build(), shape)
        inputs, targets = data_for(model, shape)
        kflr = KFLR(convention=convention)
        backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), kflr)
        results.append({name: p.kflr for name, p in model.named_parameters()})
    for other in results[1:]:
        for name, factors in results[0].items():
            for mine, theirs in zip(other[name], factors, strict=True):
                assert_close(name, mine, theirs.cpu(), 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Where B (x) A is the block
# ---------------------------------------------------------------------------------------------------------------------


def assert_exact(model: nn.Module, expected, names) -> None:
    """B (x) A, or B alone, is the block of the GGN."""
    parameters = dict(model.named_parameters())
    for name in names:
        factors = [f.cpu() for f in parameters[name].kflr]
        product = torch.kron(*factors) if len(factors) == 2 else factors[0]
        block = expected.blocks(name).sum(0)
        assert_close(name, product, block, 1e-9, max(block.abs().max().item(), 1e-300))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum")], ids=repr)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_exact_for_one_sample(loss, convention, device):
    """One sample, one position: the GGN of a weight is (J^T H J) (x) (a a^T). Botev et al. 2017."""
    model = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).double()
    inputs = torch.randn(1, 4, dtype=torch.float64)
    targets = torch.tensor([1]) if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(1, 3, dtype=torch.float64)
    expected = curvature(model, lambda f: loss(f, targets), inputs)
    kflr = KFLR(convention=convention)
    backward(model.to(device), loss, inputs.to(device), targets.to(device), kflr)
    assert_exact(model, expected, expected.jacobian)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_exact_blocks_of_groups(groups, convention, device):
    """A convolution with a single output position and one sample: every group's own block of the weight's GGN."""
    layer = nn.Conv2d(6, 6, (2, 3), groups=groups).double()
    model = model_around(layer, (1, 6, 2, 3))
    inputs, targets = data_for(model, (1, 6, 2, 3))
    expected = curvature(model, lambda f: nn.functional.cross_entropy(f, targets), inputs)
    kflr = KFLR(convention=convention)
    backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), kflr)
    block = expected.blocks("0.weight")[0].unflatten(1, (groups, -1)).unflatten(0, (groups, -1))
    b, a = (f.cpu().reshape(groups, *f.shape[-2:]) for f in layer.weight.kflr)
    for g in range(groups):
        assert_close(f"group {g}", torch.kron(b[g], a[g]), block[g, :, g], 1e-9, block.abs().max().item())


def deep_linear(body: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*body).double()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("samples", [1, 4])
def test_expand_is_exact_for_deep_linear_networks_with_a_loss_per_position(samples, reduction, device):
    """MSE at each position, weights shared over positions: Eschenhagen et al. 2023, the expand setting."""
    model = deep_linear([nn.Linear(4, 3), nn.Linear(3, 5, bias=False), nn.Linear(5, 2)])
    inputs = torch.randn(samples, 3, 4, dtype=torch.float64)
    targets, loss = torch.randn(samples, 3, 2, dtype=torch.float64), nn.MSELoss(reduction=reduction)
    expected = curvature(model, lambda f: loss(f, targets), inputs)
    backward(model.to(device), loss, inputs.to(device), targets.to(device), KFLR(convention="expand"))
    assert_exact(model, expected, ["0.weight", "1.weight", "2.weight"])


class MeanOverPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("samples", [1, 4])
def test_reduce_is_exact_for_deep_linear_networks_that_average_positions(samples, reduction, device):
    """One loss per sample of the mean over the positions: Eschenhagen et al. 2023, the reduce setting."""
    model = deep_linear([nn.Linear(4, 3), nn.Linear(3, 5), MeanOverPositions(), nn.Linear(5, 2)])
    inputs = torch.randn(samples, 3, 4, dtype=torch.float64)
    targets, loss = torch.randn(samples, 2, dtype=torch.float64), nn.MSELoss(reduction=reduction)
    expected = curvature(model, lambda f: loss(f, targets), inputs)
    backward(model.to(device), loss, inputs.to(device), targets.to(device), KFLR(convention="reduce"))
    assert_exact(model, expected, expected.jacobian)


@pytest.mark.parametrize("convention", ["backpack", "reduce"])
@named("build, shape", some(LAYER_CASES, "conv1d", "conv2d", "transposed 2d", "conv3d"))
def test_the_factor_of_a_convolutions_bias_is_its_block(build, shape, convention, device):
    model = model_around(build(), shape)
    inputs, targets = data_for(model, shape)
    expected = curvature(model, lambda f: nn.functional.cross_entropy(f, targets), inputs)
    kflr = KFLR(convention=convention)
    backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), kflr)
    assert_exact(model, expected, ["0.bias"])


# ---------------------------------------------------------------------------------------------------------------------
# Samples and gradients instead of all columns
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", CONVENTIONS)
@named("build, shape", some(LAYER_CASES, "linear", "linear, positions", "conv2d", "conv1d, groups", "transposed 1d"))
def test_kfac_approaches_kflr(build, shape, convention, device):
    """Ten times closer with a hundred times the samples, within a factor of 3; A is the same."""
    errors = []
    for mc_samples in (30, 3000):
        torch.manual_seed(0)
        model = model_around(build(), shape)
        inputs, targets = data_for(model, shape)
        extensions = KFAC(mc_samples, convention=convention), KFLR(convention=convention)
        backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), *extensions)
        error = []
        for name, parameter in model.named_parameters():
            difference = (parameter.kfac[0] - parameter.kflr[0]).norm() / parameter.kflr[0].norm()
            error.append(difference.item())
            for sampled, exact in zip(parameter.kfac[1:], parameter.kflr[1:], strict=True):
                assert torch.equal(sampled, exact), name
        errors.append(sum(error) / len(error))
    assert errors[0] < 1 and errors[1] < 0.06
    assert 10 / 3 < errors[0] / errors[1] < 30


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum"), nn.MSELoss()], ids=repr)
@pytest.mark.parametrize("convention", CONVENTIONS)
@named("build, shape", some(LAYER_CASES, "linear", "linear, positions", "conv2d", "conv1d, groups"))
def test_empirical_kfac(build, shape, convention, loss, device):
    """One column per sample, its own gradient, times the root of what the mean divides by, as sampled columns."""
    model = model_around(build(), shape)
    inputs, targets = data_for(model, shape)
    outputs = model(inputs).detach().requires_grad_()
    if isinstance(loss, nn.MSELoss):
        targets = torch.randn_like(outputs)
    (gradient,) = torch.autograd.grad(loss(outputs, targets), outputs)
    divided_by = 1 if loss.reduction == "sum" else outputs.numel() if isinstance(loss, nn.MSELoss) else len(outputs)
    factors = expected_factors(model, inputs, divided_by**0.5 * gradient.flatten(1)[None], convention)
    kfac = KFAC(fisher="empirical", convention=convention)
    backward(model.to(device), loss, inputs.to(device), targets.to(device), kfac)
    assert_factors(model, "kfac", factors)


def test_empirical_kfac_next_to_others(device):
    """From the same backward pass, which forms everything else too."""
    case = MODELS["cnn"]
    inputs, targets = (t.to(device) for t in case.data())
    alone, together = case.prepared().to(device), case.prepared().to(device)
    backward(alone, case.loss, inputs, targets, KFAC(fisher="empirical"))
    backward(together, case.loss, inputs, targets, KFLR(), KFAC(fisher="empirical"), DiagGGNExact())
    for mine, theirs in zip(together.parameters(), alone.parameters(), strict=True):
        for a, b in zip(mine.kfac, theirs.kfac, strict=True):
            assert torch.equal(a, b)
        assert hasattr(mine, "kflr") and hasattr(mine, "diag_ggn_exact")


@pytest.mark.parametrize("scale", [4.0, 0.25])
def test_a_scaled_loss_scales_the_empirical_factor(scale, device):
    results = []
    for c in (1.0, scale):
        torch.manual_seed(0)
        model = model_around(nn.Linear(4, 3), (4, 4))
        inputs, targets = data_for(model, (4, 4))
        kfac = KFAC(fisher="empirical")
        backward(model.to(device), nn.CrossEntropyLoss(), inputs.to(device), targets.to(device), kfac, scale=c)
        results.append([p.kfac for p in model.parameters()])
    for plain, scaled in zip(*results, strict=True):
        assert_close("B", scaled[0], scale * plain[0].cpu(), 1e-12)
        assert all(torch.equal(a, b) for a, b in zip(plain[1:], scaled[1:], strict=True))


@pytest.mark.parametrize("make", [KFLR, KFAC])
def test_two_losses(make, device):
    """Of one output: B of the sum. Of different inputs: A would be that of either, so that it is refused."""
    torch.manual_seed(0)
    model = model_around(nn.Linear(4, 3), (4, 4))
    inputs, targets = data_for(model, (4, 4))
    values = torch.randn(4, 3, dtype=torch.float64)

    def total(f: Tensor) -> Tensor:
        return nn.functional.cross_entropy(f, targets) + nn.functional.mse_loss(f, values)

    expected = curvature(model, total, inputs)
    factors = expected_factors(model, inputs, square_root(expected.hessian), "backpack")
    entropy, square = extend(nn.CrossEntropyLoss()), extend(nn.MSELoss())
    extend(model.to(device))
    x, y, z = inputs.to(device), targets.to(device), values.to(device)
    outputs = model(x)
    with backpack(make()):
        (entropy(outputs, y) + square(outputs, z)).backward()
    if make is KFLR:
        assert_factors(model, "kflr", factors)
    for parameter in model.parameters():
        del parameter.__dict__[make().savefield]
    with backpack(make()), pytest.raises(NotImplementedError, match="different uses"):
        (entropy(model(x), y) + square(model(2 * x), z)).backward()
    assert_nothing_saved(model)


# ---------------------------------------------------------------------------------------------------------------------
# Parameters of other modules, and arguments
# ---------------------------------------------------------------------------------------------------------------------


@named("case", some(MODELS, "batch norm", "batch norm 2d", "layer norm", "rms norm", "group norm", "prelu"))
def test_vectors_have_their_whole_block(case, device):
    """One-dimensional parameters of other modules have one factor: the block itself. Of matrices nothing is known."""
    inputs, targets = case.data()
    stock = case.stock()
    expected = curvature(stock, lambda f: case.loss(f, targets), inputs)
    model = case.prepared().to(device)
    backward(model, case.loss, inputs.to(device), targets.to(device), KFLR(fail_mode="SILENT"))
    for name, parameter in model.named_parameters():
        if name.startswith("1."):
            assert hasattr(parameter, "kflr") == (parameter.dim() == 1), name
            if parameter.dim() == 1:
                assert_exact(model, expected, [name])


class EmbeddingModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embedding(x)).mean(1))


@pytest.mark.parametrize("make", [KFAC, KFLR])
def test_fail_modes(make, device):
    """A parameter without Kronecker factors: an error that names it and leaves nothing, a warning, or nothing."""
    inputs, targets = torch.randint(5, (4, 3), device=device), torch.randint(2, (4,), device=device)
    loss, savefield = nn.CrossEntropyLoss(), make().savefield
    model = EmbeddingModel().to(device)
    with pytest.raises(NotImplementedError, match="Embedding.*weight"):
        backward(model, loss, inputs, targets, make())
    assert_nothing_saved(model)
    with pytest.warns(UserWarning, match="Embedding.*weight"):
        backward(model, loss, inputs, targets, make(fail_mode="WARNING"))
    backward(model, loss, inputs, targets, make(fail_mode="SILENT"))
    assert not hasattr(model.embedding.weight, savefield)
    assert len(getattr(model.out.weight, savefield)) == 2


@pytest.mark.parametrize("make", [KFAC, KFLR])
@pytest.mark.parametrize(
    "arguments", [{"convention": "kfc"}, {"convention": None}, {"fail_mode": "error"}, {"fail_mode": 1}], ids=repr
)
def test_bad_arguments(make, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make(**arguments)


def test_bad_fisher():
    with pytest.raises(ValueError, match="fisher"):
        KFAC(fisher="exact")
    with pytest.raises(TypeError):
        KFLR(3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str)
@named("build, shape", some(LAYER_CASES, "linear", "linear, positions", "conv2d", "conv1d, groups", "transposed 1d"))
def test_types_of_less_precision(build, shape, dtype, tolerance, device):
    """float32 factors, against float64 at the same rounded parameters and inputs."""
    model = model_around(build(), shape).to(dtype).double()
    inputs, targets = data_for(model, shape)
    inputs = inputs.to(dtype).double()
    expected = curvature(model, lambda f: nn.functional.cross_entropy(f, targets), inputs)
    factors = expected_factors(model, inputs, square_root(expected.hessian), "backpack")
    backward(model.to(device, dtype), nn.CrossEntropyLoss(), inputs.to(device, dtype), targets.to(device), KFLR())
    assert_factors(model, "kflr", factors, tolerance)
    assert {f.dtype for p in model.parameters() for f in p.kflr} == {torch.float32}


def test_attention_modules(device):
    """A module of torch's that hides matrices is named by the error; Linear layers around it have theirs otherwise."""
    model = SelfAttention(nn).double().to(device)
    inputs = torch.randn(2, 3, 3, dtype=torch.float64, device=device)
    targets = torch.randint(3, (2,), device=device)
    with pytest.raises(NotImplementedError, match="MultiheadAttention"):
        backward(model, nn.CrossEntropyLoss(), inputs, targets, KFLR())
    for parameter in model.attention.parameters():
        parameter.requires_grad_(False)
    backward(model, nn.CrossEntropyLoss(), inputs, targets, KFLR())
    assert hasattr(model.embed.weight, "kflr") and hasattr(model.out.weight, "kflr")


def test_joined_uses():
    """The oracle counts the uses of a shared weight as further positions."""
    for model, shape in ((Shared(nn), (2, 2, 4)), (Tied(nn), (2, 6))):
        model = extend(model).double()
        inputs, targets = data_for(model, shape)
        expected = curvature(model, lambda f, y=targets: nn.functional.cross_entropy(f, y), inputs)
        roots = square_root(expected.hessian)
        uses = layer_uses(model, inputs, roots)
        name = "linear" if isinstance(model, Shared) else "first"
        use = joined(uses[name] + (uses["second"] if name == "first" else []))
        products = torch.einsum("vnrgo,nrgi->vngoi", use.columns, use.patches).squeeze(2)
        assert_close(name, products, expected.columns(roots, f"{name}.weight"), 1e-12)
