"""Kronecker factors of layers' inputs: operators and Python calls against a slow float64 loop over positions."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close, examples, named, run_memory_probe, some
from kron_memory_probe import LARGE
from op_cases import HALVES, LAYOUTS, cpu_option, kernel_dtypes
from property_testing import HealthCheck, given, settings, st

import backpack_cuda as bp
from backpack_cuda.stats import statistics_dtype

GEOMETRIES = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def outer_products(rows: torch.Tensor, homogeneous: bool = False) -> torch.Tensor:
    """[groups, D', D'] from rows [groups, R, D] in float64."""
    if homogeneous:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
    return torch.einsum("gra,grb->gab", rows, rows)


def patch_rows(x, kernel, stride, padding, dilation, positions, groups) -> torch.Tensor:
    """Rows [groups, N * T, D] of an explicit unfolding of x [N, C, *], entry by entry, in float64."""
    n, channels = x.shape[:2]
    places, taps = (list(itertools.product(*map(range, sizes))) for sizes in (positions, kernel))
    rows = torch.zeros(n, len(places), channels, len(taps), dtype=torch.float64)
    image = x.detach().cpu().double()
    for t, o in enumerate(places):
        for j, k in enumerate(taps):
            at = [o[d] * stride[d] + k[d] * dilation[d] - padding[d] for d in range(len(kernel))]
            if all(0 <= at[d] < image.shape[2 + d] for d in range(len(kernel))):
                rows[:, t, :, j] = image[(slice(None), slice(None), *at)]
    width = channels // groups * len(taps)
    return rows.reshape(n, len(places), groups, width).permute(2, 0, 1, 3).reshape(groups, n * len(places), width)


def scattered_rows(x, kernel, stride, padding, dilation, output_padding) -> torch.Tensor:
    """Rows [1, N * T, D] of a transposed convolution's output positions: every pixel is written where it goes."""
    n, channels, dims = *x.shape[:2], len(kernel)
    image = x.detach().cpu().double()
    sizes = [
        (image.shape[2 + d] - 1) * stride[d] - 2 * padding[d] + dilation[d] * (kernel[d] - 1) + 1 + output_padding[d]
        for d in range(dims)
    ]
    rows = torch.zeros(n, *sizes, channels, *kernel, dtype=torch.float64)
    for pixel in itertools.product(*map(range, image.shape[2:])):
        for k in itertools.product(*map(range, kernel)):
            to = [pixel[d] * stride[d] + k[d] * dilation[d] - padding[d] for d in range(dims)]
            if all(0 <= to[d] < sizes[d] for d in range(dims)):
                rows[(slice(None), *to, slice(None), *k)] = image[(slice(None), slice(None), *pixel)]
    return rows.reshape(1, n * math.prod(sizes), channels * math.prod(kernel))


@dataclass(frozen=True)
class Conv:
    """One call of the operator `conv_kron_factor`."""

    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    positions: tuple[int, ...]
    groups: int = 1
    homogeneous: bool = False
    layout: str = "contiguous"
    seed: int = 0

    @property
    def size(self) -> int:
        return self.shape[1] // self.groups * math.prod(self.kernel) + self.homogeneous

    def integers(self, device, dtype=torch.float32) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randint(-3, 4, self.shape, generator=generator).to(dtype)
        return LAYOUTS[self.layout](x.to(device))

    def raw(self, x, out=None, scale=1.0, decay=0.0) -> torch.Tensor:
        if out is None:  # what is not read may be anything
            shape = (self.groups, self.size, self.size)
            out = torch.full(shape, math.nan, dtype=statistics_dtype(x.dtype), device=x.device)
        sizes = (self.kernel, self.stride, self.padding, self.dilation, self.positions, self.groups)
        torch.ops.backpack_cuda.conv_kron_factor(out, x, *sizes, scale, decay, self.homogeneous)
        return out

    def oracle(self, x) -> torch.Tensor:
        sizes = (self.kernel, self.stride, self.padding, self.dilation, self.positions, self.groups)
        return outer_products(patch_rows(x, *sizes), self.homogeneous)


def layer(shape, kernel, stride=1, padding=0, dilation=1, groups=1, **other) -> Conv:
    """The call for a convolution layer, with the positions of its output."""
    dims = len(shape) - 2
    kernel, stride, padding, dilation = (
        (value,) * dims if isinstance(value, int) else tuple(value) for value in (kernel, stride, padding, dilation)
    )
    positions = tuple(
        (shape[2 + d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(dims)
    )
    return Conv(tuple(shape), kernel, stride, padding, dilation, positions, groups, **other)


def assert_exact(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Small integers: to the last bit, in particular symmetric."""
    assert actual.shape == expected.shape
    assert expected.numel() == 0 or expected.abs().max() < 2**24
    assert torch.equal(actual.cpu().double(), expected)


# --- Exact values. ---

ROWS = {
    "matrix": (5, 13),
    "one row": (1, 70),
    "vector": (9,),
    "one feature": (6, 1),
    "tokens": (3, 37, 20),
    "grid": (2, 3, 2, 4, 10),
    "wide": (33, 300),
    "long": (700, 17),
    "long and wide": (300, 130),
}


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "guarded", "strided", "reversed_dims", "batch_inside"])
@named("shape", ROWS)
def test_rows(shape, layout, homogeneous, device):
    values = torch.randint(-3, 4, shape)
    expected = outer_products(values.double().reshape(1, -1, shape[-1]), homogeneous)[0]
    for dtype in (*kernel_dtypes(device), *HALVES):
        x = LAYOUTS[layout](values.to(device, dtype))
        factor = bp.ops.linear_kron_factor(x, homogeneous=homogeneous)
        assert factor.dtype == statistics_dtype(dtype) and factor.is_contiguous()
        assert_exact(factor, expected)


@pytest.mark.parametrize("groups", ["one", "all"])
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (4, 5), (5, 1)], ids=str)
def test_grid(kernel, groups, device):
    """The grid of kfac-jax's tests of patches' second moments, and dilations and groups."""
    grid = itertools.product((1, 3), ((8, 8), (6, 9)), ((1, 1), (2, 2), (1, 3)), ((0, 0), (1, 1), (3, 2)), (1, 2))
    for channels, size, stride, padding, dilation in grid:
        case = layer((2, channels, *size), kernel, stride, padding, dilation, channels if groups == "all" else 1)
        if min(case.positions) > 0:
            x = case.integers(device)
            assert_exact(case.raw(x), case.oracle(x))


NAMED = {
    "3x3": layer((2, 33, 6, 7), 3, padding=1),
    "3x3 homogeneous": layer((2, 17, 6, 7), 3, padding=1, homogeneous=True),
    "3x3 stride 2": layer((2, 19, 9, 8), 3, stride=2, padding=1),
    "3x3 dilated": layer((3, 18, 9, 8), 3, dilation=2),
    "5x5 of few channels": layer((3, 3, 9, 10), 5, padding=2),
    "1x1": layer((3, 40, 5, 4), 1),
    "1x1 stride 3": layer((3, 20, 7, 8), 1, stride=3),
    "stride above kernel": layer((2, 9, 11, 12), 2, stride=5),
    "uneven": layer((2, 3, 9, 12), (2, 5), stride=(2, 1), padding=(0, 3), dilation=(3, 1)),
    "one output": layer((4, 17, 3, 3), 3),
    "one sample": layer((1, 6, 8, 8), 3, padding=1),
    "grouped": layer((3, 40, 6, 5), 3, padding=1, groups=2),
    "grouped homogeneous": layer((2, 6, 5, 5), 3, stride=2, padding=1, groups=3, homogeneous=True),
    "depthwise": layer((3, 21, 6, 7), 3, padding=1, groups=21),
    "depthwise homogeneous": layer((2, 18, 5, 6), 3, groups=18, homogeneous=True),
    "channels last": layer((2, 35, 6, 7), 3, padding=1, layout="channels_last"),
    "strided memory": layer((2, 5, 6, 7), 3, padding=1, layout="strided"),
    "expanded samples": layer((3, 5, 6, 7), 3, layout="expanded_samples"),
    "1d": layer((3, 7, 40), 9, padding=4),
    "1d strided": layer((2, 20, 41), 4, stride=2),
    "1d wide kernel": layer((1, 1, 600), 300, stride=100),
    "3d": layer((2, 5, 4, 5, 6), (2, 3, 1), stride=(1, 2, 1), padding=1),
    "3d 3x3x3": layer((1, 17, 4, 4, 5), 3, padding=1),
    "3d depthwise": layer((2, 4, 4, 3, 4), 2, groups=4),
    "padding above the image": layer((2, 3, 3, 4), 3, padding=4),
    "cropped": Conv((2, 4, 8, 9), (3, 2), (1, 2), (-2, -1), (1, 1), (4, 3)),
    "outside of the image": Conv((2, 4, 3, 3), (2, 2), (1, 1), (-5, 0), (1, 1), (2, 2), homogeneous=True),
    "positions beyond the image": Conv((2, 4, 3, 3), (2, 2), (2, 2), (1, 1), (1, 1), (7, 6)),
}
DENSE, GROUPED = ("lag 3", "lag 2", "lag 1", "patches"), ("groups 3", "groups 2", "groups 1", "groups of patches")
WAYS = {"automatic": 0, **{name: 1 + k for k, name in enumerate(DENSE + GROUPED)}}  # of the option "kron"


@named("case", NAMED)
def test_geometries(case, device):
    for dtype in (*kernel_dtypes(device), *HALVES):
        x = case.integers(device, dtype)
        factor = case.raw(x)
        assert factor.dtype == statistics_dtype(dtype)
        assert_exact(factor, case.oracle(x))


@pytest.mark.parametrize("isa", [512, 256, 128])
@named("way", WAYS)
@named("case", NAMED)
def test_every_way_on_the_cpu(case, way, isa):
    x = case.integers("cpu")
    expected = case.oracle(x)
    with cpu_option("kron", way), cpu_option("isa", isa):
        for chunk_bytes in (0, 1, 3000):
            with cpu_option("chunk_bytes", chunk_bytes):
                assert_exact(case.raw(x), expected)


@st.composite
def calls(draw) -> Conv:
    dims = draw(st.sampled_from((1, 2, 2, 3)))
    small = (1, 4 if dims == 3 else 7)

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.sampled_from((1, 1, 2, 3, 18)))
    channels = draw(st.sampled_from((1, 2, 3) if groups > 3 or dims == 3 else (1, 2, 3, 7, 17, 33)))
    kernel = sizes(1, 2 if dims == 3 else 3)
    return Conv(
        (draw(st.integers(0, 4)), channels * groups, *sizes(0, small[1] + 2)),
        kernel,
        sizes(1, 4),
        sizes(-3, 4),
        sizes(1, 3),
        sizes(0, small[1]),
        groups,
        draw(st.booleans()),
        draw(st.sampled_from(("contiguous", "guarded", "strided", "channels_last", "reversed_dims"))),
        draw(st.integers(0, 99)),
    )


@settings(GEOMETRIES, max_examples=examples(400))
@given(case=calls(), scale=st.sampled_from((1.0, -2.0)), decay=st.sampled_from((0.0, 3.0)))
def test_random_geometries(case, scale, decay, device):
    x = case.integers(device)
    before = torch.randint(-3, 4, (case.groups, case.size, case.size)).float()
    before = (before + before.mT).to(device)
    expected = scale * case.oracle(x) + decay * before.cpu().double()
    assert_exact(case.raw(x, before.clone(), scale, decay), expected)


@pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="the CPU kernels' switches")
@settings(GEOMETRIES, max_examples=400)
@given(
    case=calls(),
    way=st.integers(0, 8),
    chunk_bytes=st.sampled_from((0, 1, 500, 20_000)),
    isa=st.sampled_from((512, 256, 128)),
    dtype=st.sampled_from((torch.float32, torch.float64, *HALVES)),
)
def test_random_geometries_in_every_way(case, way, chunk_bytes, isa, dtype):
    x = case.integers("cpu", dtype)
    with cpu_option("kron", way), cpu_option("chunk_bytes", chunk_bytes), cpu_option("isa", isa):
        assert_exact(case.raw(x), case.oracle(x))


@named("case", {name: case for name, case in NAMED.items() if len(case.kernel) == 2 and min(case.padding) >= 0})
def test_unfold_and_matmul(case, device):
    """The same bits as torch's own unfolding, where that has the same positions."""
    if case.positions != layer(case.shape, case.kernel, case.stride, case.padding, case.dilation).positions:
        return
    x = case.integers(device)
    options = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    columns = F.unfold(x.cpu().double(), case.kernel, **options)  # [N, groups * D, T]
    rows = columns.unflatten(1, (case.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    expected = outer_products(rows, case.homogeneous)
    actual = bp.ops.conv_kron_factor(x, case.kernel, **options, groups=case.groups, homogeneous=case.homogeneous)
    assert_exact(actual, expected if case.groups > 1 else expected[0])


# --- Rounding. ---


@named("case", some(NAMED, "3x3", "3x3 stride 2", "5x5 of few channels", "depthwise", "3d", "1d"))
def test_errors_of_real_numbers(case, device):
    """Every entry within a few roundings of the sum of its products' sizes; symmetric to the last bit."""
    values = torch.randn(case.shape, device=device)
    for dtype in (*kernel_dtypes(device), *HALVES):
        x = values.to(dtype)
        actual, expected = case.raw(x), case.oracle(x)
        assert torch.equal(actual, actual.mT)
        bound = (1e-13 if dtype == torch.float64 else 2e-6) * case.oracle(x.abs())
        assert ((actual.cpu().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("positive", [False, True], ids=["signed", "positive"])
@pytest.mark.parametrize("shape", [(40_000, 9), (3, 4000, 40)], ids=str)
def test_long_sums(shape, positive):
    """float32 sums over many rows, also when every term has the same sign."""
    x = torch.randn(shape)
    x = x.abs() if positive else x
    rows = x.double().reshape(1, -1, shape[-1])
    error = (bp.ops.linear_kron_factor(x).double() - outer_products(rows)[0]).abs()
    assert (error <= 1e-6 * outer_products(rows.abs())[0]).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_types_are_summed_in_float32(dtype, device):
    """Sums that have more digits than the type, and lie above float16's range."""
    x = torch.full((700, 5), 17.0, dtype=dtype, device=device)
    assert_exact(bp.ops.linear_kron_factor(x), torch.full((5, 5), 700 * 289.0, dtype=torch.float64))
    image = torch.full((3, 2, 30, 30), 17.0, dtype=dtype, device=device)
    expected = torch.full((18, 18), 3 * 28 * 28 * 289.0, dtype=torch.float64)
    assert_exact(bp.ops.conv_kron_factor(image, 3), expected)


@named("case", some(NAMED, "3x3", "5x5 of few channels", "depthwise"))
def test_thread_counts_and_repetitions_agree_to_the_bit(case):
    x, rows = torch.randn(case.shape), torch.randn(400, 90)
    expected = case.raw(x), bp.ops.linear_kron_factor(rows), bp.ops.linear_kron_factor(rows[:, :3])
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        actual = case.raw(x), bp.ops.linear_kron_factor(rows), bp.ops.linear_kron_factor(rows[:, :3])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_propagate(value, device):
    x = torch.randn(6, 20, device=device)
    x[2, 3] = value
    bad = ~bp.ops.linear_kron_factor(x).isfinite()
    assert bad[3].all() and bad[:, 3].all() and bad.sum() == 39
    image = torch.randn(2, 4, 5, 5, device=device)
    image[1, 2, 2, 2] = value
    bad = ~bp.ops.conv_kron_factor(image, 3).isfinite()
    assert bad[18:27].all() and bad[:, 18:27].all() and bad.sum() == 36**2 - 27**2


# --- out, scale, decay. ---

CALLS = {
    "linear": (lambda x, **other: bp.ops.linear_kron_factor(x, **other), (6, 5)),
    "conv": (lambda x, **other: bp.ops.conv_kron_factor(x, 2, **other), (3, 2, 4, 5)),
    "conv grouped": (lambda x, **other: bp.ops.conv_kron_factor(x, 2, groups=2, **other), (3, 4, 4, 5)),
    "transposed": (lambda x, **other: bp.ops.conv_transpose_kron_factor(x, 2, stride=2, **other), (3, 2, 4, 5)),
}


@pytest.mark.parametrize("homogeneous", [False, True])
@named("call, shape", CALLS)
def test_running_average(call, shape, homogeneous, device):
    x = torch.randint(-3, 4, shape, device=device).float()
    factor = call(x, homogeneous=homogeneous)
    assert torch.equal(call(x, scale=0.5, homogeneous=homogeneous), factor / 2)
    assert torch.equal(call(x, scale=-1, homogeneous=homogeneous), -factor)
    out = torch.full_like(factor, math.nan)
    version = out._version
    assert call(x, out=out, homogeneous=homogeneous) is out
    assert torch.equal(out, factor) and out._version > version
    assert call(x, scale=0.5, out=out, decay=0.25, homogeneous=homogeneous) is out
    assert torch.equal(out, 0.75 * factor)
    call(x, scale=0.0, out=out, decay=2.0, homogeneous=homogeneous)
    assert torch.equal(out, 1.5 * factor)


@named("call, shape", CALLS)
def test_out_of_any_layout(call, shape, device):
    x = torch.randint(-3, 4, shape, device=device).float()
    factor = call(x)
    for layout in ("guarded", "strided", "reversed_dims"):
        out = LAYOUTS[layout](torch.ones_like(factor))
        assert call(x, out=out, decay=2.0) is out
        assert torch.equal(out, factor + 2)


@named("call, shape", CALLS)
def test_the_upper_triangle_of_out_counts(call, shape, device):
    x = torch.randint(-3, 4, shape, device=device).float()
    factor = call(x)
    out = torch.ones_like(factor).triu() + torch.full_like(factor, 7).tril(-1)
    assert torch.equal(call(x, out=out, decay=1.0), factor + 1)


@named("call, shape", CALLS)
def test_out_of_the_composite(call, shape, device):
    """Under a transform the composite runs, and has the same meaning of out."""
    x = torch.randint(-3, 4, shape, device=device).float()
    out = call(x, scale=3.0, out=torch.ones_like(call(x)), decay=2.0)
    results = torch.vmap(lambda x: call(x, scale=3.0, out=None) + 2)(x[None])
    assert torch.equal(out, results[0])


# --- Operands without elements. ---


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (4, 0), (0, 0)], ids=str)
def test_empty_rows(shape, homogeneous, device):
    expected = outer_products(torch.zeros(1, math.prod(shape[:-1]), shape[-1], dtype=torch.float64), homogeneous)[0]
    x = torch.zeros(shape, device=device)
    assert_exact(bp.ops.linear_kron_factor(x, homogeneous=homogeneous), expected)
    out = torch.ones_like(expected, dtype=torch.float32, device=device)
    assert_exact(bp.ops.linear_kron_factor(x, 2.0, out, 3.0, homogeneous=homogeneous), 2 * expected + 3)


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 1, 5), (2, 2, 2, 0)], ids=str)
def test_empty_images(shape, homogeneous, device):
    padding = 1 if shape[-1] == 0 else 0
    case = layer(shape, 2 if min(shape[2:]) > 1 else (2, 1), padding=padding, homogeneous=homogeneous)
    x = torch.ones(shape, device=device)
    out = torch.ones(1, case.size, case.size, device=device)
    assert_exact(case.raw(x, out, 2.0, 3.0), 2 * case.oracle(x) + 3)
    assert_exact(case.raw(x), case.oracle(x))


# --- Transposed convolutions. ---

TRANSPOSED = {  # shape, kernel, stride, padding, dilation, output padding
    "1d": ((3, 4, 7), (3,), (2,), (1,), (1,), (0,)),
    "1d output padding": ((3, 4, 7), (3,), (2,), (1,), (1,), (1,)),
    "2d": ((2, 3, 4, 6), (3, 3), (1, 1), (1, 1), (1, 1), (0, 0)),
    "2d stride": ((2, 3, 4, 3), (2, 3), (1, 3), (0, 0), (2, 1), (0, 0)),
    "2d uneven": ((2, 3, 4, 3), (2, 3), (2, 2), (0, 2), (2, 1), (1, 1)),
    "2d cropped": ((2, 3, 4, 4), (2, 2), (2, 2), (3, 3), (1, 1), (1, 1)),
    "2d stride above kernel": ((2, 3, 3, 3), (2, 1), (3, 4), (0, 0), (1, 1), (0, 0)),
    "3d": ((2, 2, 3, 2, 3), (2, 2, 2), (2, 2, 2), (0, 0, 0), (2, 2, 2), (1, 0, 1)),
    "without output": ((2, 3, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1), (0, 0)),
}


@named("shape, kernel, stride, padding, dilation, output_padding", TRANSPOSED)
def test_transposed(shape, kernel, stride, padding, dilation, output_padding, device):
    x = torch.randint(-3, 4, shape, device=device).float()
    options = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
    expected = outer_products(scattered_rows(x, kernel, stride, padding, dilation, output_padding))[0]
    assert_exact(bp.ops.conv_transpose_kron_factor(x, kernel, **options), expected)
    grouped = bp.ops.conv_transpose_kron_factor(x.repeat(1, 2, *[1] * len(kernel)), kernel, **options, groups=2)
    assert_exact(grouped, torch.stack([expected, expected]))


@named("shape, kernel, stride, padding, dilation, output_padding", TRANSPOSED)
def test_transposed_against_backpack(shape, kernel, stride, padding, dilation, output_padding):
    """BackPACK leaves out the positions of the output padding; without one the factors are the same."""
    unfold = pytest.importorskip("backpack.utils.conv_transpose").unfold_by_conv_transpose
    kind = getattr(torch.nn, f"ConvTranspose{len(kernel)}d")
    module = kind(shape[1], 2, kernel, stride, padding, dilation=dilation)
    x = torch.randint(-3, 4, shape).float()
    columns = unfold(x, module)
    expected = torch.einsum("nat,nbt->ab", columns, columns).double()
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    assert_exact(bp.ops.conv_transpose_kron_factor(x, kernel, **options), expected)


# --- Derivatives. ---

DIFFERENTIABLE = {
    "linear": (lambda x: bp.ops.linear_kron_factor(x, 0.5), (3, 4)),
    "linear tokens": (lambda x: bp.ops.linear_kron_factor(x, homogeneous=True), (2, 3, 2)),
    "conv": (lambda x: bp.ops.conv_kron_factor(x, 2, padding=1, stride=2, scale=0.5), (2, 2, 3, 3)),
    "conv grouped": (lambda x: bp.ops.conv_kron_factor(x, 2, groups=2, homogeneous=True), (2, 2, 4)),
    "transposed": (lambda x: bp.ops.conv_transpose_kron_factor(x, 2, stride=2, output_padding=1), (2, 2, 2, 2)),
}


@named("call, shape", DIFFERENTIABLE)
def test_derivatives(call, shape, device):
    x = torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))
    factor = call(x)
    assert factor.requires_grad and torch.equal(factor, factor.mT)


@named("call, shape", DIFFERENTIABLE)
def test_differentiable_results_are_the_same_numbers(call, shape, device):
    x = torch.randint(-3, 4, shape, device=device).float()
    assert torch.equal(call(x.clone().requires_grad_()), call(x))
    with torch.no_grad():
        assert not call(x.clone().requires_grad_()).requires_grad


@named("call, shape", DIFFERENTIABLE)
def test_vmap(call, shape, device):
    x = torch.randint(-3, 4, (3, *shape), device=device).float()
    assert torch.equal(torch.vmap(call)(x), torch.stack([call(sample) for sample in x]))


@named("call, shape", DIFFERENTIABLE)
def test_autocast_does_not_lower_the_precision(call, shape, device):
    x = torch.randn(shape, device=device)
    for requires_grad in (False, True):
        with torch.autocast(device.type, torch.bfloat16):
            factor = call(x.clone().requires_grad_(requires_grad))
        assert factor.dtype == torch.float32
        assert_close("factor", factor, call(x).cpu().double(), 1e-6)


def test_composite_in_chunks(device, monkeypatch):
    from backpack_cuda.ops import composite

    case = NAMED["grouped"]
    monkeypatch.setattr(composite, "_CHUNK_ELEMENTS", 1)
    x = case.integers(device)
    geometry = bp.ops.geometry.ConvGeometry(case.kernel, case.stride, case.padding, case.dilation, case.groups)
    assert_exact(composite.conv_kron_factor(x, geometry, case.positions), case.oracle(x))


# --- Memory. ---


@pytest.fixture(scope="module")
def peak_memory() -> dict[str, int]:
    """Bytes beyond operand and result of every large call."""
    return run_memory_probe("kron_memory_probe.py")


@pytest.mark.parametrize("name", list(LARGE))
def test_peak_memory(name, peak_memory):
    """At most 16 MiB, and a little that the process itself needs: never the unfolded matrix."""
    assert peak_memory[name] <= (16 << 20) + (1 << 20)


def test_offsets_beyond_32_bits():
    """Operands spread over four gigabytes of address space, of which only their own pages are touched."""
    rows, image = torch.randint(-3, 4, (4, 3)).half(), torch.randint(-3, 4, (2, 3, 4, 5)).half()
    memory = torch.empty(2**31 + 100, dtype=torch.float16)
    for strides in ((2**29, 1), (1, 2**30)):
        far = memory.as_strided(rows.shape, strides).copy_(rows)
        assert torch.equal(bp.ops.linear_kron_factor(far), bp.ops.linear_kron_factor(rows))
    for strides in ((2**31 - 60, 20, 5, 1), (20, 2**30, 5, 1)):
        far = memory.as_strided(image.shape, strides).copy_(image)
        assert torch.equal(bp.ops.conv_kron_factor(far, 3), bp.ops.conv_kron_factor(image, 3))


# --- Errors. ---

ROWS_OF_5, IMAGE = torch.ones(6, 5), torch.ones(3, 4, 6, 6)
WRONG = {  # call, error, what its message says
    "a list": (lambda: bp.ops.linear_kron_factor([1.0]), TypeError, "x: expected a Tensor, got list"),
    "integers": (lambda: bp.ops.linear_kron_factor(ROWS_OF_5.long()), TypeError, "x: .*torch.int64"),
    "sparse": (lambda: bp.ops.linear_kron_factor(ROWS_OF_5.to_sparse()), NotImplementedError, "x: .*sparse"),
    "a scalar": (lambda: bp.ops.linear_kron_factor(torch.tensor(1.0)), ValueError, r"x: .*\[\*, D\], got \[\]"),
    "scale a tensor": (lambda: bp.ops.linear_kron_factor(ROWS_OF_5, torch.tensor(1.0)), TypeError, "scale: .*tensor"),
    "scale a bool": (lambda: bp.ops.linear_kron_factor(ROWS_OF_5, True), TypeError, "scale: .*True"),
    "scale NaN": (lambda: bp.ops.linear_kron_factor(ROWS_OF_5, math.nan), ValueError, "scale: .*nan"),
    "decay infinite": (
        lambda: bp.ops.linear_kron_factor(ROWS_OF_5, 1.0, torch.ones(5, 5), math.inf),
        ValueError,
        "decay: .*inf",
    ),
    "decay complex": (
        lambda: bp.ops.linear_kron_factor(ROWS_OF_5, 1.0, torch.ones(5, 5), 1j),
        TypeError,
        "decay: .*1j",
    ),
    "decay alone": (lambda: bp.ops.linear_kron_factor(ROWS_OF_5, decay=0.5), ValueError, "decay: .*without out"),
    "homogeneous a number": (
        lambda: bp.ops.linear_kron_factor(ROWS_OF_5, homogeneous=1),
        TypeError,
        "homogeneous: expected a bool, got 1",
    ),
    "out a list": (lambda: bp.ops.linear_kron_factor(ROWS_OF_5, 1.0, [1.0]), TypeError, "out: .*list"),
    "out too small": (
        lambda: bp.ops.linear_kron_factor(ROWS_OF_5, 1.0, torch.ones(5, 5), homogeneous=True),
        ValueError,
        r"out: expected shape \[6, 6\] .*\[6, 5\], got \[5, 5\]",
    ),
    "out in half": (
        lambda: bp.ops.linear_kron_factor(ROWS_OF_5.half(), 1.0, torch.ones(5, 5).half()),
        TypeError,
        "out: expected torch.float32 .*torch.float16, got torch.float16",
    ),
    "out elsewhere": (
        lambda: bp.ops.linear_kron_factor(ROWS_OF_5, 1.0, torch.ones(5, 5, device="meta")),
        ValueError,
        "out: .*meta",
    ),
    "out expanded": (
        lambda: bp.ops.linear_kron_factor(ROWS_OF_5, 1.0, torch.ones(1, 5).expand(5, 5)),
        ValueError,
        r"out: .*strides \[0, 1\]",
    ),
    "out is x": (lambda: bp.ops.linear_kron_factor(ROWS_OF_5[:5], 1.0, ROWS_OF_5[:5]), ValueError, "out: .*overlap"),
    "out overlaps x": (
        lambda: (lambda memory: bp.ops.linear_kron_factor(memory[:10].view(2, 5), 1.0, memory[5:].view(5, 5)))(
            torch.ones(30)
        ),
        ValueError,
        "out: .*overlap",
    ),
    "out of a derivative": (
        lambda: bp.ops.linear_kron_factor(ROWS_OF_5.clone().requires_grad_(), 1.0, torch.ones(5, 5)),
        ValueError,
        "out: .*x that requires grad",
    ),
    "out requires grad": (
        lambda: bp.ops.linear_kron_factor(ROWS_OF_5, 1.0, torch.ones(5, 5, requires_grad=True)),
        ValueError,
        "out: .*out that requires grad",
    ),
    "no spatial dims": (lambda: bp.ops.conv_kron_factor(ROWS_OF_5, 3), ValueError, r"x: .*\[6, 5\]"),
    "too many dims": (lambda: bp.ops.conv_kron_factor(IMAGE[None, None], 3), ValueError, "x: expected 3, 4 or 5"),
    "groups": (lambda: bp.ops.conv_kron_factor(IMAGE, 3, groups=3), ValueError, "groups: .*4 of x, got 3"),
    "groups 0": (lambda: bp.ops.conv_kron_factor(IMAGE, 3, groups=0), ValueError, "groups: .*got 0"),
    "groups of text": (lambda: bp.ops.conv_kron_factor(IMAGE, 3, groups="2"), TypeError, "groups: .*'2'"),
    "kernel too large": (lambda: bp.ops.conv_kron_factor(IMAGE, 9), ValueError, r"x: .*kernel_size \(9, 9\).*fit"),
    "kernel 0": (lambda: bp.ops.conv_kron_factor(IMAGE, 0), ValueError, "kernel_size: .*got 0"),
    "kernel rank": (lambda: bp.ops.conv_kron_factor(IMAGE, (3,)), ValueError, "kernel_size: expected 2 numbers"),
    "negative padding": (lambda: bp.ops.conv_kron_factor(IMAGE, 3, padding=-1), ValueError, "padding: .*-1"),
    "grouped out": (
        lambda: bp.ops.conv_kron_factor(IMAGE, 3, groups=2, out=torch.ones(36, 36)),
        ValueError,
        r"out: expected shape \[2, 18, 18\]",
    ),
    "output padding": (
        lambda: bp.ops.conv_transpose_kron_factor(IMAGE, 3, output_padding=1),
        ValueError,
        "output_padding: .*got 1",
    ),
    "transposed without output": (
        lambda: bp.ops.conv_transpose_kron_factor(IMAGE[..., :1, :1], 1, padding=3),
        ValueError,
        "x: .*padding",
    ),
}


@named("call, error, message", WRONG)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


RAW = {  # out, input, and what is wrong with them
    "out too small": (torch.ones(4, 4), ROWS_OF_5),
    "out of too many dims": (torch.ones(1, 5, 5), ROWS_OF_5),
    "out not contiguous": (torch.ones(10, 5)[::2], ROWS_OF_5),
    "out of another type": (torch.ones(5, 5).double(), ROWS_OF_5),
    "integers": (torch.ones(5, 5), ROWS_OF_5.long()),
    "no dims": (torch.ones(1, 1), torch.tensor(1.0)),
}


@named("out, x", RAW)
def test_the_operator_checks_again(out, x, device):
    with pytest.raises(RuntimeError):
        torch.ops.backpack_cuda.linear_kron_factor(out.to(device), x.to(device), 1.0, 0.0, False)


RAW_CONV = {  # changed arguments of a good call
    "out": {"out": torch.ones(36, 36)},
    "kernel": {"kernel": [3]},
    "stride": {"stride": [0, 1]},
    "dilation": {"dilation": [1, 0]},
    "positions": {"positions": [4, -1]},
    "groups": {"groups": 3},
    "rank": {"x": torch.ones(3, 4)},
}


@named("change", RAW_CONV)
def test_the_convolution_checks_again(change, device):
    good = {
        **{"out": torch.ones(1, 36, 36), "x": IMAGE, "kernel": [3, 3], "stride": [1, 1], "padding": [0, 0]},
        **{"dilation": [1, 1], "positions": [4, 4], "groups": 1, "scale": 1.0, "decay": 0.0, "homogeneous": False},
    }

    def call(arguments):
        placed = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments.values()]
        torch.ops.backpack_cuda.conv_kron_factor(*placed)

    call(good)
    with pytest.raises(RuntimeError):
        call({**good, **change})
