"""torch.library.opcheck of every operator of the library, and fake results against real ones."""

import pytest
import torch
from helpers import named, some
from op_cases import ALL_FIELDS, CASES, kernel_dtypes, want_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from backpack_cuda.stats import statistics_dtype

NAMES = sorted(
    name.split("::")[1].split(".")[0]
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("backpack_cuda::")
)
# Switches without tensors, and memory of any content.
EXCLUDED = {"_cpu_option", "_cuda_option", "_empty_result"}
COLUMN_WANTS = [(7, 7), (4, 0), (0, 3)]
WANTS = [(ALL_FIELDS, ALL_FIELDS), (want_bits("grad"), 0), (0, want_bits("batch_l2", "batch_grad"))]


def examples(device: torch.device) -> dict[str, list[tuple]]:
    """Arguments of each operator."""
    result: dict[str, list[tuple]] = {f"{family}_grad_stats": [] for family in ("linear", "conv", "conv_transpose")}
    result |= {
        name.replace("_grad_stats", other): [] for name in result for other in ("_weighted_grad", "_column_stats")
    }
    for case in CASES.values():
        dtypes = torch.float32, kernel_dtypes(device)[-1], torch.bfloat16
        for dtype, wants, column_wants in zip(dtypes, WANTS, COLUMN_WANTS, strict=True):
            operands, sizes = case.operands(device, dtype), case.geometry_arguments()
            result[f"{case.family}_grad_stats"].append((*operands, *sizes, *wants))
            weights = torch.randn(len(operands[0]), device=device, dtype=statistics_dtype(dtype))
            result[f"{case.family}_weighted_grad"].append((*operands, weights, *sizes))
            columns = torch.stack([operands[1], 2 * operands[1]])
            signs = weights.expand(2, -1) if dtype == torch.float32 else None
            result[f"{case.family}_column_stats"].append((operands[0], columns, signs, *sizes, *column_wants))
    grad_output = torch.randn(3, 4, 5, device=device)
    result["bias_grad_stats"] = [(grad_output, dim, want) for dim in (1, 2, -1) for want in (ALL_FIELDS, 5)]
    result["bias_column_stats"] = [(grad_output, None, 2, 7), (grad_output, grad_output[..., 0], -1, 4)]
    rows = torch.randn(6, 4, device=device)
    out = torch.zeros(5, 5, device=device)
    result["linear_kron_factor"] = [
        (out, rows, 0.5, 0.9, True),
        (out[:4, :4].contiguous(), rows.half(), 1.0, 0.0, False),
    ]
    image, geometry = torch.randn(2, 4, 5, device=device), ([2], [1], [-1], [2], [3], 2)
    out = torch.zeros(2, 5, 5, device=device)
    result["conv_kron_factor"] = [(out, image, *geometry, 0.5, 0.9, True)]
    result["outer_norm"] = [(rows, rows[:, :3]), (rows.double(), rows.double().expand(6, 4)), (rows[:0], rows[:0])]
    return result


def test_every_operator_is_known():
    """A new operator needs examples here, and a fake kernel."""
    assert set(NAMES) - EXCLUDED == set(examples(torch.device("cpu")))
    for name in set(NAMES) - EXCLUDED:
        assert torch._library.utils.has_fake_kernel(getattr(torch.ops.backpack_cuda, name).default), name


@pytest.mark.parametrize("name", sorted(set(NAMES) - EXCLUDED))
def test_opcheck(name, device):
    for arguments in examples(device)[name]:
        torch.library.opcheck(getattr(torch.ops.backpack_cuda, name).default, arguments)


@pytest.mark.parametrize("name", sorted(set(NAMES) - EXCLUDED))
def test_fake_results_look_like_real_ones(name, device):
    operator = getattr(torch.ops.backpack_cuda, name)
    for arguments in examples(device)[name]:
        real = operator(*arguments)
        with FakeTensorMode() as mode:
            fake = operator(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])
        if isinstance(real, torch.Tensor):
            pairs = [(real, fake)]
        else:  # nothing is returned where an argument is written to
            pairs = list(zip(real or (), fake or (), strict=True))
        for expected, actual in pairs:
            assert actual.shape == expected.shape
            assert actual.dtype == expected.dtype
            assert actual.device == expected.device
            assert actual.stride() == expected.stride()


@named("case", some(CASES, "linear_tokens", "conv2d_grouped", "conv_transpose2d"))
def test_operators_trace_with_symbolic_sizes(case, device):
    """A compiled function of changing batch size calls the operator without a break."""

    @torch.compile(backend="eager", fullgraph=True, dynamic=True)
    def norms(input, grad_output):
        want = want_bits("batch_l2")
        return getattr(torch.ops.backpack_cuda, f"{case.family}_grad_stats")(
            input, grad_output, *case.geometry_arguments(), want, 0
        )[2]

    input, grad_output = case.operands(device)
    for samples in (len(input), 2):
        operands = input[:samples], grad_output[:samples]
        assert torch.equal(norms(*operands), case.raw(*operands, want_bits("batch_l2"), 0)[0].batch_l2)
