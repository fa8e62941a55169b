"""The outer_norm operator against a float64 loop over samples; on the CPU, and on a GPU where there is one.

The CUDA kernel is also run without a GPU, in test_outer_norm_kernel.py.
"""

import pytest
import torch

import backpack_cuda  # noqa: F401  (loads the operators)

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2e-6, torch.float16: 2e-6}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def outer_norm(input, grad_output):
    return torch.ops.backpack_cuda.outer_norm(input, grad_output)


def per_sample_loop(input, grad_output):
    """sum_oi G_n[o, i]^2 of each G_n = grad_output_n input_n^T, in float64."""
    chunk = max(1, 2**20 // max(1, input.shape[1] * grad_output.shape[1]))  # samples whose G_n are formed at once
    pairs = zip(input.cpu().double().split(chunk), grad_output.cpu().double().split(chunk), strict=True)
    return torch.cat([torch.einsum("no,ni->noi", b, a).square().sum((1, 2)) for a, b in pairs])


def check(input, grad_output):
    out = outer_norm(input, grad_output)
    assert out.dtype == (torch.float64 if input.dtype == torch.float64 else torch.float32)
    assert out.shape == (len(input),) and out.device == input.device and out.is_contiguous()
    expected = per_sample_loop(input, grad_output)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=TOLERANCE[input.dtype], atol=0)


@every_dtype
@pytest.mark.parametrize("sizes", [(1, 1), (3, 31), (32, 33), (127, 128), (1000, 1), (129, 1000), (5000, 21)])
@pytest.mark.parametrize("samples", [0, 1, 7, 130])
def test_shapes(device, dtype, sizes, samples):
    input, grad_output = (torch.randn(samples, size).to(device, dtype) for size in sizes)
    check(input, grad_output)


LAYOUTS = {
    "misaligned rows": lambda n, k: torch.randn(n, k + 3)[:, 1 : k + 1],
    "misaligned storage": lambda n, k: torch.randn(n * k + 5)[5:].view(n, k),
    "transposed": lambda n, k: torch.randn(k, n).t(),
    "every second element": lambda n, k: torch.randn(n, 2 * k)[:, ::2],
    "every third row": lambda n, k: torch.randn(3 * n, k)[::3],
    "one row expanded": lambda n, k: torch.randn(1, k).expand(n, k),
    "one column expanded": lambda n, k: torch.randn(n, 1).expand(n, k),
    "one number expanded": lambda n, k: torch.randn(()).expand(n, k),
}


@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sizes", [(37, 50), (1500, 3)])
def test_layouts(device, dtype, layout, sizes):
    make = LAYOUTS[layout]

    def operand(size):  # .to() would drop the layout of what is expanded: convert the storage below it
        view = make(9, size)
        base = view.as_strided((view.untyped_storage().nbytes() // 4,), (1,), 0).to(device, dtype)
        return base.as_strided(view.shape, view.stride(), view.storage_offset())

    check(operand(sizes[0]), torch.randn(9, sizes[1]).to(device, dtype))
    check(torch.randn(9, sizes[1]).to(device, dtype), operand(sizes[0]))


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_empty_rows_give_zero(device, sizes):
    input, grad_output = (torch.full((3, size), torch.inf, device=device) for size in sizes)
    assert torch.equal(outer_norm(input, grad_output).cpu(), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [20, 3000])
def test_only_the_result_can_overflow_or_underflow(device, dtype, size):
    """Factors outside float32's range, products inside it; a zero row; then products outside."""
    input, grad_output = torch.randn(6, size), torch.randn(6, 11)
    scales = [(1e-25, 1e25), (1e30, 1e-22), (0.0, 1e30), (3e-38, 1e30), (1e25, 1.0), (1e-25, 1.0)]
    for n, (input_scale, grad_output_scale) in enumerate(scales):
        input[n] *= input_scale
        grad_output[n] *= grad_output_scale
    input, grad_output = input.to(device, dtype), grad_output.to(device, dtype)
    check(input[:4], grad_output[:4])
    assert outer_norm(input, grad_output)[4:].tolist() == [torch.inf, 0]


@every_dtype
@pytest.mark.parametrize("size", [20, 3000])
def test_nan_and_inf_propagate(device, dtype, size):
    input, grad_output = torch.randn(6, size), torch.randn(6, 11)
    input[0, 7] = torch.nan
    grad_output[1, 10] = -torch.inf
    input[2], grad_output[2, 0] = 0, torch.inf
    input[3], grad_output[3, 0] = 0, torch.nan
    out = outer_norm(input.to(device, dtype), grad_output.to(device, dtype)).cpu()
    assert out[1] == torch.inf and torch.equal(out.isnan(), torch.tensor([True, False, True, True, False, False]))
    assert out[4:].isfinite().all()


def test_many_samples(device):
    """More samples than one thread, or one grid of blocks, takes at once."""
    check(torch.randn(600_000, 1, device=device), torch.randn(600_000, 2, device=device))


def test_same_bits_every_time(device):
    input, grad_output = torch.randn(64, 5001, device=device), torch.randn(64, 77, device=device)
    first = outer_norm(input, grad_output)
    assert all(torch.equal(outer_norm(input, grad_output), first) for _ in range(5))


def test_bits_do_not_depend_on_the_number_of_threads():
    input, grad_output = torch.randn(700, 501), torch.randn(700, 77)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(outer_norm(input, grad_output))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_opcheck(device):
    wide = torch.randn(6, 9, device=device)
    for operands in [(wide, wide[:, :3]), (wide[:, 1:].double(), wide.double()), (wide[:0], wide[:0])]:
        torch.library.opcheck(torch.ops.backpack_cuda.outer_norm.default, operands)


BAD_OPERANDS = {
    "input of rank 3": (torch.ones(2, 3, 4), torch.ones(2, 3, 4), "must be matrices.*3, 4.*3, 4"),
    "grad_output of rank 1": (torch.ones(2, 3), torch.ones(2), r"same number of dims.*\[2, 3\] and \[2\]"),
    "unequal N": (torch.ones(2, 3), torch.ones(4, 3), r"batch size.*\[2, 3\] and \[4, 3\]"),
    "unequal dtypes": (torch.ones(2, 3), torch.ones(2, 3).double(), "same dtype"),
    "integers": (torch.ones(2, 3).int(), torch.ones(2, 3).int(), "must be float32, float64, bfloat16 or float16"),
}


@pytest.mark.parametrize("case", BAD_OPERANDS)
def test_bad_operands(device, case):
    input, grad_output, message = BAD_OPERANDS[case]
    with pytest.raises(RuntimeError, match=message):
        outer_norm(input.to(device), grad_output.to(device))
