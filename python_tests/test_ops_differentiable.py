"""Operands that require grad under grad mode: the results are differentiable."""

import pytest
import torch
from helpers import assert_close, named, some
from op_cases import CASES, conv, linear
from oracle import FIELDS

import backpack_cuda as bp

SMALL = {
    "linear": linear((3, 2), 3),
    "linear_tokens": linear((2, 3, 2), 2),
    "linear_grid": linear((2, 2, 2, 2), 2),
    "conv1d": conv((2, 2, 5), 2, 3, stride=2, padding=1),
    "conv2d": conv((2, 2, 3, 3), 2, 2, dilation=2, padding=1),
    "conv2d_grouped": conv((2, 4, 3, 2), 2, 2, groups=2),
    "conv2d_depthwise": conv((2, 2, 3, 3), 4, (3, 1), groups=2, padding=(1, 0)),
    "conv3d": conv((2, 1, 2, 3, 2), 2, 2),
    "conv_transpose1d": conv((2, 2, 3), 2, 3, stride=2, padding=1, output_padding=1),
    "conv_transpose2d_grouped": conv((2, 2, 2, 2), 4, 2, stride=2, groups=2, output_padding=0),
    "conv_transpose3d": conv((1, 1, 2, 1, 2), 2, 2, output_padding=0),
}


def double_operands(case, device):
    return tuple(t.clone().requires_grad_() for t in case.operands(device, torch.float64))


@pytest.mark.parametrize("field", FIELDS[:4])
@named("case", SMALL)
def test_gradcheck(case, field, device):
    def quantity(input, grad_output):
        return getattr(case.public(input, grad_output, (field,)), field)

    assert torch.autograd.gradcheck(quantity, double_operands(case, device))


@named("case", some(SMALL, "linear", "conv2d_grouped", "conv_transpose1d"))
def test_second_derivatives(case, device):
    def quantity(input, grad_output):
        return case.public(input, grad_output, ("sum_grad_squared",)).sum_grad_squared

    assert torch.autograd.gradgradcheck(quantity, double_operands(case, device))


@pytest.mark.parametrize("field", FIELDS[:4])
def test_gradcheck_of_bias_statistics(field, device):
    for channel_dim in (1, 2):
        grad_output = torch.randn(2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)

        def quantity(g, channel_dim=channel_dim):
            return getattr(bp.ops.bias_grad_stats(g, (field,), channel_dim), field)

        assert torch.autograd.gradcheck(quantity, grad_output)


def test_gradcheck_of_outer_norm(device):
    operands = [torch.randn(3, size, dtype=torch.float64, device=device, requires_grad=True) for size in (2, 4)]
    assert torch.autograd.gradcheck(bp.ops.outer_norm, operands)


@pytest.mark.parametrize("requires_grad", [(True, False), (False, True)], ids=["input", "grad_output"])
@named("case", CASES)
def test_differentiable_results_are_the_same_numbers(case, requires_grad, device):
    operands = case.operands(device)
    plain = case.public(*operands, FIELDS[:4])
    leaves = [t.detach().requires_grad_(flag) for t, flag in zip(operands, requires_grad, strict=True)]
    graph = case.public(*leaves, FIELDS[:4])
    expected, _ = case.oracle(*operands)
    for name, value, other, reference in zip(FIELDS[:4], graph, plain, expected[:4], strict=True):
        assert value.requires_grad and not other.requires_grad
        assert value.dtype == other.dtype
        assert_close(name, value, reference, 1e-5)


def test_no_graph_under_no_grad(device):
    case = CASES["conv2d_3x3"]
    operands = [t.requires_grad_() for t in case.operands(device)]
    with torch.no_grad():
        stats = case.public(*operands, FIELDS[:4])
    assert not any(value.requires_grad for value in stats)


def test_inference_tensors(device):
    case = CASES["conv2d_3x3"]
    with torch.inference_mode():
        operands = case.operands(device)
        stats = case.public(*operands, FIELDS[:4])
    expected, _ = case.oracle(*operands)
    for name, value, reference in zip(FIELDS[:4], stats, expected[:4], strict=True):
        assert_close(name, value, reference, 1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for unfold_backward
@named("case", some(SMALL, "linear_tokens", "conv2d_grouped", "conv_transpose1d"))
def test_vmap_and_jacobians_through_the_calls(case, device):
    """torch.func sees plain differentiable operations."""
    input, grad_output = (t.detach() for t in double_operands(case, device))

    def norms(g):
        return case.public(input, g, ("batch_l2",)).batch_l2

    jacobian = torch.func.jacrev(norms)(grad_output)
    numerical = torch.autograd.functional.jacobian(norms, grad_output)
    assert torch.allclose(jacobian, numerical)
    batch = torch.stack([grad_output, 2 * grad_output])
    assert torch.allclose(torch.vmap(norms)(batch), torch.stack([norms(g) for g in batch]))


@named("case", some(CASES, "linear_tokens", "conv2d_grouped", "conv_transpose2d"))
def test_autocast_does_not_lower_the_precision(case, device):
    """The calls compute in the types of their operands, whatever autocast says, with and without a graph."""
    operands = case.operands(device)
    expected, _ = case.oracle(*operands)
    for requires_grad in (False, True):
        operands[0].requires_grad_(requires_grad)
        with torch.autocast(device.type, torch.bfloat16):
            stats = case.public(*operands, FIELDS[:4])
        for name, value, reference in zip(FIELDS[:4], stats, expected[:4], strict=True):
            assert value.dtype == torch.float32
            assert_close(name, value, reference, 1e-5)
