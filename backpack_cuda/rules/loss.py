"""Loss functions: where a backward pass learns the loss' curvature."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from backpack_cuda.authored import lent
from backpack_cuda.capture import capturing, in_operand_types, without_tensors
from backpack_cuda.context import CTX, authoring
from backpack_cuda.curvature.averaged import AveragedSweep, is_averaged
from backpack_cuda.curvature.losses import LossHessian, given_hessian, is_loss, loss_hessian
from backpack_cuda.curvature.products import form_products
from backpack_cuda.curvature.sweep import Sweep, reached_parameters
from backpack_cuda.extensions.products import ProductExtension
from backpack_cuda.extensions.second_order import SecondOrderExtension
from backpack_cuda.passes import Pass, from_gradients


def is_loss_module(module: nn.Module) -> bool:
    """Whether a module is a loss function, of a known Hessian or not; of an unknown one an error says what to do."""
    return is_loss(module) or isinstance(module, nn.modules.loss._Loss)


class LossFunction(torch.autograd.Function):
    """Hands on a loss' value; its backward starts what is formed from the loss' Hessian."""

    @staticmethod
    def forward(ctx, module, rebuild, tensors, value):
        ctx.save_for_backward(*tensors)
        ctx.module = module
        ctx.rebuild = rebuild
        return value.detach()

    @staticmethod
    @in_operand_types
    def backward(ctx, grad_output):
        extensions = [ext for ext in CTX.get_active_exts() if isinstance(ext, SecondOrderExtension)]
        if extensions:
            state = Pass.current(ctx)
            try:
                _start(ctx, state, extensions, grad_output)
            except Exception:
                state.discard()
                raise
        return None, None, None, grad_output


def _start(ctx, state: Pass, extensions: list[SecondOrderExtension], grad_output: Tensor) -> None:
    """Forms what one loss contributes, and puts the results so far on the parameters."""
    args, kwargs = ctx.rebuild(ctx.saved_tensors)
    if grad_output.numel() != 1:
        raise ValueError(
            f"{type(ctx.module).__name__}: output must be scalar for second-order quantities, got a loss of size "
            f"{list(grad_output.shape)}; use reduction='mean' or 'sum'"
        )
    factor = _factor(ctx.module, grad_output, any(ext.needs_convex_loss for ext in extensions))
    known = [ext for ext in extensions if ext.module_extension(ctx.module) is None]
    if known:
        hessian = None
        if any(ext.needs_loss_hessian for ext in known):
            hessian = loss_hessian(ctx.module, *args, **kwargs)
            if any(ext.needs_loss_hessian and not from_gradients(ext) for ext in known):
                _check_others_constant(ctx.module, args, kwargs, hessian.prediction)
            state.losses.append((hessian.normalisation, factor))
        _form(ctx, state, [ext for ext in known if not from_gradients(ext)], hessian, grad_output, factor)
    for ext in extensions:
        if ext not in known:
            _form(ctx, state, [ext], _authored_hessian(ext, ctx.module, args, kwargs, grad_output), grad_output, factor)


def _form(
    ctx,
    state: Pass,
    extensions: list[SecondOrderExtension],
    hessian: LossHessian | None,
    grad_output: Tensor,
    factor: Tensor | None,
) -> None:
    """Forms what a Hessian contributes to `extensions`."""
    if not extensions:
        return
    if hessian is not None:
        _check_prediction(ctx.module, hessian.prediction)
    edge = GradientEdge(*ctx.next_functions[0])
    products = [ext for ext in extensions if isinstance(ext, ProductExtension)]
    extensions = [ext for ext in extensions if ext not in products]

    def grad_prediction() -> Tensor:
        create_graph = torch.is_grad_enabled()
        return torch.autograd.grad(edge, hessian.prediction, grad_output, retain_graph=True, create_graph=create_graph)[
            0
        ]

    for former in (Sweep, AveragedSweep):
        formed = [ext for ext in extensions if (former is AveragedSweep) == is_averaged(ext)]
        if formed:
            former(formed, hessian.prediction, state).run(hessian, grad_prediction, factor)
    if products:
        prediction = ctx.saved_tensors[0] if hessian is None else hessian.prediction
        form_products(products, edge, grad_output, prediction, hessian, factor, grad_prediction, state)


def _authored_hessian(
    ext: SecondOrderExtension, module: nn.Module, args: tuple, kwargs: dict, grad_output: Tensor
) -> LossHessian:
    """The Hessian whose square root a module extension of somebody else's returns from `backpropagate`."""
    if kwargs or not args:
        raise NotImplementedError(f"{ext}: {type(module).__name__} was called with keywords; pass all by position")
    inputs = {f"input{i}": value for i, value in enumerate(args)}
    with lent(module, inputs), authoring():
        columns = ext.module_extension(module).backpropagate(ext, module, (None,) * len(args), (grad_output,), None)
    return given_hessian(module, args[0], columns)


def _check_prediction(module: nn.Module, prediction: Tensor) -> None:
    if prediction.grad_fn is None:
        raise RuntimeError(
            f"{type(module).__name__}: its first argument must be the prediction of an extended model, got a tensor "
            "without a graph"
        )
    if len(prediction) and not prediction.numel():
        raise ValueError(
            f"{type(module).__name__}: expected a prediction with at least one entry for each sample, got "
            f"{list(prediction.shape)}"
        )


def _check_others_constant(module: nn.Module, args: tuple, kwargs: dict, prediction: Tensor) -> None:
    """What the loss takes beside the prediction may not depend on the layers: no Hessian is known in that."""
    for other in pytree.tree_leaves((args, kwargs)):
        if not isinstance(other, Tensor) or other is prediction or other.grad_fn is None:
            continue
        names = reached_parameters(other)
        if names:
            raise NotImplementedError(
                f"{type(module).__name__}: its curvature is known in the prediction alone, but an argument of size "
                f"{list(other.shape)} beside it depends on {', '.join(names[:3])} too: detach() it"
            )


def _factor(module: nn.Module, grad_output: Tensor, must_be_positive: bool) -> Tensor | None:
    """What the loss was multiplied by before backward(); None for 1.

    A CUDA device is not waited for: there a negative factor gives NaN, the square root of it, rather than an error.
    """
    if grad_output.requires_grad or grad_output.is_cuda:
        return grad_output.reshape(())
    factor = float(grad_output)
    if factor < 0 and must_be_positive:
        raise ValueError(
            f"{type(module).__name__}: expected a loss with a non-negative factor before backward(), got {factor:g}: "
            "its curvature has no square root"
        )
    return None if factor == 1 else grad_output.reshape(())


def loss_forward(module: nn.Module, stock_forward: Callable, *args, **kwargs) -> Tensor:
    """The forward of a loss function, prepared for second-order quantities."""
    value = stock_forward(*args, **kwargs)
    if not capturing() or not isinstance(value, Tensor) or not value.requires_grad:
        return value
    tensors, rebuild = without_tensors(args, kwargs)
    return LossFunction.apply(module, rebuild, tensors, value)
