"""The CUDA operators, every way of computing, tile, loader and split forced one by one: on a GPU, else on the harness.

What the automatic choices give is tested by running the whole suite with `--cuda-on-cpu` (test_cuda_on_cpu.py).
"""

import contextlib
import os
from dataclasses import replace

import operators_on_harness
import pytest
import torch
from harness_tools import reason_to_skip
from helpers import named, some
from op_cases import CASES, HALVES, TOLERANCES, Tolerance, assert_stats, conv, linear, want_bits
from oracle import FIELDS, Stats
from property_testing import HealthCheck, given, settings, st
from test_column_stats import columns_of, loop, some_signs, squares
from test_kron_factor import NAMED as KRON_CASES
from test_kron_factor import ROWS, assert_exact, outer_products
from test_kron_factor import calls as kron_calls
from test_ops_geometry import conv_cases, linear_cases

CONTRACT, SEPARATE, DEPTHWISE = {"way": 1}, {"way": 2}, {"way": 3}
PATHS = {
    "small tiles": {**CONTRACT, "tile": 1},
    "large tiles": {**CONTRACT, "tile": 2},
    "single elements": {**CONTRACT, "loader": 4},
    "single elements, large tiles": {**CONTRACT, "loader": 4, "tile": 2},
    "samples split": {**CONTRACT, "splits": 2},
    "samples split, large tiles": {**CONTRACT, "splits": 3, "tile": 2},
    "positions split": {**CONTRACT, "t_splits": 2},
    "a kernel for each result": SEPARATE,
    "a kernel for each result, split": {**SEPARATE, "splits": 2},
    "depthwise": DEPTHWISE,
    "depthwise, split": {**DEPTHWISE, "splits": 2},
    "a large chip": {"sm_count": 132},
    "a tiny chip": {"sm_count": 1},
}
# On top of the suite's cases: operands that suit each loader.
LOADER_CASES = {
    "rows": linear((3, 40, 72), 136),
    "rows, one sample": linear((1, 130, 24), 16),
    "few rows": linear((9, 5, 64), 64),
    "channels last": conv(
        (3, 16, 9, 7),
        24,
        3,
        padding=1,
        input_layout="aligned_channels_last",
        grad_output_layout="aligned_channels_last",
    ),
    "channels last, strided": conv(
        *((2, 24, 11, 9), 8, (3, 2)),
        stride=2,
        padding=1,
        dilation=2,
        groups=1,
        input_layout="aligned_channels_last",
        grad_output_layout="aligned_channels_last",
    ),
    "channels last, groups": conv(
        *((2, 32, 7, 6), 16, 3),
        padding=1,
        groups=2,
        input_layout="aligned_channels_last",
        grad_output_layout="aligned_channels_last",
    ),
    "positions": conv((2, 5, 8, 10), 7, 3, padding=1),
    "positions, groups": conv((3, 6, 8, 8), 9, 3, stride=2, padding=1, groups=3),
    "positions of a transposed convolution": conv((2, 6, 4, 8), 5, 4, stride=2, padding=1, output_padding=0),
}
ALL_CASES = {**CASES, **LOADER_CASES}
SOME_FIELDS = [
    FIELDS,
    FIELDS[:1],
    FIELDS[2:3],
    FIELDS[3:4],
    FIELDS[4:],
    (FIELDS[0], FIELDS[2]),
    FIELDS[1:3],
    FIELDS[2:],
]


@pytest.fixture(autouse=True)
def gpu_or_harness(device):
    if device.type != "cuda" and reason_to_skip():
        pytest.skip(reason_to_skip())


@contextlib.contextmanager
def cuda_options(device, **options):
    """The operators for this device, with choices of the CUDA kernels forced; the automatic ones are put back."""
    operators = torch.ops.backpack_cuda if device.type == "cuda" else operators_on_harness.load()
    try:
        for name, value in options.items():
            operators._cuda_option(name, value)
        yield operators
    finally:
        for name in options:
            operators._cuda_option(name, 0)


def weight_stats(case, input, grad_output, fields=FIELDS, tf32=False, **options) -> Stats:
    """On the CPU."""
    with cuda_options(input.device, **options) as operators:
        operator = getattr(operators, f"{case.family}_grad_stats")
        results = operator(input, grad_output, *case.geometry_arguments(), want_bits(*fields), 0, tf32)[:5]
    return Stats(*(result.cpu() for result in results))


@named("options", PATHS)
@named("case", ALL_CASES)
def test_paths(case, options, device):
    input, grad_output = case.operands(device)
    expected, magnitude = case.oracle(input, grad_output)[0], case.magnitudes(input, grad_output)[0]
    for fields in SOME_FIELDS:
        actual = weight_stats(case, input, grad_output, fields, **options)
        assert_stats(actual, expected, magnitude, TOLERANCES[torch.float32], fields)


@pytest.mark.parametrize("dtype, tf32", [(torch.float32, True), *((dtype, False) for dtype in HALVES)], ids=str)
@named("options", PATHS)
@named("case", some(ALL_CASES, "linear_wide", "linear_tokens", "conv2d_3x3", "conv2d_depthwise", *LOADER_CASES))
def test_small_integers_are_exact(case, options, dtype, tf32, device):
    """Every product and sum of small integers is exact on tensor cores: results are equal, bit by bit."""
    input, grad_output = case.operands(device, dtype, integers=True)
    expected = case.oracle(input, grad_output)[0]
    for fields in (FIELDS[:4], FIELDS[:1], FIELDS[2:4]):
        actual = weight_stats(case, input, grad_output, fields, tf32, **options)
        for name in fields:
            value, exact = getattr(actual, name), getattr(expected, name)
            assert torch.equal(value, exact.to(value.dtype)), name
    actual = weight_stats(case, input, grad_output, FIELDS[4:], tf32, **options).sum_grad_centered_squared
    scale = expected.sum_grad_squared.max().item()
    assert (actual.double() - expected.sum_grad_centered_squared).abs().max() <= 1e-5 * scale


COLUMN_FIELDS = ("factor", "batch_diag", "diag")


def column_stats(case, input, columns, signs, fields, tf32=False, **options):
    """Of the weight, on the CPU: {field: value}."""
    with cuda_options(input.device, **options) as operators:
        operator = getattr(operators, f"{case.family}_column_stats")
        want = sum(1 << COLUMN_FIELDS.index(name) for name in fields)
        results = operator(input, columns, signs, *case.geometry_arguments(), want, 0, tf32)[:3]
    return {name: result.cpu() for name, result in zip(COLUMN_FIELDS, results, strict=True) if name in fields}


COLUMN_PATHS = {name: options for name, options in PATHS.items() if options.get("way") != 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@named("options", COLUMN_PATHS)
@named(
    "case", some(ALL_CASES, "conv2d_depthwise", "conv_transpose2d", "few rows", "channels last", "positions, groups")
)
def test_columns(case, options, dtype, device):
    """Small integers: every result is equal, bit by bit. Two columns share a slab, three do not."""
    input = case.operands(device, dtype, integers=True)[0]
    for count in (2, 3):
        columns = columns_of(case, count).sign().to(device, dtype)
        signs = (2 * some_signs(columns)).round()
        gradients = loop(case, input, columns)[0]
        batch_diag = squares(gradients, signs.cpu())
        expected = {"factor": gradients, "batch_diag": batch_diag, "diag": batch_diag.sum(0)}
        for fields in (COLUMN_FIELDS, COLUMN_FIELDS[2:]):
            for name, value in column_stats(case, input, columns, signs, fields, **options).items():
                assert torch.equal(value, expected[name].to(value.dtype)), (count, name)


SM90_CASES = {
    "rows": linear((3, 70, 72), 136),
    "few rows": linear((5, 3, 16), 24),
    "one sample": linear((1, 130, 24), 16),
    "many tiles": linear((2, 66, 264), 136),
    "channels last, 1x1": conv(
        (2, 16, 9, 7), 24, 1, input_layout="aligned_channels_last", grad_output_layout="aligned_channels_last"
    ),
}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("splits", [0, 2])
@named("case", SM90_CASES)
def test_hopper(case, dtype, splits, monkeypatch, device):
    """The path of sm_90a through the operators, on small integers and in general."""
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a device of compute capability 9.0")
    monkeypatch.setenv("CUDA_ON_CPU_CAPABILITY", "90")
    input, grad_output = case.operands(device, dtype, integers=True)
    expected = case.oracle(input, grad_output)[0]
    actual = weight_stats(case, input, grad_output, FIELDS[:4], way=4, splits=splits)
    for name in FIELDS[:4]:
        value, exact = getattr(actual, name), getattr(expected, name)
        assert torch.equal(value, exact.to(value.dtype)), name
    input, grad_output = case.operands(device, dtype)
    expected, magnitude = case.oracle(input, grad_output)[0], case.magnitudes(input, grad_output)[0]
    actual = weight_stats(case, input, grad_output, way=4, splits=splits)
    assert_stats(actual, expected, magnitude, Tolerance(5e-3, 5e-3))
    assert_stats(
        actual._replace(grad=torch.empty(0), batch_grad=torch.empty(0)),
        expected,
        magnitude,
        TOLERANCES[torch.float32],
        FIELDS[2:],
    )
    if case is SM90_CASES["rows"]:  # sums of another order than the general kernel's
        assert not torch.equal(actual.batch_l2, weight_stats(case, input, grad_output, way=1).batch_l2)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=linear_cases())
def test_random_linear_layers_through_the_contraction(case, device):
    check_random(case, CONTRACT, device)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=conv_cases(transposed=False))
def test_random_convolutions_without_tensor_cores(case, device):
    check_random(case, DEPTHWISE, device)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(case=conv_cases(transposed=True))
def test_random_transposed_convolutions_without_tensor_cores(case, device):
    check_random(case, DEPTHWISE, device)


def check_random(case, options, device):
    input, grad_output = case.operands(device)
    expected, magnitude = case.oracle(input, grad_output)[0], case.magnitudes(input, grad_output)[0]
    assert_stats(weight_stats(case, input, grad_output, **options), expected, magnitude, TOLERANCES[torch.float32])


@pytest.mark.parametrize("precision, bound", [(False, 2e-6), (True, 2e-3)], ids=["highest", "high"])
@named("case", some(ALL_CASES, "linear_wide", "rows", "conv2d_3x3", "channels last", "positions"))
def test_precision_of_float32(case, precision, bound, device):
    """ "high" rounds operands to 11 bits, and so differs; "highest" does not."""
    input, grad_output = case.operands(device)
    expected = case.oracle(input, grad_output)[0]
    for options in (CONTRACT, SEPARATE):
        actual = weight_stats(case, input, grad_output, tf32=precision, **options)
        for name, value, exact in zip(FIELDS, actual, expected, strict=True):
            error = (value.double() - exact).abs().max() / exact.abs().max()
            assert error <= bound and (name == "sum_grad_centered_squared" or error > (1e-6 if precision else 0)), name


@named("options", PATHS)
@named("case", some(ALL_CASES, "linear_wide", "rows", "conv2d_3x3", "conv2d_depthwise", "channels last"))
def test_results_do_not_depend_on_the_schedule(case, options, device):
    """Blocks and threads run in another order under every seed: there is no sum whose order they could change."""
    input, grad_output = case.operands(device)
    results = []
    for seed in ("1", "2", "3"):
        before = os.environ.get("CUDA_ON_CPU_SEED")
        os.environ["CUDA_ON_CPU_SEED"] = seed
        try:
            results.append(weight_stats(case, input, grad_output, **options))
        finally:
            os.environ.pop("CUDA_ON_CPU_SEED")
            if before is not None:
                os.environ["CUDA_ON_CPU_SEED"] = before
    for other in results[1:]:
        for name, value, first in zip(FIELDS, other, results[0], strict=True):
            assert torch.equal(value, first), name


@pytest.mark.parametrize("way", [{}, CONTRACT, SEPARATE, DEPTHWISE], ids=str)
@named("case", some(ALL_CASES, "linear", "linear_tokens", "conv2d_3x3", "conv2d_depthwise", "conv_transpose2d", "rows"))
def test_weighted_gradient(case, way, device):
    """sum_n c_n G_n, negative and zero weights too, from weights with a stride."""
    input, grad_output = case.operands(device)
    weights = torch.randn(len(input), 2, device=device)[:, 0]
    weights[0] = 0
    with cuda_options(device, **way) as operators:
        operator = getattr(operators, f"{case.family}_weighted_grad")
        actual = operator(input, grad_output, weights, *case.geometry_arguments()).cpu()
    rows = case.oracle(input, grad_output)[0].batch_grad
    expected = torch.einsum("n,n...->...", weights.cpu().double(), rows)
    assert (actual.double() - expected).abs().max() <= 1e-5 * rows.abs().max()


def test_float64_is_refused(device):
    operands = (torch.ones(2, size, dtype=torch.float64, device=device) for size in (3, 4))
    with cuda_options(device) as operators, pytest.raises(RuntimeError, match="float32, bfloat16 and float16"):
        operators.linear_grad_stats(*operands, 1, 0)


@pytest.mark.parametrize("name, value", [("tile", -1), ("nothing", 0)])
def test_options_are_checked(name, value, device):
    with cuda_options(device) as operators, pytest.raises(RuntimeError, match=name):
        operators._cuda_option(name, value)


def test_middle_dims_that_do_not_merge(device):
    """More than three of them are copied."""
    case = replace(linear((2, 2, 3, 2, 3, 5), 4), input_layout="strided", grad_output_layout="strided")
    check_random(case, {}, device)
    check_random(case, CONTRACT, device)


KRON_PATHS = {
    "patches": {"way": 1},
    "patches, large tiles": {"way": 1, "tile": 2},
    "lags": {"way": 2},
    "lags, large tiles": {"way": 2, "tile": 2},
    "lags, split": {"way": 2, "splits": 3},
    "lanes along the positions": {"loader": 3, "splits": 2},
    "lanes along the columns": {"loader": 4},
    "a large chip": {"sm_count": 132},
}


@named("options", KRON_PATHS)
@named("case", KRON_CASES)
def test_kronecker_factors_of_patches(case, options, device):
    """Small integers: exact in every precision."""
    if case.groups > 8 and options.get("way") == 2:
        pytest.skip("a tile for every lag and group, almost empty: slow on the harness")
    for dtype, tf32 in ((torch.float32, True), (torch.bfloat16, False)):
        x = case.integers(device, dtype)
        out = torch.full((case.groups, case.size, case.size), float("nan"), device=device)
        sizes = (case.kernel, case.stride, case.padding, case.dilation, case.positions, case.groups)
        with cuda_options(device, **options) as operators:
            operators.conv_kron_factor(out, x, *sizes, 1.0, 0.0, case.homogeneous, tf32)
        assert_exact(out, case.oracle(x))


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    case=kron_calls(),
    way=st.sampled_from((1, 2)),
    loader=st.sampled_from((0, 3, 4)),
    splits=st.sampled_from((0, 1, 2, 7)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_random_kronecker_factors_of_patches(case, way, loader, splits, dtype, device):
    """With a running average, of which the lower triangle is not read."""
    x = case.integers(device, dtype)
    before = torch.randint(-3, 4, (case.groups, case.size, case.size)).float().triu()
    out = (before + torch.ones_like(before).tril(-1)).to(device)
    sizes = (case.kernel, case.stride, case.padding, case.dilation, case.positions, case.groups)
    with cuda_options(device, way=way, loader=loader, splits=splits) as operators:
        operators.conv_kron_factor(out, x, *sizes, -2.0, 3.0, case.homogeneous, True)
    assert_exact(out, -2 * case.oracle(x) + 3 * (before + before.triu(1).mT).double())


@named("options", KRON_PATHS)
@named("shape", ROWS)
def test_kronecker_factors_of_rows(shape, options, device):
    for homogeneous in (False, True):
        x = torch.randint(-3, 4, shape).float().to(device)
        rows, size = x.cpu().double().reshape(1, -1, shape[-1]), shape[-1] + homogeneous
        out = torch.ones(size, size, device=device)
        with cuda_options(device, **options) as operators:
            operators.linear_kron_factor(out, x, 0.5, 2.0, homogeneous, False)
        assert_exact(out, 0.5 * outer_products(rows, homogeneous)[0] + 2)


NON_FINITE_CASES = some(
    ALL_CASES,
    "linear_wide",
    "linear_few_tokens",
    "linear_tokens",
    "conv2d_3x3",
    "conv2d_depthwise",
    "channels last",
    "rows",
)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@named("options", PATHS)
@named("case", NON_FINITE_CASES)
def test_non_finite_samples_stay_alone(case, options, value, device):
    """One NaN or Inf makes its own sample's results non-finite, and no other's."""
    input, grad_output = case.operands(device)
    sample = len(input) // 2
    clean = weight_stats(case, input, grad_output, FIELDS[1:3], **options)
    input, grad_output = input.clone(), grad_output.clone()
    grad_output[(sample, *[0] * (grad_output.dim() - 1))] = value
    for fields in (FIELDS[1:3], FIELDS[2:3], FIELDS):
        stats = weight_stats(case, input, grad_output, fields, **options)
        finite = stats.batch_l2.isfinite()
        assert not finite[sample] and finite.sum() == len(input) - 1
        torch.testing.assert_close(stats.batch_l2[finite], clean.batch_l2[finite], rtol=1e-5, atol=0)
        if "batch_grad" in fields:
            torch.testing.assert_close(stats.batch_grad[finite], clean.batch_grad[finite], rtol=1e-5, atol=1e-5)
            assert not stats.batch_grad[sample].isfinite().all()
        if "grad" in fields:
            hit = ~stats.batch_grad[sample].isfinite()
            for name in ("grad", "sum_grad_squared", "sum_grad_centered_squared"):
                assert torch.equal(~getattr(stats, name).isfinite(), hit), name
