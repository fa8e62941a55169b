"""Random geometries of every layer family against float64 autograd, in float32 and float64."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import assert_close, examples, named
from op_cases import CASES, LAYOUTS, TOLERANCES, Case, assert_stats, check_case, conv, kernel_dtypes, linear, want_bits
from oracle import FIELDS, layer_statistics
from property_testing import HealthCheck, given, settings, st

import backpack_cuda as bp

GEOMETRIES = settings(
    max_examples=examples(600), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
CHANNELS = st.sampled_from((1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 40))
SAMPLES = st.sampled_from((1, 1, 2, 2, 3, 3, 4, 5, 0))
PLACEMENT = {
    "input_layout": st.sampled_from(sorted(LAYOUTS)),
    "grad_output_layout": st.sampled_from(sorted(LAYOUTS)),
    "seed": st.integers(0, 10**6),
}


def tuples_of(elements, size: int):
    return st.tuples(*[elements] * size)


@st.composite
def linear_cases(draw) -> Case:
    middle = draw(st.lists(st.sampled_from((1, 2, 3, 4, 6, 9, 0)), max_size=3))
    placement = {name: draw(strategy) for name, strategy in PLACEMENT.items()}
    return linear((draw(SAMPLES), *middle, draw(CHANNELS)), draw(CHANNELS), **placement)


@st.composite
def group_shapes(draw) -> tuple[int, int, int]:
    """(groups, channels in, channels out); half of the grouped ones depthwise, with a channel multiplier."""
    groups = draw(st.sampled_from((1, 1, 1, 2, 3, 4, 9, 17)))
    wide = CHANNELS if groups == 1 else st.sampled_from((1, 2, 3, 5))
    return (
        groups,
        groups * draw(st.just(1) if groups > 1 and draw(st.booleans()) else wide),
        groups * draw(wide),
    )


@st.composite
def conv_cases(draw, transposed: bool) -> Case:
    dims = draw(st.sampled_from((1, 2, 2, 3)))
    groups, channels_in, channels_out = draw(group_shapes())
    kernel = draw(tuples_of(st.integers(1, 4 if dims < 3 else 3), dims))
    stride = draw(tuples_of(st.integers(1, 3), dims))
    dilation = draw(tuples_of(st.integers(1, 3), dims))
    padding = draw(tuples_of(st.integers(0, 3), dims))
    small_side = draw(tuples_of(st.integers(1, (9, 6, 3)[dims - 1]), dims))  # of the grad_output (conv) or input
    extra = draw(tuples_of(st.integers(0, 2), dims))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    output_padding = None
    if transposed:
        output_padding = tuple(min(e, max(s, d) - 1) for e, s, d in zip(extra, stride, dilation, strict=True))
        size = small_side
        full = [(i - 1) * s + r + e for i, s, r, e in zip(size, stride, reach, output_padding, strict=True)]
        padding = tuple(min(p, (f - 1) // 2) for p, f in zip(padding, full, strict=True))
    else:
        needed = [(o - 1) * s + r - 2 * p for o, s, r, p in zip(small_side, stride, reach, padding, strict=True)]
        size = tuple(max(1, n + min(e, s - 1)) for n, e, s in zip(needed, extra, stride, strict=True))
    placement = {name: draw(strategy) for name, strategy in PLACEMENT.items()}
    shape = (draw(SAMPLES), channels_in, *size)
    return conv(shape, channels_out, kernel, stride, padding, dilation, groups, output_padding, **placement)


@GEOMETRIES
@given(case=linear_cases())
def test_linear_geometries(case, device):
    check_case(case, device)


@GEOMETRIES
@given(case=conv_cases(transposed=False))
def test_conv_geometries(case, device):
    check_case(case, device)


@GEOMETRIES
@given(case=conv_cases(transposed=True))
def test_conv_transpose_geometries(case, device):
    check_case(case, device)


@named("case", CASES)
def test_named_cases(case, device):
    check_case(case, device)


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
@pytest.mark.parametrize("name", ["linear", "linear_tokens", "conv2d_3x3", "conv2d_depthwise", "conv_transpose2d"])
def test_every_layout(name, layouts, device):
    check_case(replace(CASES[name], input_layout=layouts[0], grad_output_layout=layouts[1]), device)


SUBSETS = [subset for size in range(1, 5) for subset in itertools.combinations(FIELDS[:4], size)]


@named("case", CASES)
def test_every_subset_through_python(case, device):
    """What is wanted is right whatever else is wanted; what is not wanted is None."""
    input, grad_output = case.operands(device)
    expected, _ = case.oracle(input, grad_output)
    for want in SUBSETS:
        stats = case.public(input, grad_output, want)
        assert type(stats).__name__ == "GradStats" and tuple(stats._fields) == FIELDS[:4]
        for name in FIELDS[:4]:
            if name in want:
                assert_close(f"{name} of {want}", getattr(stats, name), getattr(expected, name), 1e-5)
            else:
                assert getattr(stats, name) is None, f"{name} of {want}"


@pytest.mark.parametrize(
    "name", ["linear", "linear_few_tokens", "conv2d_grouped", "conv2d_depthwise", "conv_transpose2d"]
)
def test_every_subset_of_the_operator(name, device):
    """Weight and bias wants are independent bit sets."""
    case = CASES[name]
    input, grad_output = case.operands(device)
    expected, magnitude = case.oracle(input, grad_output), case.magnitudes(input, grad_output)
    for weight_want in range(32):
        wants = (weight_want, 31 - weight_want)
        for actual, reference, scale, want in zip(
            case.raw(input, grad_output, *wants), expected, magnitude, wants, strict=True
        ):
            fields = [field for field in FIELDS if want & want_bits(field)]
            assert_stats(actual, reference, scale, TOLERANCES[torch.float32], fields)


@st.composite
def bias_cases(draw) -> tuple[tuple[int, ...], int, str, int]:
    shape = (draw(SAMPLES), *draw(st.lists(st.sampled_from((1, 2, 3, 7, 20, 33, 0)), min_size=1, max_size=4)))
    channel_dim = draw(st.integers(1, len(shape) - 1))
    if draw(st.booleans()):
        channel_dim -= len(shape)
    return shape, channel_dim, draw(PLACEMENT["grad_output_layout"]), draw(PLACEMENT["seed"])


@settings(GEOMETRIES, max_examples=examples(200))
@given(case=bias_cases())
def test_bias_geometries(case, device):
    shape, channel_dim, layout, seed = case
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    grad_output = LAYOUTS[layout](grad_output)
    broadcast = [1] * len(shape)
    broadcast[channel_dim] = -1

    def add_bias(x, _, bias):
        return x * 0 + bias.view(broadcast)

    def oracle(g):
        return layer_statistics(add_bias, (), shape[channel_dim], g, g)[1]

    expected, magnitude = oracle(grad_output), oracle(grad_output.abs())
    for dtype in kernel_dtypes(device):
        tolerance = TOLERANCES[dtype]
        g = LAYOUTS[layout](grad_output.to(dtype))
        raw = torch.ops.backpack_cuda.bias_grad_stats(g, channel_dim, 31)
        assert_stats(type(expected)(*raw), expected, magnitude, tolerance)
        stats = bp.ops.bias_grad_stats(g, want=FIELDS[:4], channel_dim=channel_dim)
        for value, field in zip(stats, FIELDS[:4], strict=True):
            assert_close(field, value, getattr(expected, field), tolerance.largest)


def test_bias_channel_dim_defaults_to_the_last(device):
    grad_output = torch.randn(3, 4, 5, device=device)
    stats = bp.ops.bias_grad_stats(grad_output, want=("batch_grad",))
    assert_close("batch_grad", stats.batch_grad, grad_output.cpu().double().sum(1), 1e-5)


EMPTY = {
    "no samples": (linear((0, 5), 3), 0),
    "no samples with tokens": (linear((0, 4, 5), 3), 0),
    "no tokens": (linear((3, 0, 5), 2), 3),
    "no tokens in the second middle dimension": (linear((3, 2, 0, 5), 2), 3),
    "no images": (conv((0, 4, 5, 5), 6, 3, padding=1, groups=2), 0),
    "no images, depthwise": (conv((0, 4, 5), 4, 3, groups=4), 0),
    "no images, transposed": (conv((0, 4, 5, 5), 6, 3, padding=1, groups=2, output_padding=0), 0),
}


@named("case, samples", EMPTY)
def test_empty_operands_give_zeros(case, samples, device):
    weight, bias = case.raw(*case.operands(device))
    for stats, shape in ((weight, case.weight_shape), (bias, (case.num_bias,))):
        shapes = {"batch_grad": (samples, *shape), "batch_l2": (samples,)}
        for name, value in zip(FIELDS, stats, strict=True):
            assert value.shape == shapes.get(name, shape), name
            assert (value == 0).all(), name
    wanted = case.public(*case.operands(device), FIELDS[:4])
    assert [value.shape for value in wanted] == [value.shape for value in weight[:4]]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_without_output_positions(groups, device):
    """T = 0, which torch's own layers refuse: zeros."""
    input, grad_output = torch.randn(3, 4, 2, 5, device=device), torch.randn(3, 8, 0, 3, device=device)
    stats = bp.ops.conv_grad_stats(input, grad_output, 3, groups=groups, want=FIELDS[:4])
    weight = (8, 4 // groups, 3, 3)
    assert [tuple(value.shape) for value in stats] == [weight, (3, *weight), (3,), weight]
    assert all((value == 0).all() for value in stats)
    stats = bp.ops.bias_grad_stats(grad_output, want=FIELDS[:4], channel_dim=1)
    assert all((value == 0).all() for value in stats)


LARGE_MEANS = {  # case, spread of the operands around 1: the gradients' mean is then about 100 times their spread
    "linear": (linear((64, 70), 45), 9e-3),
    "linear_large_batch": (linear((4000, 12), 9), 1e-2),
    "linear_tokens": (linear((40, 3, 20), 33), 1.5e-2),
    "linear_many_tokens": (linear((40, 64, 20), 33), 7e-2),
    "conv2d": (conv((40, 5, 8, 9), 34, 3), 6e-2),
    "conv2d_depthwise": (conv((40, 6, 7, 5), 6, 3, groups=6), 4e-2),
    "conv_transpose2d": (conv((40, 5, 6, 6), 7, 3, stride=2, output_padding=0), 1.5e-1),
}


@named("case, spread", LARGE_MEANS)
def test_centered_squares_do_not_cancel(case, spread, device):
    """Within 1 % in float32 where the mean is up to 100 times the spread (differences of float32 sums lose more)."""
    input, grad_output = (1 + spread * operand for operand in case.operands(device))
    for actual, expected in zip(case.raw(input, grad_output), case.oracle(input, grad_output), strict=True):
        centered = expected.sum_grad_centered_squared
        counts = expected.sum_grad_squared <= 1.0001e4 * centered
        assert counts.any() and (expected.sum_grad_squared > 4e2 * centered).all()
        assert (actual.sum_grad_centered_squared.cpu() / centered - 1)[counts].abs().max() < 1e-2


def test_results_do_not_alias_their_operands(device):
    """Writing into a result leaves the operands as they are (T = 1 and N = 1 tempt to return them)."""
    for case in (linear((1, 4), 1), linear((3, 1), 4), conv((1, 1, 1, 1), 3, 1), linear((1, 1, 4), 1)):
        input, grad_output = case.operands(device)
        copies = input.clone(), grad_output.clone()
        for value in itertools.chain(*case.raw(input, grad_output)):
            value.fill_(math.nan)
        assert torch.equal(input, copies[0]) and torch.equal(grad_output, copies[1])
