"""Weighted sums of per-sample gradients against a float64 loop over samples."""

import math
from dataclasses import replace

import helpers
import pytest
import torch
from helpers import assert_close, named, some
from op_cases import CASES, HALVES, LAYOUTS, TOLERANCES, Case, cpu_option, kernel_dtypes
from oracle import layer_statistics
from property_testing import given, settings, st
from test_ops_differentiable import SMALL, double_operands
from test_ops_geometry import EMPTY, GEOMETRIES, bias_cases, conv_cases, linear_cases

import backpack_cuda as bp
from backpack_cuda.stats import statistics_dtype

ANY_CASE = st.one_of(linear_cases(), conv_cases(transposed=False), conv_cases(transposed=True))


def some_weights(samples: int, dtype: torch.dtype, device="cpu", seed: int = 0) -> torch.Tensor:
    """[N], of both signs and with a zero, in the type of the statistics of `dtype`; not contiguous."""
    values = torch.randn(samples, 2, generator=torch.Generator().manual_seed(seed)).to(statistics_dtype(dtype))
    values[::3] = 0
    return values.to(device)[:, 1]


def weighted(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_n weights[n] rows[n] in float64."""
    return torch.tensordot(weights.cpu().double(), rows.double(), 1)


def check(actual: torch.Tensor, case: Case, input, grad_output, weights) -> None:
    """Within the tolerance of the type, and rounded once for half types."""
    dtype = input.dtype
    expected = weighted(case.oracle(input, grad_output)[0].batch_grad, weights)
    size = weighted(case.magnitudes(input, grad_output)[0].batch_grad, weights.abs())
    assert actual.dtype == dtype and actual.shape == case.weight_shape and actual.is_contiguous()
    error = (actual.cpu().double() - expected).abs()
    bound = TOLERANCES[statistics_dtype(dtype)].entry * size
    if dtype in HALVES:
        bound += 0.505 * torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).smallest_normal
        one_row = case.family == "linear" and math.prod(case.input_shape[1:-1]) == 1
        if one_row and (input.is_cuda or helpers.every_kernel_is_slow):
            bound += 0.505 * torch.finfo(dtype).eps * size  # CUDA rounds the weighted rows, then multiplies
    assert (error <= bound).all(), f"error {error.max():.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@named("case", CASES)
def test_named_cases(case, dtype, device):
    operands = case.operands(device, dtype)
    weights = some_weights(len(operands[0]), dtype, device)
    check(case.public_weighted(*operands, weights), case, *operands, weights)


@settings(GEOMETRIES, max_examples=300)
@given(case=ANY_CASE)
def test_random_geometries(case, device):
    input, grad_output = case.operands(device)
    for dtype in kernel_dtypes(device):
        placed = [
            LAYOUTS[layout](operand.to(dtype))
            for layout, operand in ((case.input_layout, input), (case.grad_output_layout, grad_output))
        ]
        weights = some_weights(len(input), dtype, device, case.seed)
        check(case.raw_weighted(*placed, weights), case, *placed, weights)


@pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="the CPU kernels' switches")
@settings(GEOMETRIES, max_examples=200)
@given(case=ANY_CASE, chunk_bytes=st.sampled_from((0, 1, 500, 20_000)), method=st.integers(0, 6))
def test_every_way_on_the_cpu(case, chunk_bytes, method):
    operands = case.operands()
    weights = some_weights(len(operands[0]), torch.float32)
    with cpu_option("chunk_bytes", chunk_bytes), cpu_option("method", method):
        check(case.raw_weighted(*operands, weights), case, *operands, weights)


@settings(GEOMETRIES, max_examples=100)
@given(case=bias_cases())
def test_bias(case, device):
    shape, channel_dim, layout, seed = case
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    broadcast = [1] * len(shape)
    broadcast[channel_dim] = -1

    def add_bias(x, _, bias):
        return x * 0 + bias.view(broadcast)

    for dtype, tolerance in TOLERANCES.items():
        g = LAYOUTS[layout](grad_output.to(dtype))
        weights = some_weights(shape[0], dtype, device, seed)
        expected = weighted(layer_statistics(add_bias, (), shape[channel_dim], g, g)[1].batch_grad, weights)
        actual = bp.ops.bias_weighted_grad(g, weights, channel_dim)
        assert actual.dtype == dtype
        largest = (g.abs().sum() * weights.abs().sum()).item()
        assert_close("bias_weighted_grad", actual, expected, tolerance.largest, largest)


@named("case, samples", EMPTY)
def test_empty_operands_give_zeros(case, samples, device):
    input, grad_output = case.operands(device)
    grad = case.public_weighted(input, grad_output, torch.ones(samples, device=device))
    assert grad.shape == case.weight_shape and (grad == 0).all()
    dim = -1 if case.family == "linear" else 1
    grad = bp.ops.bias_weighted_grad(grad_output, torch.ones(samples, device=device), dim)
    assert grad.shape == (case.num_bias,) and (grad == 0).all()


@named("case", CASES)
def test_unit_weights_give_the_gradient(case, device):
    """Small integers: to the last bit."""
    operands = case.operands(device, integers=True)
    grad = case.public_weighted(*operands, torch.ones(len(operands[0]), device=device))
    assert torch.equal(grad, case.public(*operands, ("grad", "batch_l2")).grad)


@named("case", some(CASES, "linear", "linear_tokens", "conv2d_3x3", "conv2d_depthwise", "conv_transpose2d"))
def test_one_weight_reaches_one_sample(case, device):
    """A NaN among the weights spoils everything, a zero drops its sample."""
    input, grad_output = case.operands(device)
    weights = torch.zeros(len(input), device=device)
    weights[1] = 1.0
    only = case.public_weighted(input, grad_output, weights)
    single = replace(case, input_shape=(1, *case.input_shape[1:]))
    check(only, single, input[1:2], grad_output[1:2], weights[1:2])
    weights[0] = math.nan
    assert case.public_weighted(input, grad_output, weights).isnan().any()


def test_scaling_keeps_the_range_of_half_types(device):
    """The weights are applied in float32: a sum above float16's range that a weight brings back into it."""
    input = torch.full((2, 400, 3), 20.0, dtype=torch.float16, device=device)
    grad_output = torch.full((2, 400, 2), 10.0, dtype=torch.float16, device=device)  # G = 80 000
    grad = bp.ops.linear_weighted_grad(input, grad_output, torch.full((2,), 1e-2, device=device))
    assert_close("grad", grad, torch.full((2, 3), 1600.0, dtype=torch.float64), 1e-3)


@pytest.mark.parametrize("differentiate", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@named("case", SMALL)
def test_gradcheck(case, differentiate, device):
    operands = [t.detach() for t in double_operands(case, device)]
    operands.append(some_weights(len(operands[0]), torch.float64, device).clone())
    for index in differentiate:
        operands[index].requires_grad_()
    assert torch.autograd.gradcheck(case.public_weighted, operands)


@named("case", some(SMALL, "linear_tokens", "conv2d_grouped", "conv_transpose1d"))
def test_second_derivatives(case, device):
    operands = [*double_operands(case, device), torch.ones(2, dtype=torch.float64, device=device, requires_grad=True)]
    assert torch.autograd.gradgradcheck(case.public_weighted, operands)


def test_gradcheck_of_the_bias(device):
    grad_output = torch.randn(2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.randn(2, dtype=torch.float64, device=device, requires_grad=True)
    for channel_dim in (1, 2):
        assert torch.autograd.gradcheck(
            lambda g, w, d=channel_dim: bp.ops.bias_weighted_grad(g, w, d), (grad_output, weights)
        )


@named("case", CASES)
def test_differentiable_results_are_the_same_numbers(case, device):
    input, grad_output = case.operands(device)
    weights = some_weights(len(input), input.dtype, device)
    grad = case.public_weighted(input, grad_output, weights.clone().requires_grad_())
    assert grad.requires_grad
    check(grad.detach(), case, input, grad_output, weights)


@named("case", some(SMALL, "linear_tokens", "conv2d_grouped", "conv_transpose1d"))
def test_vmap_over_weights(case, device):
    input, grad_output = (t.detach() for t in double_operands(case, device))
    weights = torch.randn(3, len(input), dtype=torch.float64, device=device)
    rows = torch.vmap(lambda w: case.public_weighted(input, grad_output, w))(weights)
    assert torch.allclose(rows, torch.stack([case.public_weighted(input, grad_output, w) for w in weights]))


@named("case", some(CASES, "linear_tokens", "conv2d_grouped", "conv_transpose2d"))
def test_autocast_does_not_lower_the_precision(case, device):
    input, grad_output = case.operands(device)
    weights = some_weights(len(input), input.dtype, device)
    for requires_grad in (False, True):
        input.requires_grad_(requires_grad)
        with torch.autocast(device.type, torch.bfloat16):
            grad = case.public_weighted(input, grad_output, weights)
        check(grad.detach(), case, input.detach(), grad_output, weights)


WRONG = {  # weights for operands of 3 samples in float32 -> error, what its message says
    "too few": (torch.ones(2), ValueError, r"weights: .*\[3\], got \[2\]"),
    "too many dimensions": (torch.ones(3, 1), ValueError, r"weights: .*got \[3, 1\]"),
    "a scalar": (torch.tensor(1.0), ValueError, r"weights: .*got \[\]"),
    "float64": (torch.ones(3).double(), TypeError, "weights: expected torch.float32.*torch.float64"),
    "bfloat16": (torch.ones(3).bfloat16(), TypeError, "weights: expected torch.float32.*torch.bfloat16"),
    "integers": (torch.ones(3).long(), TypeError, "weights: expected torch.float32.*torch.int64"),
    "a list": ([1.0, 1.0, 1.0], TypeError, "weights: expected a Tensor, got list"),
    "None": (None, TypeError, "weights: expected a Tensor, got NoneType"),
    "sparse": (torch.ones(3).to_sparse(), NotImplementedError, "weights: .*torch.sparse_coo"),
    "another device": (torch.ones(3, device="meta"), ValueError, "weights: .*device.*meta"),
}
CALLS = {
    "linear": (bp.ops.linear_weighted_grad, (3, 4), (3, 5), ()),
    "conv": (bp.ops.conv_weighted_grad, (3, 4, 8), (3, 5, 6), (3,)),
    "conv_transpose": (bp.ops.conv_transpose_weighted_grad, (3, 4, 6), (3, 5, 8), (3,)),
    "bias": (lambda _, g, w: bp.ops.bias_weighted_grad(g, w), (3, 5), (3, 5), ()),
}


@named("weights, error, message", WRONG)
@named("call, input, grad_output, sizes", CALLS)
def test_wrong_weights(call, input, grad_output, sizes, weights, error, message, device):
    if isinstance(weights, torch.Tensor) and weights.device.type == "cpu":
        weights = weights.to(device)
    with pytest.raises(error, match=message):
        call(torch.ones(input, device=device), torch.ones(grad_output, device=device), weights, *sizes)


@named("call, input, grad_output, sizes", CALLS)
def test_wrong_operands(call, input, grad_output, sizes, device):
    """The checks are those of the other calls."""
    weights = torch.ones(3, device=device)
    with pytest.raises(TypeError, match="grad_output"):
        call(torch.ones(input, device=device), torch.ones(grad_output, device=device).long(), weights, *sizes)


RAW = {
    "too few": torch.ones(2),
    "a matrix": torch.ones(3, 1),
    "float64": torch.ones(3).double(),
}


@named("weights", RAW)
@named("case", some(CASES, "linear_tokens", "conv1d", "conv_transpose1d"))
def test_the_operators_check_again(case, weights, device):
    with pytest.raises(RuntimeError):
        case.raw_weighted(*case.operands(device), weights.to(device))


def test_clipping_by_two_calls(device):
    """DP-SGD's clipped gradient of a small network from norms and a weighted sum, against explicit clipping."""
    torch.manual_seed(0)
    clip = 0.7
    conv, dense = torch.nn.Conv2d(3, 4, 3).to(device), torch.nn.Linear(36, 5).to(device)
    x, y = torch.randn(6, 3, 5, 5, device=device), torch.randint(5, (6,), device=device)
    z = conv(x)
    h = z.relu().flatten(1)
    out = dense(h)
    loss = torch.nn.functional.cross_entropy(out, y, reduction="sum")
    grad_z, grad_out = torch.autograd.grad(loss, (z, out))
    operands = (x, grad_z), (h.detach(), grad_out)

    norms = bp.ops.conv_grad_stats(*operands[0], 3, want="batch_l2").batch_l2
    norms = norms + bp.ops.linear_grad_stats(*operands[1], want="batch_l2").batch_l2
    norms = norms + bp.ops.bias_grad_stats(grad_z, "batch_l2", channel_dim=1).batch_l2
    norms = norms + bp.ops.bias_grad_stats(grad_out, "batch_l2").batch_l2
    factors = (clip / norms.sqrt()).clamp(max=1.0)
    clipped = (
        bp.ops.conv_weighted_grad(*operands[0], factors, 3),
        bp.ops.bias_weighted_grad(grad_z, factors, channel_dim=1),
        bp.ops.linear_weighted_grad(*operands[1], factors),
        bp.ops.bias_weighted_grad(grad_out, factors),
    )
    assert (factors < 1).any()
    expected = [0.0] * 4
    for n in range(6):
        sample = torch.nn.functional.cross_entropy(dense(conv(x[n : n + 1]).relu().flatten(1)), y[n : n + 1])
        gradients = torch.autograd.grad(sample, (*conv.parameters(), *dense.parameters()))
        norm = torch.stack([g.norm() for g in gradients]).norm()
        expected = [e + g * (clip / norm).clamp(max=1.0) for e, g in zip(expected, gradients, strict=True)]
    for actual, reference in zip(clipped, expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-6)
