"""Statistics of the per-sample gradients of V columns against a float64 loop over columns and samples."""

import itertools
import math
from dataclasses import replace

import helpers
import pytest
import torch
from helpers import examples, named, run_memory_probe, some
from memory_probe import LARGE_COLUMNS
from op_cases import CASES, HALVES, LAYOUTS, TOLERANCES, Case, conv, cpu_option, kernel_dtypes, linear
from property_testing import given, settings, st
from test_ops_differentiable import SMALL
from test_ops_geometry import EMPTY, GEOMETRIES, bias_cases, conv_cases, linear_cases
from test_ops_paths import INSTRUCTION_SETS, METHODS, SUBSTANTIAL, SUPPORTED
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import backpack_cuda as bp
from backpack_cuda.ops import composite
from backpack_cuda.stats import ColumnStats, statistics_dtype

FIELDS = ("factor", "batch_diag", "diag")
EVERYTHING = 7  # want bits of the raw operators: 2**k asks for FIELDS[k]
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(FIELDS, size)]
ANY_CASE = st.one_of(linear_cases(), conv_cases(transposed=False), conv_cases(transposed=True))
ON_CPU = pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="the CPU kernels' switches")


def columns_of(case: Case, count: int, dtype=torch.float32, device="cpu", layout="contiguous") -> Tensor:
    """[V, N, ...] standard normal."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    values = torch.randn((count, *case.output_shape()), generator=generator)
    return LAYOUTS[layout](values.to(device, dtype))


def some_signs(columns: Tensor, seed: int = 0) -> Tensor:
    """[V, N] of both signs and with zeros, in the type of the statistics; not contiguous."""
    values = torch.randn(*columns.shape[:2], 2, generator=torch.Generator().manual_seed(seed))
    values[::2, ::3] = 0
    return values.to(columns.device, statistics_dtype(columns.dtype))[..., 1]


def loop(case: Case, input: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """G [V, N, *weight] and [V, N, O] of the bias: one call of autograd for each column and sample."""
    weight = torch.zeros(case.weight_shape, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(case.num_bias, dtype=torch.float64, requires_grad=True)
    results = [torch.zeros(*columns.shape[:2], *p.shape, dtype=torch.float64) for p in (weight, bias)]
    input, columns = input.detach().cpu().double(), columns.detach().cpu().double()
    for n in range(len(input)):
        output = case.function(input[n : n + 1], weight, bias)
        for v in range(len(columns)):
            gradients = torch.autograd.grad(output, (weight, bias), columns[v, n : n + 1], retain_graph=True)
            for result, gradient in zip(results, gradients, strict=True):
                result[v, n] = gradient
    return results[0], results[1]


def squares(gradients: Tensor, signs: Tensor | None) -> Tensor:
    """sum_v signs[v, n] G_vn^2, [N, *P]."""
    result = gradients.new_zeros(gradients.shape[1:])
    for v, n in itertools.product(*map(range, gradients.shape[:2])):
        result[n] += gradients[v, n] ** 2 * (1 if signs is None else signs[v, n].item())
    return result


def check(actual, gradients: Tensor, sizes: Tensor, signs: Tensor | None, dtype, fields=FIELDS, largest=1.0) -> None:
    """Every entry within its share of the rounding errors; `sizes`: the gradients of the absolute values."""
    tolerance = largest * TOLERANCES[statistics_dtype(dtype)].entry
    batch_diag, batch_sizes = squares(gradients, signs), squares(sizes, None if signs is None else signs.abs())
    expected = {"factor": gradients, "batch_diag": batch_diag, "diag": batch_diag.sum(0)}
    bounds = {"factor": tolerance * sizes, "batch_diag": tolerance * batch_sizes}
    bounds["diag"] = bounds["batch_diag"].sum(0)
    if dtype in HALVES:
        bounds["factor"] += 0.505 * torch.finfo(dtype).eps * gradients.abs() + torch.finfo(dtype).smallest_normal
    for name, value in zip(FIELDS, actual, strict=True):
        if name not in fields:
            assert value is None or value.shape == (0,), f"{name} was not asked for"
            continue
        assert value.dtype == (dtype if name == "factor" else statistics_dtype(dtype)), name
        assert value.shape == expected[name].shape and value.is_contiguous(), name
        error = (value.detach().cpu().double() - expected[name]).abs()
        worst = (error / bounds[name]).nan_to_num().max().item() if error.numel() else 0
        assert (error <= bounds[name]).all(), f"{name}: error {worst:.2f} times its bound"


def raw(case: Case, input, columns, signs=None, weight_want=EVERYTHING, bias_want=EVERYTHING) -> tuple[tuple, tuple]:
    operator = getattr(torch.ops.backpack_cuda, f"{case.family}_column_stats")
    results = operator(input, columns, signs, *case.geometry_arguments(), weight_want, bias_want)
    return results[:3], results[3:]


def public(case: Case, input, columns, signs=None, want=FIELDS) -> ColumnStats:
    call = getattr(bp.ops, f"{case.family}_column_stats")
    if case.family == "linear":
        return call(input, columns, signs, want=want)
    return call(input, columns, case.kernel_size, signs=signs, **case.options, want=want)


def through_torch(case: Case, input, columns, signs, weight_want=EVERYTHING, bias_want=EVERYTHING):
    if case.family == "linear":
        return composite.linear_columns(input, columns, signs, weight_want, bias_want)
    return composite.conv_columns(case.geometry(), input, columns, signs, weight_want, bias_want)


def bias_dim(case: Case) -> int:
    return -1 if case.family == "linear" else 2


def check_case(case: Case, count: int, signed: bool, device="cpu", layout="contiguous") -> None:
    """Weight and bias by the operator, in each of the device's types on the same values."""
    dtypes = kernel_dtypes(device)
    input, _ = case.operands(device, dtypes[0])
    columns = columns_of(case, count, dtypes[0], device, layout)
    expected, sizes = loop(case, input, columns), loop(case, input.abs(), columns.abs())
    for dtype in dtypes:
        a, b = LAYOUTS[case.input_layout](input.to(dtype)), LAYOUTS[layout](columns.to(dtype))
        signs = some_signs(b, case.seed) if signed else None
        for actual, reference, size in zip(raw(case, a, b, signs), expected, sizes, strict=True):
            check(actual, reference, size, signs, dtype)


# --- Right numbers. ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("count, signed", [(3, False), (2, True), (1, False), (1, True)])
@named("case", CASES)
def test_named_cases(case, count, signed, dtype, device):
    """By the public calls."""
    input, columns = case.operands(device, dtype)[0], columns_of(case, count, dtype, device)
    signs = some_signs(columns) if signed else None
    expected, sizes = loop(case, input, columns), loop(case, input.abs(), columns.abs())
    rounded = dtype in HALVES and (input.is_cuda or helpers.every_kernel_is_slow)  # CUDA multiplies rounded squares
    largest = 200.0 if rounded and case.family == "linear" and math.prod(case.input_shape[1:-1]) == 1 else 1.0
    check(public(case, input, columns, signs), expected[0], sizes[0], signs, dtype, largest=largest)
    bias = bp.ops.bias_column_stats(columns, signs, want=FIELDS, channel_dim=bias_dim(case))
    check(bias, expected[1], sizes[1], signs, dtype)


COLUMN_LAYOUTS = st.sampled_from(sorted(LAYOUTS))


@settings(GEOMETRIES, max_examples=examples(150))
@given(case=ANY_CASE, count=st.sampled_from((1, 2, 3, 5)), signed=st.booleans(), layout=COLUMN_LAYOUTS)
def test_random_geometries(case, count, signed, layout, device):
    check_case(case, count, signed, device, layout)


@settings(GEOMETRIES, max_examples=examples(60))
@given(case=bias_cases(), count=st.sampled_from((1, 2, 4)), signed=st.booleans())
def test_bias_geometries(case, count, signed, device):
    shape, channel_dim, layout, seed = case
    channel_dim += channel_dim >= 0  # columns come before the samples
    columns = torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed)).to(device)
    for dtype in kernel_dtypes(device):
        placed = LAYOUTS[layout](columns.to(dtype))
        signs = some_signs(placed, seed) if signed else None
        others = [d for d in range(2, placed.dim()) if d != channel_dim % placed.dim()]
        sums, sizes = (t.cpu().double().sum(others) if others else t.cpu().double() for t in (placed, placed.abs()))
        results = torch.ops.backpack_cuda.bias_column_stats(placed, signs, channel_dim, EVERYTHING)
        check(results, sums, sizes, signs, dtype)
        check(bp.ops.bias_column_stats(placed, signs, want=FIELDS, channel_dim=channel_dim), sums, sizes, signs, dtype)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
@named("case", some(CASES, "linear", "linear_tokens", "conv2d_3x3", "conv2d_depthwise", "conv_transpose2d"))
def test_every_layout(case, layout, device):
    check_case(case, 2, True, device, layout)
    check_case(replace(case, input_layout=layout), 2, False, device)


@named("case", some(CASES, "linear", "linear_tokens", "conv2d_grouped", "conv2d_depthwise", "conv_transpose2d"))
def test_every_subset(case, device):
    """What is wanted is right whatever else is wanted; what is not wanted is None, by the operators empty."""
    input, columns = case.operands(device)[0], columns_of(case, 3, device=device)
    signs = some_signs(columns)
    expected, sizes = loop(case, input, columns), loop(case, input.abs(), columns.abs())
    for want in SUBSETS:
        stats = public(case, input, columns, signs, want)
        assert type(stats) is ColumnStats
        check(stats, expected[0], sizes[0], signs, torch.float32, want)
    for weight_want in range(8):
        wants = weight_want, 7 - weight_want
        for actual, reference, size, want in zip(
            raw(case, input, columns, signs, *wants), expected, sizes, wants, strict=True
        ):
            fields = [name for k, name in enumerate(FIELDS) if want >> k & 1]
            check(actual, reference, size, signs, torch.float32, fields)


@named("case", CASES)
def test_small_integers_are_exact(case, device):
    input = case.operands(device, integers=True)[0]
    generator = torch.Generator().manual_seed(3)
    columns = torch.randint(-2, 3, (4, *case.output_shape()), generator=generator).float().to(device)
    signs = torch.tensor([1.0, -2.0, 0.0, 3.0], device=device)[:, None].expand(4, len(input))
    gradients, bias_gradients = loop(case, input, columns)
    for results, expected in zip(raw(case, input, columns, signs), (gradients, bias_gradients), strict=True):
        batch_diag = squares(expected, signs)
        for value, reference in zip(results, (expected, batch_diag, batch_diag.sum(0)), strict=True):
            assert torch.equal(value.cpu().double(), reference)


@named("case", some(CASES, "linear", "linear_tokens", "conv2d_3x3", "conv_transpose1d"))
def test_a_column_is_an_output_gradient(case, device):
    """V = 1: the statistics of first order."""
    input, grad_output = case.operands(device)
    stats = public(case, input, grad_output[None])
    first = case.public(input, grad_output, ("batch_grad", "sum_grad_squared"))
    torch.testing.assert_close(stats.factor, first.batch_grad[None])
    torch.testing.assert_close(stats.diag, first.sum_grad_squared)


@pytest.mark.parametrize("shape", ["samples", "columns"])
@named("case, samples", EMPTY)
def test_empty_operands_give_zeros(case, samples, shape, device):
    count = 0 if shape == "columns" else 3
    input, columns = case.operands(device)[0], columns_of(case, count, device=device)
    weight, bias = raw(case, input, columns, torch.ones(count, samples, device=device))
    for results, parameter in ((weight, case.weight_shape), (bias, (case.num_bias,))):
        assert [t.shape for t in results] == [(count, samples, *parameter), (samples, *parameter), parameter]
        assert not any(t.any() for t in results)
    for plain, wanted in zip(public(case, input, columns), weight, strict=True):
        assert torch.equal(plain, wanted)
    for differentiable, wanted in zip(public(case, input, columns.requires_grad_()), weight, strict=True):
        assert differentiable.shape == wanted.shape and not differentiable.any()


@named("case", some(CASES, "linear", "linear_tokens", "conv2d_3x3", "conv_transpose2d"))
def test_no_columns(case, device):
    """V = 0: an empty sum."""
    input, columns = case.operands(device)[0], columns_of(case, 0, device=device)
    stats = public(case, input, columns, torch.ones(0, len(input), device=device))
    assert stats.factor.shape == (0, len(input), *case.weight_shape)
    assert stats.batch_diag.shape == (len(input), *case.weight_shape) and not stats.batch_diag.any()
    assert stats.diag.shape == case.weight_shape and not stats.diag.any()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@named("case", some(CASES, "linear", "linear_tokens", "conv2d_3x3", "conv2d_depthwise", "conv_transpose2d"))
def test_nan_and_inf_reach_their_results(case, value, device):
    """And the results of no other sample."""
    input, columns = case.operands(device)[0], columns_of(case, 3, device=device)
    columns[1, 0].view(-1)[0] = value
    stats = public(case, input, columns)
    assert not stats.diag.isfinite().all() and not stats.batch_diag[0].isfinite().all()
    assert stats.batch_diag[1:].isfinite().all()
    assert stats.factor[0].isfinite().all() and stats.factor[:, 1:].isfinite().all()


def test_results_do_not_alias_their_operands(device):
    for case in (linear((1, 4), 1), linear((3, 1), 4), conv((1, 1, 1, 1), 3, 1), linear((1, 1, 4), 1)):
        input, columns = case.operands(device)[0], columns_of(case, 1, device=device)
        copies = input.clone(), columns.clone()
        for value in itertools.chain(*raw(case, input, columns), public(case, input, columns)):
            value.fill_(math.nan)
        assert torch.equal(input, copies[0]) and torch.equal(columns, copies[1])


# --- Torch operations: where results are differentiable, and where there is no kernel. ---


@pytest.mark.parametrize("chunk", [1 << 24, 7])
@named("case", CASES)
def test_composite(case, chunk, device, monkeypatch):
    """Chunk by chunk: of samples, and where one is too large of its columns."""
    monkeypatch.setattr(composite, "_CHUNK_ELEMENTS", chunk)
    input, columns = case.operands(device, torch.float64)[0], columns_of(case, 3, torch.float64, device)
    expected, sizes = loop(case, input, columns), loop(case, input.abs(), columns.abs())
    with torch.no_grad():
        for signs in (None, some_signs(columns)):
            for actual, reference, size in zip(
                through_torch(case, input, columns, signs), expected, sizes, strict=True
            ):
                values = [value.contiguous() for value in actual]
                check(values, reference, size, signs, torch.float64, largest=10)


class Largest(TorchDispatchMode):
    """The size in elements of the largest new tensor."""

    def __init__(self, *operands: Tensor):
        super().__init__()
        self.known, self.elements = {t.untyped_storage().data_ptr() for t in operands}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result


@named("case", {"linear": linear((6, 5, 30), 20), "conv": conv((6, 3, 7, 7), 8, 3), "linear_row": linear((6, 30), 20)})
def test_composite_forms_little_at_a_time(case, monkeypatch):
    """Without a graph: not the gradients of all columns, of all samples, or of all columns of a sample."""
    monkeypatch.setattr(composite, "_CHUNK_ELEMENTS", 1000)
    input, columns = case.operands()[0], columns_of(case, 8)
    with torch.no_grad(), Largest(input, columns) as largest:
        through_torch(case, input, columns, None, 4, 4)
    assert 0 < largest.elements <= 1000


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("field", FIELDS)
@named("case", SMALL)
def test_gradcheck(case, field, device):
    input, columns = case.operands(device, torch.float64)[0], columns_of(case, 2, torch.float64, device)

    def quantity(*operands):
        return getattr(public(case, *operands, want=field), field)

    assert torch.autograd.gradcheck(quantity, leaves(input, columns, some_signs(columns)))
    assert torch.autograd.gradcheck(quantity, leaves(input, columns))


@pytest.mark.parametrize("field", FIELDS)
def test_gradcheck_of_the_bias(field, device):
    columns = torch.randn(2, 3, 2, 2, dtype=torch.float64, device=device)
    for channel_dim in (2, 3):

        def quantity(*operands, channel_dim=channel_dim):
            return getattr(bp.ops.bias_column_stats(*operands, want=field, channel_dim=channel_dim), field)

        assert torch.autograd.gradcheck(quantity, leaves(columns, some_signs(columns)))


@named("case", some(SMALL, "linear", "conv2d_grouped", "conv_transpose1d"))
def test_second_derivatives(case, device):
    input, columns = case.operands(device, torch.float64)[0], columns_of(case, 2, torch.float64, device)
    quantity = lambda *operands: public(case, *operands, want="diag").diag  # noqa: E731
    assert torch.autograd.gradgradcheck(quantity, leaves(input, columns, some_signs(columns)))


@pytest.mark.parametrize("leaf", ["input", "columns", "signs"])
@named("case", some(CASES, "linear", "linear_tokens", "conv2d_3x3", "conv2d_depthwise", "conv_transpose2d"))
def test_differentiable_results_are_the_same_numbers(case, leaf, device):
    operands = {"input": case.operands(device)[0], "columns": columns_of(case, 3, device=device)}
    operands["signs"] = some_signs(operands["columns"])
    plain = public(case, *operands.values())
    operands[leaf] = operands[leaf].detach().requires_grad_()
    graph = public(case, *operands.values())
    for name, value, expected in zip(FIELDS, graph, plain, strict=True):
        assert value.requires_grad == (leaf != "signs" or name != "factor") and not expected.requires_grad
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not any(value.requires_grad for value in public(case, *operands.values()))


@named("case", some(CASES, "linear_tokens", "conv2d_grouped", "conv_transpose2d"))
def test_autocast_does_not_lower_the_precision(case, device):
    input, columns = case.operands(device)[0], columns_of(case, 2, device=device)
    expected, sizes = loop(case, input, columns)[0], loop(case, input.abs(), columns.abs())[0]
    for requires_grad in (False, True):
        with torch.autocast(device.type, torch.bfloat16):
            stats = public(case, input.requires_grad_(requires_grad), columns)
        check([value.contiguous() for value in stats], expected, sizes, None, torch.float32)


# --- Every way through the CPU kernels. ---


@ON_CPU
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("chunk_bytes", [0, 1, 6000])
@named("case", CASES)
def test_instruction_sets_and_chunks(case, chunk_bytes, isa):
    """Chunks of one column of one sample (1 byte), of some, and of all."""
    with cpu_option("isa", isa), cpu_option("chunk_bytes", chunk_bytes):
        check_case(case, 3, True)


@ON_CPU
@settings(GEOMETRIES, max_examples=150)
@given(
    case=ANY_CASE,
    count=st.sampled_from((1, 2, 5)),
    signed=st.booleans(),
    layout=COLUMN_LAYOUTS,
    chunk_bytes=st.sampled_from((0, 1, 500, 5_000, 20_000)),
    method=st.sampled_from((0, *METHODS.values())),
    isa=st.sampled_from(SUPPORTED),
)
def test_every_way_on_the_cpu(case, count, signed, layout, chunk_bytes, method, isa):
    with cpu_option("chunk_bytes", chunk_bytes), cpu_option("method", method), cpu_option("isa", isa):
        check_case(case, count, signed, layout=layout)


@ON_CPU
@named("want", {"all": EVERYTHING, "diag": 4, "batch_diag": 2})
@named("case", SUBSTANTIAL)
def test_thread_counts_agree_to_the_bit(case, want):
    input, columns = case.operands()[0], columns_of(case, 4)
    signs = some_signs(columns)
    results = []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(tuple(itertools.chain(*raw(case, input, columns, signs, want, want))))
    for others in results[1:]:
        assert all(torch.equal(first, other) for first, other in zip(results[0], others, strict=True))


@ON_CPU
@named("case", {"linear": linear((2, 20_000, 9), 7), "conv1d": conv((2, 3, 30_000), 4, 5)})
def test_long_sums(case):
    """In slabs of positions, of equal terms: a running float32 sum would be off by more than 1e-4."""
    input, columns = torch.full(case.input_shape, 0.1), torch.full((2, *case.output_shape()), 0.1)
    positions = math.prod(columns.shape[2:]) // case.num_bias
    expected = 2 * 2 * (positions * float(input.view(-1)[0]) * float(columns.view(-1)[0])) ** 2
    assert (raw(case, input, columns)[0][2] / expected - 1).abs().max() < 1e-5


@ON_CPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(dtype):
    """At most 16 MiB beyond operands and results, and a little that the process itself needs."""
    extra = run_memory_probe("memory_probe.py", dtype, "columns")
    assert set(extra) == set(LARGE_COLUMNS)
    assert not {name: taken for name, taken in extra.items() if taken > (16 << 20) + (1 << 20)}


# --- Errors. ---


def call_linear(input, columns, **other):
    return bp.ops.linear_column_stats(input, columns, **other)


def call_conv(input, columns, **other):
    return bp.ops.conv_column_stats(input, columns, **{"kernel_size": 3, "padding": 1, **other})


def call_conv_transpose(input, columns, **other):
    return bp.ops.conv_transpose_column_stats(input, columns, **{"kernel_size": 3, "padding": 1, **other})


def call_bias(_, columns, **other):
    return bp.ops.bias_column_stats(columns, **other)


SHAPES = {  # call, shape of input, shape of columns, further arguments, argument that the message must name
    "linear input of rank 1": (call_linear, (4,), (2, 4), {}, "input"),
    "linear without columns": (call_linear, (3, 4), (3, 5), {}, "columns"),
    "linear unequal N": (call_linear, (3, 4), (2, 2, 5), {}, "columns"),
    "linear V and N swapped": (call_linear, (3, 4), (3, 2, 5), {}, "columns"),
    "linear unequal T": (call_linear, (3, 2, 4), (2, 3, 3, 5), {}, "columns"),
    "conv unbatched": (call_conv, (3, 8), (2, 5, 8), {}, "input"),
    "conv without columns": (call_conv, (2, 3, 8), (2, 5, 8), {}, "columns"),
    "conv unequal N": (call_conv, (2, 3, 8), (4, 3, 5, 8), {}, "columns"),
    "conv size": (call_conv, (2, 3, 8), (4, 2, 5, 7), {}, "columns"),
    "conv groups": (call_conv, (2, 4, 8), (4, 2, 3, 8), {"groups": 2}, "groups"),
    "conv stride": (call_conv, (2, 4, 8), (4, 2, 3, 8), {"stride": 0}, "stride"),
    "transpose size": (call_conv_transpose, (2, 3, 8), (4, 2, 5, 9), {}, "columns"),
    "transpose output_padding": (
        call_conv_transpose,
        (2, 3, 8),
        (4, 2, 5, 17),
        {"stride": 2, "output_padding": 2},
        "output_padding",
    ),
    "bias rank": (call_bias, (), (3, 4), {}, "columns"),
    "bias channel_dim 0": (call_bias, (), (2, 3, 4), {"channel_dim": 0}, "channel_dim"),
    "bias channel_dim 1": (call_bias, (), (2, 3, 4), {"channel_dim": 1}, "channel_dim"),
    "bias channel_dim -2": (call_bias, (), (2, 3, 4), {"channel_dim": -2}, "channel_dim"),
    "bias channel_dim 3": (call_bias, (), (2, 3, 4), {"channel_dim": 3}, "channel_dim"),
}
CALLS = {
    "linear": (call_linear, (3, 4), (2, 3, 5)),
    "conv": (call_conv, (3, 4, 8), (2, 3, 5, 8)),
    "conv_transpose": (call_conv_transpose, (3, 4, 8), (2, 3, 5, 8)),
    "bias": (call_bias, (), (2, 3, 5)),
}


@named("call, input, columns, other, argument", SHAPES)
def test_shapes(call, input, columns, other, argument, device):
    with pytest.raises(ValueError, match=rf"^{argument}: expected") as caught:
        call(torch.ones(input, device=device), torch.ones(columns, device=device), **other)
    assert argument not in ("input", "columns") or str(list(columns)) in str(caught.value)


@named("call, input, columns", CALLS)
def test_arguments(call, input, columns, device):
    a, b = torch.ones(input, device=device), torch.ones(columns, device=device)
    signs = torch.ones(2, 3, device=device)
    wrong = [
        (ValueError, "want", {"want": ("diag", "grad")}),
        (ValueError, "want", {"want": ()}),
        (TypeError, "want", {"want": 4}),
        (TypeError, "signs", {"signs": [[1.0]]}),
        (TypeError, "signs", {"signs": signs.double()}),
        (TypeError, "signs", {"signs": signs.long()}),
        (ValueError, "signs", {"signs": signs.T}),
        (ValueError, "signs", {"signs": signs[0]}),
        (ValueError, "signs", {"signs": signs.to("meta")}),
        (NotImplementedError, "signs", {"signs": signs.to_sparse()}),
    ]
    for error, argument, options in wrong:
        with pytest.raises(error, match=rf"^{argument}: expected"):
            call(a, b, **options)
    with pytest.raises(TypeError, match=r"^(input|columns): expected float32"):
        call(a.long(), b.long())
    with pytest.raises(TypeError, match=r"^columns: expected a Tensor"):
        call(a, None)
    with pytest.raises(TypeError, match=r"^signs: expected torch.float32"):
        call(a.bfloat16(), b.bfloat16(), signs=signs.bfloat16())
    if call is not call_bias:
        with pytest.raises(TypeError, match=r"^columns: expected the dtype of input"):
            call(a, b.double())
        with pytest.raises(ValueError, match=r"^columns: expected the device of input"):
            call(a, b.to("meta"))


ONES = torch.ones
RAW = {
    "linear rank": ("linear_column_stats", (ONES(3, 4), ONES(3, 5), None, 7, 7)),
    "linear unequal N": ("linear_column_stats", (ONES(3, 4), ONES(3, 2, 5), None, 7, 7)),
    "linear unequal N without columns": ("linear_column_stats", (ONES(3, 4), ONES(0, 2, 5), None, 7, 7)),
    "linear unknown want": ("linear_column_stats", (ONES(3, 4), ONES(2, 3, 5), None, 8, 0)),
    "linear mixed types": ("linear_column_stats", (ONES(3, 4), ONES(2, 3, 5).double(), None, 7, 7)),
    "linear integers": ("linear_column_stats", (ONES(3, 4).long(), ONES(2, 3, 5).long(), None, 7, 7)),
    "linear signs": ("linear_column_stats", (ONES(3, 4), ONES(2, 3, 5), ONES(3, 2), 7, 7)),
    "linear signs of another type": ("linear_column_stats", (ONES(3, 4), ONES(2, 3, 5), ONES(2, 3).double(), 7, 7)),
    "conv size": ("conv_column_stats", (ONES(3, 4, 8), ONES(2, 3, 5, 8), None, [3], [1], [0], [1], 1, 7, 7)),
    "conv rank": ("conv_column_stats", (ONES(3, 4, 8), ONES(3, 5, 6), None, [3], [1], [0], [1], 1, 7, 7)),
    "conv signs": ("conv_column_stats", (ONES(3, 4, 8), ONES(2, 3, 5, 6), ONES(6), [3], [1], [0], [1], 1, 7, 7)),
    "transpose size": (
        "conv_transpose_column_stats",
        (ONES(3, 4, 8), ONES(2, 3, 5, 9), None, [3], [1], [0], [0], [1], 1, 7, 7),
    ),
    "bias rank": ("bias_column_stats", (ONES(3, 4), None, 1, 7)),
    "bias channel_dim 1": ("bias_column_stats", (ONES(2, 3, 4), None, 1, 7)),
    "bias channel_dim -2": ("bias_column_stats", (ONES(2, 3, 4), None, -2, 7)),
    "bias want": ("bias_column_stats", (ONES(2, 3, 4), None, 2, 9)),
}


@named("operator, arguments", RAW)
def test_the_operators_check_again(operator, arguments, device):
    arguments = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError):
        getattr(torch.ops.backpack_cuda, operator)(*arguments)
