"""Bad arguments of the low-level calls: the right type of error, naming the argument and both shapes."""

import re

import pytest
import torch
from helpers import named

import backpack_cuda as bp

tensor = torch.ones
CONV = {"kernel_size": 3, "padding": 1}


def linear(input, grad_output, **other):
    return bp.ops.linear_grad_stats(input, grad_output, **other)


def conv(input, grad_output, **other):
    return bp.ops.conv_grad_stats(input, grad_output, **{**CONV, **other})


def conv_transpose(input, grad_output, **other):
    return bp.ops.conv_transpose_grad_stats(input, grad_output, **{**CONV, **other})


def bias(_, grad_output, **other):
    return bp.ops.bias_grad_stats(grad_output, **other)


def outer_norm(input, grad_output):
    return bp.ops.outer_norm(input, grad_output)


# call, shape of input, shape of grad_output, further arguments, argument that the message must name
SHAPES = {
    "linear rank 1": (linear, (4,), (4,), {}, "input"),
    "linear rank 0": (linear, (), (), {}, "input"),
    "linear unequal N": (linear, (3, 4), (2, 5), {}, "grad_output"),
    "linear unequal T": (linear, (3, 2, 4), (3, 3, 5), {}, "grad_output"),
    "linear T times N equal": (linear, (2, 3, 4), (3, 2, 5), {}, "grad_output"),
    "linear unequal rank": (linear, (3, 2, 4), (3, 5), {}, "grad_output"),
    "outer_norm rank 3": (outer_norm, (3, 2, 4), (3, 2, 4), {}, "input"),
    "outer_norm unequal N": (outer_norm, (3, 4), (4, 4), {}, "grad_output"),
    "outer_norm rank 1": (outer_norm, (3,), (3,), {}, "input"),
    "bias rank 1": (bias, (), (3,), {}, "grad_output"),
    "conv unbatched": (conv, (3, 8), (5, 8), {}, "input"),
    "conv of 4 spatial dimensions": (conv, (1, 3, 4, 4, 4, 4), (1, 5, 4, 4, 4, 4), {}, "input"),
    "conv unequal rank": (conv, (2, 3, 8, 8), (2, 5, 8), {}, "grad_output"),
    "conv unequal N": (conv, (2, 3, 8, 8), (3, 5, 8, 8), {}, "grad_output"),
    "conv impossible size": (conv, (2, 3, 8, 8), (2, 5, 8, 7), {}, "grad_output"),
    "conv size of another stride": (conv, (2, 3, 8, 8), (2, 5, 8, 8), {"stride": 2}, "grad_output"),
    "conv kernel larger than the image": (conv, (2, 3, 2, 2), (2, 5, 0, 0), {"kernel_size": 7}, "grad_output"),
    "conv groups do not divide the input": (conv, (2, 3, 8), (2, 4, 8), {"groups": 2}, "groups"),
    "conv groups do not divide the output": (conv, (2, 4, 8), (2, 3, 8), {"groups": 2}, "groups"),
    "conv groups 0": (conv, (2, 4, 8), (2, 4, 8), {"groups": 0}, "groups"),
    "conv groups -1": (conv, (2, 4, 8), (2, 4, 8), {"groups": -1}, "groups"),
    "conv kernel 0": (conv, (2, 3, 8), (2, 5, 8), {"kernel_size": 0}, "kernel_size"),
    "conv stride 0": (conv, (2, 3, 8), (2, 5, 8), {"stride": 0}, "stride"),
    "conv padding -1": (conv, (2, 3, 8), (2, 5, 4), {"padding": -1}, "padding"),
    "conv dilation 0": (conv, (2, 3, 8), (2, 5, 8), {"dilation": 0}, "dilation"),
    "conv kernel of another rank": (conv, (2, 3, 8), (2, 5, 8), {"kernel_size": (3, 3)}, "kernel_size"),
    "conv stride of another rank": (conv, (2, 3, 8, 8), (2, 5, 8, 8), {"stride": (1, 1, 1)}, "stride"),
    "conv padding of another rank": (conv, (2, 3, 8, 8), (2, 5, 8, 8), {"padding": (1,)}, "padding"),
    "conv dilation of another rank": (conv, (2, 3, 8, 8), (2, 5, 8, 8), {"dilation": ()}, "dilation"),
    "transpose impossible size": (conv_transpose, (2, 3, 8), (2, 5, 9), {}, "grad_output"),
    "transpose unequal N": (conv_transpose, (2, 3, 8), (1, 5, 8), {}, "grad_output"),
    "transpose groups": (conv_transpose, (2, 3, 8), (2, 4, 8), {"groups": 2}, "groups"),
    "transpose output_padding too large": (
        conv_transpose,
        (2, 3, 8),
        (2, 5, 17),
        {"stride": 2, "output_padding": 2},
        "output_padding",
    ),
    "transpose output_padding -1": (conv_transpose, (2, 3, 8), (2, 5, 7), {"output_padding": -1}, "output_padding"),
    "transpose without output": (conv_transpose, (2, 3, 1), (2, 5, 0), {"kernel_size": 1, "padding": 3}, "grad_output"),
    "bias channel_dim 0": (bias, (), (3, 4), {"channel_dim": 0}, "channel_dim"),
    "bias channel_dim -rank": (bias, (), (3, 4), {"channel_dim": -2}, "channel_dim"),
    "bias channel_dim too large": (bias, (), (3, 4), {"channel_dim": 2}, "channel_dim"),
    "bias channel_dim too small": (bias, (), (3, 4), {"channel_dim": -3}, "channel_dim"),
}
WANTS = {
    "unknown name": (("grad", "variance"), "variance"),
    "empty": ((), "at least one"),
    "empty string": ("", "''"),
    "name of an attribute": ("grad_batch", "grad_batch"),
    "upper case": (("GRAD",), "GRAD"),
}
CALLS = {
    "linear": (linear, (3, 4), (3, 5)),
    "conv": (conv, (3, 4, 8), (3, 5, 8)),
    "conv_transpose": (conv_transpose, (3, 4, 8), (3, 5, 8)),
    "bias": (bias, (), (3, 5)),
    "outer_norm": (outer_norm, (3, 4), (3, 5)),
}
WITH_WANT = {name: call for name, call in CALLS.items() if name != "outer_norm"}
WITH_INPUT = {name: call for name, call in CALLS.items() if name != "bias"}


@named("call, input, grad_output, other, argument", SHAPES)
def test_shapes(call, input, grad_output, other, argument, device):
    with pytest.raises(ValueError, match=rf"\b{argument}\b") as caught:
        call(tensor(input, device=device), tensor(grad_output, device=device), **other)
    if argument in ("input", "grad_output"):
        shapes = [input, grad_output] if call is not bias else [grad_output]
        for shape in shapes:
            assert re.search(re.escape(str(list(shape))), str(caught.value)), f"{shape} is not in: {caught.value}"


@named("want, text", WANTS)
@named("call, input, grad_output", WITH_WANT)
def test_wants(call, input, grad_output, want, text, device):
    with pytest.raises(ValueError, match=rf"want.*{text}"):
        call(tensor(input, device=device), tensor(grad_output, device=device), want=want)


@pytest.mark.parametrize("want", [None, 3, 1.0, [None], [("grad",)]], ids=str)
@named("call, input, grad_output", WITH_WANT)
def test_wants_of_a_wrong_type(call, input, grad_output, want, device):
    with pytest.raises((TypeError, ValueError), match="want"):
        call(tensor(input, device=device), tensor(grad_output, device=device), want=want)


@named("call, input, grad_output", WITH_WANT)
def test_a_single_name_is_a_want(call, input, grad_output, device):
    stats = call(tensor(input, device=device), tensor(grad_output, device=device), want="batch_l2")
    assert stats.batch_l2.shape == (3,)
    assert stats.grad is None


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128], ids=str
)
@named("call, input, grad_output", CALLS)
def test_types_without_gradients(call, input, grad_output, dtype, device):
    with pytest.raises(TypeError, match=rf"input|grad_output.*{dtype}"):
        call(tensor(input, device=device, dtype=dtype), tensor(grad_output, device=device, dtype=dtype))


@named("call, input, grad_output", WITH_INPUT)
def test_mixed_types(call, input, grad_output, device):
    with pytest.raises(TypeError, match=r"grad_output.*torch.float32.*torch.float64"):
        call(tensor(input, device=device), tensor(grad_output, device=device, dtype=torch.float64))


@named("call, input, grad_output", WITH_INPUT)
def test_mixed_devices(call, input, grad_output, device):
    with pytest.raises(ValueError, match=rf"grad_output.*{device.type}.*meta"):
        call(tensor(input, device=device), tensor(grad_output, device="meta"))


@pytest.mark.parametrize("wrong", [None, [[1.0]], 3.0], ids=str)
@named("call, input, grad_output", WITH_INPUT)
def test_operands_that_are_no_tensors(call, input, grad_output, wrong, device):
    with pytest.raises(TypeError, match="input"):
        call(wrong, tensor(grad_output, device=device))
    with pytest.raises(TypeError, match="grad_output"):
        call(tensor(input, device=device), wrong)


@named("call, input, grad_output", WITH_INPUT)
def test_layouts_that_are_not_dense(call, input, grad_output, device):
    with pytest.raises((NotImplementedError, TypeError), match="input"):
        call(tensor(input, device=device).to_sparse(), tensor(grad_output, device=device))


@pytest.mark.parametrize("value", [1.5, "same", None, (1.0,), True], ids=str)
@pytest.mark.parametrize("argument", ["kernel_size", "stride", "padding", "dilation", "groups"])
def test_numbers_of_a_wrong_type(argument, value, device):
    with pytest.raises((TypeError, ValueError), match=argument):
        conv(tensor(3, 4, 8, device=device), tensor(3, 5, 8, device=device), **{argument: value})


RAW = {
    "linear rank": ("linear_grad_stats", (tensor(4), tensor(4), 1, 1)),
    "linear unequal N": ("linear_grad_stats", (tensor(2, 4), tensor(3, 4), 1, 1)),
    "linear unequal T": ("linear_grad_stats", (tensor(2, 3, 4), tensor(2, 2, 4), 1, 1)),
    "linear mixed types": ("linear_grad_stats", (tensor(2, 4), tensor(2, 4).double(), 1, 1)),
    "linear integers": ("linear_grad_stats", (tensor(2, 4).long(), tensor(2, 4).long(), 1, 1)),
    "linear unknown want": ("linear_grad_stats", (tensor(2, 4), tensor(2, 4), 32, 0)),
    "linear negative want": ("linear_grad_stats", (tensor(2, 4), tensor(2, 4), 1, -1)),
    "conv size": ("conv_grad_stats", (tensor(2, 4, 8), tensor(2, 5, 8), [3], [1], [0], [1], 1, 1, 1)),
    "conv lengths": ("conv_grad_stats", (tensor(2, 4, 8), tensor(2, 5, 6), [3, 3], [1], [0], [1], 1, 1, 1)),
    "conv stride 0": ("conv_grad_stats", (tensor(2, 4, 8), tensor(2, 5, 6), [3], [0], [0], [1], 1, 1, 1)),
    "conv groups": ("conv_grad_stats", (tensor(2, 4, 8), tensor(2, 5, 6), [3], [1], [0], [1], 3, 1, 1)),
    "conv groups 0": ("conv_grad_stats", (tensor(2, 4, 8), tensor(2, 5, 6), [3], [1], [0], [1], 0, 1, 1)),
    "conv rank": ("conv_grad_stats", (tensor(4, 8), tensor(5, 6), [3], [1], [0], [1], 1, 1, 1)),
    "transpose size": (
        "conv_transpose_grad_stats",
        (tensor(2, 4, 8), tensor(2, 5, 9), [3], [1], [0], [0], [1], 1, 1, 1),
    ),
    "transpose unequal N": (
        "conv_transpose_grad_stats",
        (tensor(2, 4, 8), tensor(3, 5, 10), [3], [1], [0], [0], [1], 1, 1, 1),
    ),
    "bias channel_dim": ("bias_grad_stats", (tensor(2, 4), 2, 1)),
    "bias channel_dim 0": ("bias_grad_stats", (tensor(2, 4), 0, 1)),
    "bias rank": ("bias_grad_stats", (tensor(2), 0, 1)),
    "outer_norm unequal N": ("outer_norm", (tensor(2, 4), tensor(3, 4))),
}


@named("operator, arguments", RAW)
def test_the_operators_check_again(operator, arguments, device):
    """Whoever calls torch.ops directly gets an exception, not memory that is not theirs."""
    arguments = [a.to(device) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(RuntimeError):
        getattr(torch.ops.backpack_cuda, operator)(*arguments)
