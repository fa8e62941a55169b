"""`backpack_cuda.utils`: against dense linear algebra, torch's own layers, and BackPACK's functions."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, named
from torch import Tensor, nn

import backpack_cuda
from backpack_cuda import backpack, extend
from backpack_cuda.custom_module.branching import Parallel, _Branch
from backpack_cuda.custom_module.reduce_tuple import ReduceTuple
from backpack_cuda.extensions import KFLR, DiagGGNExact, SqrtGGNExact
from backpack_cuda.utils import conv, conv_transpose, examples, kroneckers, linear
from backpack_cuda.utils.convert_parameters import vector_to_parameter_list
from backpack_cuda.utils.errors import batch_norm_raise_error_if_train
from backpack_cuda.utils.hooks import no_op
from backpack_cuda.utils.module_classification import is_loss, is_nll, is_no_op
from backpack_cuda.utils.subsampling import subsample
from backpack_cuda.utils.unsqueeze import kfacmp_unsqueeze_if_missing_dim


def symmetric(size: int, *groups: int) -> Tensor:
    root = torch.randn(*groups, size, size + 2, dtype=torch.float64)
    return root @ root.mT


def dense(factors: list[Tensor]) -> Tensor:
    """The Kronecker product entry by entry; of groups, block by block."""
    if factors[0].dim() == 3:
        return torch.block_diag(*(dense(list(blocks)) for blocks in zip(*factors, strict=True)))
    rows = list(itertools.product(*(range(f.shape[0]) for f in factors)))
    columns = list(itertools.product(*(range(f.shape[1]) for f in factors)))
    mat = torch.ones(len(rows), len(columns), dtype=torch.float64)
    for (r, row), (c, column) in itertools.product(enumerate(rows), enumerate(columns)):
        for factor, i, j in zip(factors, row, column, strict=True):
            mat[r, c] *= factor[i, j]
    return mat


# ---------------------------------------------------------------------------------------------------------------------
# Kronecker products
# ---------------------------------------------------------------------------------------------------------------------

FACTORS = {
    "one": lambda: [symmetric(3)],
    "two": lambda: [symmetric(3), symmetric(2)],
    "three": lambda: [symmetric(2), symmetric(3), symmetric(2)],
    "rectangular": lambda: [torch.randn(2, 3).double(), torch.randn(4, 2).double()],
    "not contiguous": lambda: [torch.randn(3, 2).double().mT, torch.randn(2, 4).double().mT],
    "groups": lambda: [symmetric(2, 3), symmetric(4, 3)],
    "one of groups": lambda: [symmetric(2, 3)],
}


@named("make", FACTORS)
def test_products_with_kronecker_factors(make):
    factors = make()
    before, expected = [f.clone() for f in factors], dense(factors)
    assert_close("matrix", kroneckers.kfacs_to_mat(factors), expected, 1e-12)
    vector, matrix = torch.randn(expected.shape[1]).double(), torch.randn(4, expected.shape[1]).double().mT
    for mat in (vector, matrix, matrix[:, :0]):
        assert_close("product", kroneckers.kfac_mat_prod(factors)(mat), expected @ mat, 1e-12)
        assert_close("product", kroneckers.apply_kfac_mat_prod(factors, mat), expected @ mat, 1e-12)
    square = [f for f in factors if f.shape[-1] == f.shape[-2]]
    if len(square) < len(factors):
        return
    for shift in (None, 0.5, 1, [0.1 * (i + 1) for i in range(len(factors))], torch.tensor(0.3)):
        shifts = shift if isinstance(shift, list) else [0.0 if shift is None else float(shift)] * len(factors)
        shifted = [f + s * torch.eye(f.shape[-1]).double() for f, s in zip(factors, shifts, strict=True)]
        for mine, factor in zip(kroneckers.inv_kfacs(factors, shift), shifted, strict=True):
            assert_close("inverse", mine, torch.linalg.inv(factor), 1e-6)
        solved = torch.linalg.solve(dense(shifted), matrix)
        assert_close("solution", kroneckers.inv_kfac_mat_prod(factors, shift)(matrix), solved, 1e-6)
        assert_close("solution", kroneckers.apply_inv_kfac_mat_prod(factors, matrix, shift), solved, 1e-6)
    assert all(map(torch.equal, factors, before))


def test_inverse_of_a_singular_factor():
    """Inverses of eigenvalues are at most 1e8."""
    (inverse,) = kroneckers.inv_kfacs([torch.diag(torch.tensor([2.0, 0.0, 1e-12]).double())])
    assert_close("inverse", inverse, torch.diag(torch.tensor([0.5, 1e8, 1e8]).double()), 1e-12)


def test_kronecker_functions_against_backpack():
    theirs = pytest.importorskip("backpack.utils.kroneckers")
    for make in (FACTORS["one"], FACTORS["two"], FACTORS["three"]):
        factors = make()
        mat = torch.randn(dense(factors).shape[1], 3).double()
        assert torch.allclose(kroneckers.kfacs_to_mat(factors), theirs.kfacs_to_mat(factors))
        for name in ("apply_kfac_mat_prod", "apply_inv_kfac_mat_prod"):
            for rhs in (mat, mat[:, 0]):
                assert torch.allclose(getattr(kroneckers, name)(factors, rhs), getattr(theirs, name)(factors, rhs))
        for shift in (None, 0.3, [0.1, 0.2, 0.3][: len(factors)]):
            pairs = zip(kroneckers.inv_kfacs(factors, shift), theirs.inv_kfacs(factors, shift), strict=True)
            assert all(torch.allclose(mine, other) for mine, other in pairs)
    for count in range(1, 13):
        equation = theirs.kfac_mat_prod_einsum_equation(count)
        assert kroneckers.kfac_mat_prod_einsum_equation(count) == equation
    assert list(kroneckers.get_letters(5)) == list(theirs.get_letters(5)) == list("abcde")
    for shape in ((), (2,), (2, 3), (2, 3, 1)):
        tensor = torch.zeros(shape)
        for name in ("is_matrix", "is_vector"):
            assert getattr(kroneckers, name)(tensor) == getattr(theirs, name)(tensor)
        assert kroneckers.all_tensors_of_order(2, [tensor, torch.zeros(1, 1)]) == (len(shape) == 2)


def test_factors_of_a_layer_with_groups():
    """For one sample and one position KFLR is the Gauss-Newton matrix, groups along its diagonal."""
    model, loss = extend(nn.Conv1d(4, 6, 3, groups=2, bias=False).double()), extend(nn.MSELoss())
    with backpack(KFLR(), SqrtGGNExact()):
        loss(model(torch.randn(1, 4, 3).double()), torch.randn(1, 6, 1).double()).backward()
    columns = model.weight.sqrt_ggn_exact.flatten(2)[:, 0]
    blocks = torch.block_diag(*(torch.ones(18, 18) for _ in range(2)))
    assert_close("kflr", kroneckers.kfacs_to_mat(model.weight.kflr), columns.mT @ columns * blocks, 1e-12)


def test_differentiable_products():
    factors = [symmetric(3).requires_grad_(), symmetric(2).requires_grad_()]
    mat = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    for function in (kroneckers.apply_kfac_mat_prod, kroneckers.apply_inv_kfac_mat_prod):
        assert torch.autograd.gradcheck(lambda a, b, m, f=function: f([a + a.mT, b + b.mT], m), (*factors, mat))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda k: k.kfacs_to_mat([]), ValueError, "factors: expected matrices"),
        (lambda k: k.kfacs_to_mat([torch.ones(2)]), ValueError, r"got sizes \[\[2\]\]"),
        (lambda k: k.kfac_mat_prod([torch.ones(2, 2, 2), torch.ones(3, 2, 2)]), ValueError, "same G"),
        (lambda k: k.kfac_mat_prod([torch.ones(2, 2), torch.ones(3, 2, 2)]), ValueError, "expected matrices"),
        (lambda k: k.two_kfacs_to_mat(torch.ones(2, 2), torch.ones(2)), ValueError, "B: expected a matrix"),
        (lambda k: k.apply_kfac_mat_prod([torch.ones(2, 2)], torch.ones(3)), ValueError, "mat: expected size"),
        (lambda k: k.apply_kfac_mat_prod([torch.ones(2, 2)], torch.ones(2, 1, 1)), ValueError, "mat: expected size"),
        (lambda k: k.inv_kfacs([torch.ones(2, 3)]), ValueError, "square"),
        (lambda k: k.inv_kfacs([torch.ones(2, 2)], [1.0, 2.0]), ValueError, "shift: expected one number for each"),
        (lambda k: k.inv_kfacs([torch.ones(2, 2)], "1"), TypeError, "shift: expected a number"),
        (lambda k: k.kfac_mat_prod_einsum_equation(13), ValueError, "num_factors"),
    ],
)
def test_errors_of_kronecker_functions(call, error, message):
    with pytest.raises(error, match=message):
        call(kroneckers)


# ---------------------------------------------------------------------------------------------------------------------
# Convolutions
# ---------------------------------------------------------------------------------------------------------------------

CONVS = {
    "1d": (lambda: nn.Conv1d(2, 3, 3), (2, 7)),
    "1d, stride": (lambda: nn.Conv1d(2, 4, 2, stride=3, padding=1, groups=2), (2, 7)),
    "2d": (lambda: nn.Conv2d(2, 3, (2, 3), padding=(1, 2), stride=(2, 1)), (2, 5, 4)),
    "2d, dilation, groups": (lambda: nn.Conv2d(4, 6, 2, dilation=2, groups=2), (4, 5, 6)),
    "3d": (lambda: nn.Conv3d(2, 3, 2, padding=1), (2, 3, 2, 4)),
    "same": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same"), (2, 5, 4)),
    "valid": (lambda: nn.Conv1d(2, 3, 2, padding="valid"), (2, 5)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 4)),
    "reflect": (lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 5)),
    "replicate, same": (lambda: nn.Conv3d(1, 2, (2, 3, 1), padding="same", padding_mode="replicate"), (1, 3, 4, 2)),
}
TRANSPOSED = {
    "1d": (lambda: nn.ConvTranspose1d(2, 3, 3), (2, 4)),
    "1d, stride, output_padding": (lambda: nn.ConvTranspose1d(2, 4, 2, stride=3, output_padding=2, groups=2), (2, 4)),
    "2d": (lambda: nn.ConvTranspose2d(2, 3, (2, 3), padding=(1, 2), stride=(2, 1)), (2, 3, 4)),
    "2d, dilation, groups": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, dilation=2, groups=2), (4, 3, 2)),
    "3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2, padding=1, output_padding=1), (2, 3, 2, 2)),
    "output_padding up to the dilation": (lambda: nn.ConvTranspose1d(2, 3, 2, dilation=3, output_padding=2), (2, 4)),
}
BEYOND_BACKPACK = {
    "same",
    "valid",
    "circular",
    "reflect",
    "replicate, same",
    "1d, stride, output_padding",
    "3d",
    "output_padding up to the dilation",
}


def case_of(build, shape):
    """(float64 layer, inputs [N, C, *], columns [V, N, O, *])."""
    module = build().double()
    inputs = torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        return module, inputs, torch.randn(2, *module(inputs).shape, dtype=torch.float64)


def jacobian_products(module: nn.Module, inputs: Tensor, columns: Tensor) -> dict[str, Tensor]:
    """J^T S of every sample and column by autograd, [V, N, *P] by parameter."""
    found = {name: [] for name, _ in module.named_parameters()}
    for v, n in itertools.product(range(columns.shape[0]), range(columns.shape[1])):
        gradients = torch.autograd.grad(module(inputs[n : n + 1]), list(module.parameters()), columns[v, n : n + 1])
        for rows, gradient in zip(found.values(), gradients, strict=True):
            rows.append(gradient)
    return {name: torch.stack(rows).unflatten(0, columns.shape[:2]) for name, rows in found.items()}


EVEN_KERNEL = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@EVEN_KERNEL
@named("build, shape", CONVS)
def test_unfold_input(build, shape):
    """The weight times the patches is the layer's output."""
    module, inputs, _ = case_of(build, shape)
    patches = conv.unfold_input(module, inputs)
    assert torch.equal(patches, conv.unfold_by_conv(inputs, module))
    weight = module.weight.unflatten(0, (module.groups, -1)).flatten(2)  # [G, O/G, C/G * K]
    output = torch.einsum("goi,ngil->ngol", weight, patches.unflatten(1, (module.groups, -1))).flatten(1, 2)
    output = output + module.bias[:, None]
    assert_close("output", output.detach(), module(inputs).flatten(2).detach(), 1e-12)


@named("build, shape", TRANSPOSED)
def test_unfold_by_conv_transpose(build, shape):
    module, inputs, _ = case_of(build, shape)
    for output_size in (None, [s + (s0 > 1) for s, s0 in zip(module(inputs).shape[2:], module.stride, strict=True)]):
        if output_size is not None and any(module.output_padding):
            continue
        patches = conv_transpose.unfold_by_conv_transpose(inputs, module, output_size)
        patches = patches.unflatten(1, (module.groups, module.in_channels // module.groups, -1))  # [N, G, c, K, X]
        weight = module.weight.unflatten(0, (module.groups, -1)).flatten(3)  # [G, c, o, K]
        output = torch.einsum("gcok,ngckx->ngox", weight, patches).flatten(1, 2) + module.bias[:, None]
        assert_close("output", output.detach(), module(inputs, output_size).flatten(2).detach(), 1e-12)


@EVEN_KERNEL
@named("build, shape", {**CONVS, **{f"transposed {name}": case for name, case in TRANSPOSED.items()}})
def test_diagonals_of_convolutions(build, shape):
    """Of the squares of J^T S; and the gradient from its two factors."""
    module, inputs, columns = case_of(build, shape)
    functions = conv_transpose if hasattr(module, "output_padding") and module.transposed else conv
    rows, grad_output = functions.get_weight_gradient_factors(inputs, columns[0], module)
    assert grad_output.shape == columns[0].flatten(2).shape
    products = jacobian_products(module, inputs, columns)
    for sum_batch in (True, False):
        dims = (0, 1) if sum_batch else 0
        weight = functions.extract_weight_diagonal(module, rows, columns, sum_batch)
        bias = functions.extract_bias_diagonal(module, columns, sum_batch=sum_batch)
        assert_close("weight", weight, products["weight"].square().sum(dims), 1e-12)
        assert_close("bias", bias, products["bias"].square().sum(dims), 1e-12)


@named("shape", {"vectors": (3, 4), "sequences": (3, 5, 4), "grids": (3, 2, 2, 4)})
def test_diagonals_of_linear_layers(shape):
    module, inputs = nn.Linear(4, 2).double(), torch.randn(shape, dtype=torch.float64)
    columns = torch.randn(2, *shape[:-1], 2, dtype=torch.float64)
    module.input0 = inputs
    products = jacobian_products(module, inputs, columns)
    for sum_batch in (True, False):
        dims = (0, 1) if sum_batch else 0
        weight = linear.extract_weight_diagonal(module, columns, sum_batch=sum_batch)
        bias = linear.extract_bias_diagonal(module, columns, sum_batch=sum_batch)
        assert_close("weight", weight, products["weight"].square().sum(dims), 1e-12)
        assert_close("bias", bias, products["bias"].square().sum(dims), 1e-12)


def test_convolutions_against_backpack():
    theirs, theirs_transposed = (
        pytest.importorskip("backpack.utils.conv"),
        pytest.importorskip("backpack.utils.conv_transpose"),
    )
    for cases, mine, other, unfold in (
        (CONVS, conv, theirs, "unfold_by_conv"),
        (TRANSPOSED, conv_transpose, theirs_transposed, "unfold_by_conv_transpose"),
    ):
        for name in set(cases) - BEYOND_BACKPACK:
            module, inputs, columns = case_of(*cases[name])
            rows = getattr(other, unfold)(inputs, module)
            assert torch.allclose(getattr(mine, unfold)(inputs, module), rows), name
            for sum_batch in (True, False):
                expected = other.extract_weight_diagonal(module, rows, columns, sum_batch)
                assert torch.allclose(mine.extract_weight_diagonal(module, rows, columns, sum_batch), expected), name
                expected = other.extract_bias_diagonal(module, columns, sum_batch)
                assert torch.allclose(mine.extract_bias_diagonal(module, columns, sum_batch), expected), name
    for n in (1, 2, 3):
        assert conv.get_conv_module(n) is theirs.get_conv_module(n)
        assert conv.get_conv_function(n) is theirs.get_conv_function(n)
        assert conv_transpose.get_conv_transpose_module(n) is theirs_transposed.get_conv_transpose_module(n)
        assert conv_transpose.get_conv_transpose_function(n) is theirs_transposed.get_conv_transpose_function(n)


def test_grad_input_padding():
    """The transposed convolution with it brings back the input's size; another size is an error."""
    for size, stride in itertools.product((7, 8, 9, 10), (1, 2, 3)):
        output = F.conv1d(torch.zeros(1, 1, size), torch.zeros(1, 1, 3), stride=stride, padding=1, dilation=2)
        for given in ((size,), (1, 1, size)):
            (extra,) = conv._grad_input_padding(output, given, (stride,), (1,), (3,), (2,))
            back = F.conv_transpose1d(
                output, torch.zeros(1, 1, 3), stride=stride, padding=1, dilation=2, output_padding=extra
            )
            assert back.shape[2] == size
        with pytest.raises(ValueError, match="input_size: expected sizes from"):
            conv._grad_input_padding(output, (size + stride,), (stride,), (1,), (3,), (2,))
    with pytest.raises(ValueError, match="expected 1 or 3 numbers"):
        conv._grad_input_padding(output, (2, 2), (1,), (1,), (3,))


def test_errors_of_unfolding():
    with pytest.raises(ValueError, match="expected 4 dims"):
        conv.unfold_input(nn.Conv2d(1, 1, 2), torch.ones(1, 3, 3))
    with pytest.raises(ValueError, match="smaller than the kernel"):
        conv.unfold_input(nn.Conv1d(1, 1, 4), torch.ones(1, 1, 3))
    with pytest.raises(ValueError, match="expected 3 dims"):
        conv_transpose.unfold_by_conv_transpose(torch.ones(1, 3, 3, 3), nn.ConvTranspose1d(1, 1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# The others
# ---------------------------------------------------------------------------------------------------------------------


def test_vector_to_parameter_list():
    model = nn.Sequential(nn.Linear(3, 2), nn.Conv1d(2, 2, 3))
    vector = nn.utils.parameters_to_vector(model.parameters())
    parts = vector_to_parameter_list(vector, model.parameters())
    for part, parameter in zip(parts, model.parameters(), strict=True):
        assert torch.equal(part, parameter)
        assert not part.requires_grad
        assert part.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr()
    with pytest.raises(TypeError, match="expected a Tensor, got list"):
        vector_to_parameter_list([1.0], model.parameters())
    for bad in (vector[:-1], torch.cat([vector, vector]), vector[None]):
        with pytest.raises(ValueError, match="expected a vector of"):
            vector_to_parameter_list(bad, model.parameters())


def test_subsample():
    tensor = torch.randn(4, 3, 2)
    assert subsample(tensor) is tensor
    assert torch.equal(subsample(tensor, subsampling=[2, 0, 2]), tensor[[2, 0, 2]])
    assert torch.equal(subsample(tensor, 1, [1]), tensor[:, [1]])
    assert torch.equal(subsample(tensor, -1, [1, 1]), tensor[..., [1, 1]])
    assert subsample(tensor, 1, []).shape == (4, 0, 2)
    with pytest.raises(IndexError, match="dim: expected one of"):
        subsample(tensor, 3, [0])


def test_module_classification():
    losses = [nn.MSELoss(), nn.CrossEntropyLoss(), nn.BCEWithLogitsLoss()]
    assert all(is_loss(loss) and is_nll(loss) for loss in losses)
    assert is_loss(nn.L1Loss())
    assert not is_nll(nn.L1Loss())
    assert not is_loss(nn.Linear(1, 1))
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(1, 1)))
    for module in (nn.Sequential(), _Branch(nn.Identity()), Parallel(nn.Identity()), ReduceTuple(), traced):
        assert is_no_op(module)
    assert not is_no_op(nn.Identity())
    assert backpack_cuda.is_no_op is is_no_op
    assert backpack_cuda.no_op is no_op
    assert no_op(1, a=2) is None


def test_batch_norm_raise_error_if_train():
    module = nn.BatchNorm2d(3)
    with pytest.raises(NotImplementedError, match="BatchNorm2d in train mode"):
        batch_norm_raise_error_if_train(module)
    with pytest.warns(UserWarning, match="BatchNorm2d in train mode"):
        batch_norm_raise_error_if_train(module, raise_error=False)
    batch_norm_raise_error_if_train(module.eval())


def test_kfacmp_unsqueeze_if_missing_dim():
    @kfacmp_unsqueeze_if_missing_dim(mat_dim=3)
    def function(mat: Tensor) -> Tensor:
        """Its docstring."""
        assert mat.dim() == 3
        return 2 * mat

    assert function.__doc__ == "Its docstring."
    for shape in ((2, 3), (2, 3, 4)):
        assert torch.equal(function(torch.ones(shape)), 2 * torch.ones(shape))


@named("idx", {"all": None, "some": [0, 7, 3]})
def test_autograd_diag_ggn_exact(idx):
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[2].bias.requires_grad_(False)
    loss = nn.CrossEntropyLoss()
    inputs, targets = torch.randn(5, 3).double(), torch.randint(2, (5,))
    diagonal = examples.autograd_diag_ggn_exact(inputs, targets, model, loss, idx=idx)
    with backpack(DiagGGNExact()):
        extend(loss)(extend(model)(inputs), targets).backward()
    expected = torch.cat([p.diag_ggn_exact.flatten() for p in model.parameters() if p.requires_grad])
    assert_close("diagonal", diagonal, expected if idx is None else expected[idx], 1e-9)


@pytest.mark.parametrize("name", ["load_mnist_dataset", "get_mnist_dataloader", "load_one_batch_mnist"])
def test_mnist_without_torchvision(name, monkeypatch):
    """One sentence that says what is missing, and only when the data are asked for."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="MNIST is loaded by torchvision, which is not installed"):
        getattr(examples, name)()
