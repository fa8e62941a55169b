"""Half-precision operands: statistics in float32, as exact as float32 arithmetic on the rounded operands allows."""

import pytest
import torch
from helpers import assert_close, named, some
from op_cases import CASES, HALVES, TOLERANCES, assert_stats, linear
from oracle import FIELDS, Stats


def check_half_precision(case, dtype, device):
    input, grad_output = case.operands(device, dtype)
    expected, magnitude = case.oracle(input, grad_output), case.magnitudes(input, grad_output)
    for actual, reference, scale in zip(case.raw(input, grad_output), expected, magnitude, strict=True):
        assert {value.dtype for value in actual[:2]} == {dtype}
        assert {value.dtype for value in actual[2:]} == {torch.float32}
        unrounded = []
        for name, value, exact, size in zip(FIELDS, actual, reference, scale, strict=True):
            if name in ("grad", "batch_grad"):
                rounding = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).smallest_normal
                error = (value.cpu().double() - exact).abs()
                assert (error <= 1.01 * rounding + 1e-5 * size).all(), f"{name}: more than rounded once"
                value = exact
            unrounded.append(value)
        assert_stats(Stats(*unrounded), reference, scale, TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@named("case", CASES)
def test_half_precision(case, dtype, device):
    check_half_precision(case, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@named("case", some(CASES, "linear_tokens", "conv2d_grouped", "conv_transpose2d"))
def test_types_through_python(case, dtype, device):
    stats = case.public(*case.operands(device, dtype), FIELDS[:4])
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert [value.dtype for value in stats] == [dtype, dtype, statistics, statistics]
    assert {value.device.type for value in stats} == {device.type}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_statistics_are_formed_before_rounding(dtype, device):
    """A per-sample gradient above float16's range, or one that bfloat16 would round away, is still squared exactly."""
    input = torch.full((2, 400, 3), 20.0, dtype=dtype, device=device)
    grad_output = torch.full((2, 400, 2), 10.0, dtype=dtype, device=device)
    grad_output[1] = 1.0
    grad_output[1, 0] = 1.0078125
    weight, _ = linear(input.shape, 2).raw(input, grad_output)
    expected, _ = linear(input.shape, 2).oracle(input, grad_output)  # G = 80 000 and 8 000.15625
    for name in ("batch_l2", "sum_grad_squared", "sum_grad_centered_squared"):
        assert_close(name, getattr(weight, name), getattr(expected, name), 1e-6)
