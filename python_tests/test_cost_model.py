"""Which kernels serve a problem: the choices that csrc/cuda/cost_model.cpp makes, and that they can be forced."""

import ctypes
from math import prod

import pytest
from harness_tools import harness_build, needs_harness
from helpers import named
from stats_on_cpu import Operand, OuterProblem

GRAD, BATCH_GRAD, NORM, SQUARES, CENTERED = 1, 2, 4, 8, 16
CONTRACT, SEPARATE, DEPTHWISE = 1, 2, 3
FLOAT32, BFLOAT16 = 0, 1


def linear(n, t, i, o, element=FLOAT32, tf32=False, rows_merge=True):
    """input [N, T, I], grad_output [N, T, O], contiguous, or with a gap between the samples."""
    gap = 0 if rows_merge else 8
    ones = (1, 1, 1)
    a, b = (Operand(None, t * size + gap, 1, (0, 0, size)) for size in (i, o))
    return OuterProblem(element, tf32, n, 1, o, i, (1, 1, t), (1, 1, t), ones, ones, (0, 0, 0), ones, a, b), True


def conv(n, channels, out_channels, size, kernel, groups=1, element=FLOAT32, tf32=False):
    """input [N, C, size, size], grad_output [N, O, size, size], contiguous."""
    sizes, ones = (1, size, size), (1, 1, 1)
    a, b = (Operand(None, c * size**2, size**2, (0, size, 1)) for c in (channels, out_channels))
    shape = (groups, out_channels // groups, channels // groups)
    half = (0, kernel // 2, kernel // 2)
    return OuterProblem(element, tf32, n, *shape, sizes, sizes, (1, kernel, kernel), ones, half, ones, a, b), False


@pytest.fixture(scope="module")
def choose():
    path = harness_build.build(["cuda/cost_model.cpp", "harness/tests/cost_model_entry.cpp"])
    function = ctypes.CDLL(str(path)).choose_way_for

    def call(case, wanted, weighted=False, forced=0):
        """(the way chosen, seconds by way)"""
        problem, is_linear = case
        seconds = (ctypes.c_double * 3)()
        way = function(ctypes.byref(problem), wanted, weighted, is_linear, forced, seconds)
        return way, {k + 1: s for k, s in enumerate(seconds) if s >= 0}

    return call


MLP, TOKENS, TRANSFORMER = (
    linear(4096, 1, 4096, 4096),
    linear(512, 4, 1024, 1024),
    linear(8, 1024, 768, 3072, tf32=True),
)
CHOICES = {
    "T = 1: norms and gradient": (MLP, GRAD | NORM, SEPARATE),
    "T = 1: second moment": (MLP, GRAD | SQUARES, SEPARATE),
    "T = 1: variance in bfloat16": (linear(4096, 1, 4096, 4096, BFLOAT16), GRAD | NORM | CENTERED, SEPARATE),
    "T = 1: per-sample gradients": (MLP, GRAD | NORM | BATCH_GRAD, CONTRACT),
    "few tokens: norms": (TOKENS, NORM, SEPARATE),
    "few tokens: norms and gradient": (linear(512, 4, 1024, 1024, tf32=True), GRAD | NORM, SEPARATE),
    "few tokens: second moment": (TOKENS, GRAD | NORM | SQUARES, CONTRACT),
    "transformer: everything": (TRANSFORMER, GRAD | NORM | SQUARES, CONTRACT),
    "transformer: norms and gradient": (TRANSFORMER, GRAD | NORM, CONTRACT),
    "transformer: norms, T below 2 I O / (I + O)": (TRANSFORMER, NORM, SEPARATE),
    "transformer: norms, T above it": (linear(8, 1024, 768, 768, tf32=True), NORM, CONTRACT),
    "ResNet-50, 3x3": (conv(128, 64, 64, 56, 3, tf32=True), GRAD | NORM | SQUARES, CONTRACT),
    "MobileNetV2, depthwise": (conv(128, 96, 96, 56, 3, groups=96), GRAD | NORM | SQUARES, DEPTHWISE),
    "depthwise, bfloat16": (conv(128, 96, 96, 56, 3, groups=96, element=BFLOAT16), GRAD | NORM, DEPTHWISE),
    "ResNeXt, 4 channels per group": (conv(128, 128, 128, 56, 3, groups=32), GRAD | NORM | SQUARES, DEPTHWISE),
    "32 channels per group": (conv(128, 512, 512, 14, 3, groups=16, tf32=True), GRAD | NORM | SQUARES, CONTRACT),
}


@needs_harness
@named("case, wanted, way", CHOICES)
def test_choice(choose, case, wanted, way):
    chosen, seconds = choose(case, wanted)
    assert chosen == way, seconds
    assert all(0 < value < 1 for value in seconds.values())
    assert seconds[chosen] == min(seconds.values())


@needs_harness
@named("case, wanted, way", CHOICES)
def test_every_way_that_applies_can_be_forced(choose, case, wanted, way):
    _, seconds = choose(case, wanted)
    for forced in (CONTRACT, SEPARATE, DEPTHWISE):
        assert choose(case, wanted, forced=forced)[0] == (forced if forced in seconds else way)


@needs_harness
def test_what_does_not_apply_is_not_chosen(choose):
    assert set(choose(MLP, GRAD | BATCH_GRAD)[1]) == {CONTRACT}
    assert set(choose(TOKENS, SQUARES)[1]) == {CONTRACT}
    assert set(choose(linear(8, 4, 64, 64, rows_merge=False), GRAD | NORM)[1]) == {CONTRACT}
    assert set(choose(linear(8, 4, 64, 64, rows_merge=False), NORM)[1]) == {CONTRACT, SEPARATE}
    assert set(choose(conv(4, 8, 8, 7, 1), NORM)[1]) == {CONTRACT, DEPTHWISE}
    assert choose(TOKENS, GRAD, weighted=True)[0] == CONTRACT
    assert choose(MLP, GRAD, weighted=True)[0] == SEPARATE


@needs_harness
def test_cost_grows_with_the_problem(choose):
    for small, large in (((8, 16, 64, 64), (8, 16, 64, 128)), ((8, 16, 64, 64), (16, 16, 64, 64))):
        assert prod(small) < prod(large)
        for way, seconds in choose(linear(*small), NORM)[1].items():
            assert seconds < choose(linear(*large), NORM)[1][way]
