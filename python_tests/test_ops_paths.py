"""Every way through the CPU kernels: instruction sets, chunk sizes, forced methods, threads, long sums, memory."""

import math

import pytest
import torch
from helpers import named, run_memory_probe
from memory_probe import LARGE
from op_cases import CASES, TOLERANCES, Case, assert_stats, check_case, conv, cpu_option, linear, want_bits
from oracle import FIELDS, Stats
from property_testing import given, settings, st
from test_ops_geometry import GEOMETRIES, conv_cases, linear_cases

pytestmark = pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="the CPU kernels' switches")

SUPPORTED = {"AVX512": (512, 256, 128), "AVX2": (256, 128)}.get(torch.backends.cpu.get_cpu_capability(), (128,))
INSTRUCTION_SETS = [
    pytest.param(bits, marks=pytest.mark.skipif(bits not in SUPPORTED, reason=f"this CPU has no {bits}-bit vectors"))
    for bits in (512, 256, 128)
]


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("chunk_bytes", [0, 1, 3000])
@named("case", CASES)
def test_instruction_sets_and_chunks(case, chunk_bytes, isa):
    """Chunks of one sample (1 byte), of some, and of all; float32 and float64."""
    with cpu_option("isa", isa), cpu_option("chunk_bytes", chunk_bytes):
        check_case(case)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@settings(GEOMETRIES, max_examples=150)
@given(
    case=st.one_of(linear_cases(), conv_cases(transposed=False), conv_cases(transposed=True)),
    chunk_bytes=st.sampled_from((1, 500, 20_000)),
)
def test_random_geometries(case, chunk_bytes, isa):
    with cpu_option("isa", isa), cpu_option("chunk_bytes", chunk_bytes):
        check_case(case)


METHODS = {"contract": 1, "gram": 2, "rows": 3, "blocked": 4, "patches": 5, "grouped": 6}


@named("method", METHODS)
@named("case", CASES)
def test_forced_methods(case, method):
    """Every way to compute gives the same; one that does not apply to a case is ignored."""
    with cpu_option("method", method):
        check_case(case)
        input, grad_output = case.operands()
        expected, magnitude = case.oracle(input, grad_output), case.magnitudes(input, grad_output)
        for names in (("batch_l2",), ("grad", "batch_l2"), ("sum_grad_squared",), ("batch_grad",)):
            results = case.raw(input, grad_output, want_bits(*names), want_bits(*names))
            for actual, reference, scale in zip(results, expected, magnitude, strict=True):
                assert_stats(actual, reference, scale, TOLERANCES[torch.float32], names)


@settings(GEOMETRIES, max_examples=300)
@given(
    case=st.one_of(linear_cases(), conv_cases(transposed=False), conv_cases(transposed=True)),
    method=st.sampled_from(sorted(METHODS.values())),
    isa=st.sampled_from(SUPPORTED),
)
def test_random_geometries_by_forced_methods(case, method, isa):
    with cpu_option("method", method), cpu_option("isa", isa):
        check_case(case)


@pytest.mark.parametrize("name, value", [("isa", 64), ("isa", -1), ("method", 99), ("chunk_bytes", -1), ("speed", 1)])
def test_unknown_options_are_refused(name, value):
    with pytest.raises(RuntimeError, match=name):
        torch.ops.backpack_cuda._cpu_option(name, value)


SUBSTANTIAL = {  # enough work that two threads share it
    "linear": linear((300, 200), 150),
    "linear_tokens": linear((20, 50, 200), 150),
    "linear_few_tokens": linear((100, 3, 200), 150),
    "conv": conv((20, 30, 15, 15), 40, 3, padding=1),
    "conv_few_channels": conv((20, 3, 32, 32), 16, 5),
    "conv_grouped": conv((20, 40, 15, 15), 40, 3, padding=1, groups=4),
    "conv_depthwise": conv((20, 100, 15, 15), 100, 3, padding=1, groups=100),
    "conv3d": conv((6, 10, 9, 9, 9), 20, 3),
    "conv_transpose": conv((10, 30, 9, 9), 40, 3, stride=2, output_padding=1),
}


@named("case", SUBSTANTIAL)
def test_thread_counts_and_repetitions_agree_to_the_bit(case):
    operands = case.operands()
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        weight, bias = case.raw(*operands)
        results.append((*weight, *bias))
    for others in results[1:]:
        assert all(torch.equal(first, other) for first, other in zip(results[0], others, strict=True))


@settings(GEOMETRIES, max_examples=60)
@given(case=st.one_of(linear_cases(), conv_cases(transposed=False), conv_cases(transposed=True)))
def test_random_geometries_on_more_threads(case):
    operands = case.operands()
    torch.set_num_threads(1)
    expected = case.raw(*operands)
    torch.set_num_threads(3)
    for actual, reference in zip(case.raw(*operands), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, reference, strict=True))


LONG_SUMS = {
    "linear": linear((2, 20_000, 9), 7),
    "linear_one_feature": linear((2, 100_000, 1), 1),
    "linear_batch": linear((20_000, 9), 7),
    "conv1d": conv((2, 3, 20_000), 5, 5, padding=2),
    "conv2d": conv((1, 3, 160, 150), 4, 3),
    "conv2d_depthwise": conv((1, 3, 160, 150), 3, 3, padding=1, groups=3),
    "conv_transpose1d": conv((2, 3, 20_000), 4, 3, stride=2, output_padding=0),
}


@pytest.mark.parametrize("positive", [False, True], ids=["signed", "positive"])
@named("case", LONG_SUMS)
def test_long_sums(case, positive):
    """float32 sums over many positions stay within 1e-5, also when every term has the same sign."""
    input, grad_output = (t.abs() if positive else t for t in case.operands())
    expected, magnitude = case.oracle(input, grad_output), case.magnitudes(input, grad_output)
    for actual, reference, scale in zip(case.raw(input, grad_output), expected, magnitude, strict=True):
        for name, value in zip(FIELDS, actual, strict=True):
            exact, size = getattr(reference, name), getattr(scale, name)
            if name == "sum_grad_centered_squared":
                size = scale.sum_grad_squared
            error = (value.double() - exact).abs()
            assert (error <= 1e-5 * torch.maximum(exact.abs(), 0.03 * size)).all(), name


FAR_APART = {  # case, strides of its input in elements
    "samples": (linear((2, 5), 3), (2**31, 1)),
    "samples of tokens": (linear((2, 3, 5), 3), (2**31 - 20, 7, 1)),
    "tokens": (linear((2, 3, 5), 3), (7, 2**30, 1)),
    "features": (linear((4, 3), 3), (1, 2**30)),
    "images": (conv((2, 3, 4, 5), 4, 3, padding=1), (2**31 - 60, 20, 5, 1)),
    "channels": (conv((2, 3, 4, 5), 4, 3, padding=1), (20, 2**30, 5, 1)),
    "rows of depthwise images": (conv((2, 3, 3, 5), 3, 3, padding=1, groups=3), (15, 5, 2**30, 1)),
    "transposed": (conv((2, 3, 3, 2), 4, 2, output_padding=0), (18, 6, 2**30, 1)),
}


@named("case, strides", FAR_APART)
def test_offsets_beyond_32_bits(case, strides):
    """Operands spread over four gigabytes of address space, of which only their own pages are touched."""
    input, grad_output = case.operands(dtype=torch.float16)
    far = torch.empty(2**31 + 100, dtype=torch.float16).as_strided(case.input_shape, strides).copy_(input)
    for actual, expected in zip(case.raw(far, grad_output), case.raw(input, grad_output), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@named("case", CASES)
def test_small_integers_are_exact(case, dtype, isa):
    """Sums of products of small integers have no rounding in float32: every bit must be right.

    (But the centered squares divide by N, and the other squares may follow from them when both are wanted.)
    """
    operands = case.operands(dtype=dtype, integers=True)
    with cpu_option("isa", isa):
        results = case.raw(*operands, want_bits(*FIELDS[:4]), want_bits(*FIELDS[:4]))
    for actual, expected in zip(results, case.oracle(*operands), strict=True):
        for name, value, reference in zip(FIELDS[:4], actual[:4], expected[:4], strict=True):
            assert reference.numel() == 0 or reference.abs().max() < 2**24
            assert torch.equal(value, reference.to(value.dtype)), name


def touched(case: Case, input: torch.Tensor, grad_output: torch.Tensor) -> tuple[Stats, Stats]:
    """Statistics that are positive exactly where non-finite entries of the operands enter."""
    bad = [1.0 - torch.isfinite(t).float() for t in (input, grad_output)]
    by_input, _ = case.oracle(bad[0], torch.ones_like(bad[1]))
    by_grad_output, bias = case.oracle(torch.ones_like(bad[0]), bad[1])
    return Stats(*(a + b for a, b in zip(by_input, by_grad_output, strict=True))), bias


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoiled", [0, 1], ids=["input", "grad_output"])
@named("method", {"automatic": 0, **METHODS})
@named("case", {name: case for name, case in CASES.items() if case.input_shape[0] > 1})
def test_non_finite_values_propagate(case, method, spoiled, value):
    """A NaN or Inf in sample 1 reaches every entry that depends on it, no other one, and no other sample.

    Where an operand meets the zeros of a padding, 0 * Inf may be formed or skipped: the entries of that row are free.
    """
    operands = [t.contiguous() for t in case.operands()]
    with cpu_option("method", method):
        clean = case.raw(*operands)
        entry = operands[spoiled][1].numel() // 2
        operands[spoiled][1].view(-1)[entry] = value
        results = case.raw(*operands)
    reached = touched(case, *operands)
    meets_padding = case.family != "linear" and (spoiled == 1) != (case.family == "conv_transpose")
    others = [n for n in range(case.input_shape[0]) if n != 1]
    for index, (actual, undisturbed, expected) in enumerate(zip(results, clean, reached, strict=True)):
        for name, result, same, where in zip(FIELDS, actual, undisturbed, expected, strict=True):
            where = (expected.sum_grad_squared if name == "sum_grad_centered_squared" else where) > 0
            assert not result[where].isfinite().any(), f"{name} hides the value"
            free = where.clone()
            if meets_padding and index == 0:
                channel = entry // operands[spoiled][1, 0].numel()
                free[{"batch_l2": 1, "batch_grad": (1, channel)}.get(name, channel)] = True
            assert result[~free].isfinite().all(), f"{name}: the value reaches what does not depend on it"
            if name in ("batch_l2", "batch_grad"):
                assert torch.equal(result[others], same[others]), f"{name} of other samples"


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def peak_memory(request) -> dict[str, int]:
    """Bytes beyond operands and results of every large call."""
    return run_memory_probe("memory_probe.py", request.param)


@pytest.mark.parametrize("name", list(LARGE))
def test_peak_memory(name, peak_memory):
    """At most 16 MiB, and a little that the process itself needs."""
    assert peak_memory[name] <= (16 << 20) + (1 << 20)
