"""Hessians of losses at the prediction, as square roots: exact, with fewer columns, and sampled.

All of these losses are negative log-likelihoods in exponential families, so their Hessian is the covariance of the
gradients for targets drawn from the model's own prediction; neither depends on the targets but through weights.

| loss              | Hessian of a sample                  | sampled gradient                                       |
|-------------------|--------------------------------------|--------------------------------------------------------|
| MSELoss           | 2 I                                  | 2 (f - y~), y~ ~ Normal(f, variance 1/2)               |
| CrossEntropyLoss  | w (diag(p) - p p^T) at each position | sqrt(w) (p - onehot(y~)), y~ ~ Categorical(p)          |
| BCEWithLogitsLoss | w diag(s (1 - s))                    | sqrt(w) (s - y~), y~ ~ Bernoulli(s)                    |

all divided by the normalisation of a mean reduction; w collects class weights, `pos_weight`, soft targets, label
smoothing and ignored targets. Square roots and probabilities are formed from log-probabilities in float32 at least, so
that nothing cancels, overflows or loses its derivative where probabilities are 0 or 1.

Nothing here waits for a CUDA device, except two checks of values that the result would not be real without: soft
targets (CrossEntropyLoss) and targets together with `pos_weight` (BCEWithLogitsLoss), at every call. The losses' own
weights are checked at the first call.
"""

import inspect
from collections.abc import Callable
from functools import partial
from math import prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.weak import WeakIdKeyDictionary

from backpack_cuda.curvature.square_root import SquareRoot
from backpack_cuda.ops import checks
from backpack_cuda.stats import statistics_dtype


class LossHessian(NamedTuple):
    """Hessian of a loss' value, with its reduction, at the prediction; block per sample, H_n = sum_v S_vn S_vn^T."""

    prediction: Tensor  # [N, *]
    exact: SquareRoot  # BackPACK's columns; differentiable in the prediction when formed in grad mode
    reduced: SquareRoot  # the same H_n from fewer columns where there are such, else `exact`
    sampled: Callable[[int], SquareRoot]  # M -> M columns, gradients for drawn targets / sqrt(M); draws at the call
    normalisation: Tensor | float  # what the sum over samples and positions was divided by; 0 if all were ignored
    summed: Callable[[int], Tensor]  # R -> [R, D, D], of a prediction [N * R, *] with rows of D: sum over n of H_nr
    product: Callable[[], Callable[[Tensor], Tensor]]  # forms u [*prediction] -> H u, [*prediction]; keeps no graph


def loss_hessian(module: nn.Module, *args, **kwargs) -> LossHessian:
    """The Hessian of `module(*args, **kwargs)` with respect to the prediction, the loss' first argument.

    Draws come from torch's global generator.

    Raises:
        NotImplementedError: no Hessian is known for this class; see `register_loss`.
        ValueError: the loss is no scalar (`reduction="none"`), shapes do not fit, or the Hessian is not positive
            semi-definite (negative weights, soft targets below 0).
        TypeError: arguments of other types than the loss takes.
    """
    known = _known_hessian(module)
    if known is None:
        raise NotImplementedError(
            f"no Hessian is known for the loss {type(module).__name__}: make it known by "
            f"backpack_cuda.curvature.register_loss({type(module).__name__}, hessian_sqrt)"
        )
    return known(module, *args, **kwargs)


def is_loss(module: nn.Module) -> bool:
    """Whether the Hessian of this module's class is known."""
    return _known_hessian(module) is not None


def register_loss(module_class: type[nn.Module], hessian_sqrt: Callable[..., Tensor]) -> None:
    """Makes the Hessian of a loss known, for `module_class` and its subclasses with the same forward.

    Args:
        module_class: the class of a loss module whose forward returns a scalar; its first argument is the prediction.
        hessian_sqrt: `hessian_sqrt(module, prediction, *rest)`, with the arguments of the module's forward, returns a
            square root S [V, N, *prediction.shape[1:]] of the Hessian of the loss' value: that of sample n with respect
            to prediction[n] is sum_v S[v, n] S[v, n]^T. In the prediction's type; made of differentiable operations if
            quantities shall be differentiable. Samples must not depend on each other.

    Sampled columns are random combinations of these columns with signs +-1.
    """
    if not (isinstance(module_class, type) and issubclass(module_class, nn.Module)):
        raise TypeError(f"module_class: expected a subclass of torch.nn.Module, got {module_class!r}")
    if not callable(hessian_sqrt):
        raise TypeError(f"hessian_sqrt: expected a function, got {type(hessian_sqrt).__name__}")
    _REGISTERED[module_class] = hessian_sqrt


_REGISTERED: dict[type[nn.Module], Callable[..., Tensor]] = {}


def _known_hessian(module: nn.Module) -> Callable[..., LossHessian] | None:
    forward = type(module).forward
    if _REGISTERED:
        for module_class in type(module).__mro__:
            if module_class in _REGISTERED and module_class.forward is forward:
                return _registered(_REGISTERED[module_class])
    return _HESSIANS.get(forward)


# ---- mean squared error


def _mse(module: nn.MSELoss, input: Tensor, target: Tensor) -> LossHessian:
    """Hessian (2 / normalisation) I."""
    mean = _is_mean(module)
    _check_prediction(module, input)
    _check_same_shape(module, input, target)
    normalisation = float(input.numel()) if mean else 1.0
    shape, features = input.shape, prod(input.shape[1:])
    root = sqrt(2 / max(normalisation, 1.0))

    def form(begin: int, end: int) -> tuple[Tensor, None]:
        columns = input.new_zeros(end - begin, features)  # rows of root * I
        columns.diagonal(begin).fill_(root)
        return columns.view(end - begin, 1, *shape[1:]).expand(end - begin, *shape), None

    def sampled(mc_samples: int) -> SquareRoot:
        draws = torch.randn(mc_samples, *shape, dtype=statistics_dtype(input.dtype), device=input.device)
        return _given(draws.mul_(root / sqrt(mc_samples)).to(input.dtype))

    def summed(rows: int) -> Tensor:
        value = shape[0] // max(rows, 1) * 2 / max(normalisation, 1.0)
        eye = torch.eye(features, dtype=statistics_dtype(input.dtype), device=input.device)
        return eye.mul_(value).expand(rows, features, features)

    exact = SquareRoot(features, form)
    return LossHessian(input, exact, exact, sampled, normalisation, summed, lambda: lambda u: u * root**2)


# ---- softmax cross-entropy


def _cross_entropy(module: nn.CrossEntropyLoss, input: Tensor, target: Tensor) -> LossHessian:
    """Hessian w[n, t] (diag(p) - p p^T) with p = softmax(input[n, :, t]), at every position t of the extra dimensions.

    A column (c, t), c major, is zero at the other positions.
    """
    mean = _is_mean(module)
    _check_prediction(module, input)
    if input.dim() < 2:
        raise ValueError(
            f"CrossEntropyLoss input: expected at least 2 dimensions [N, C, *], got {list(input.shape)}: second-order "
            "quantities need a batch dimension"
        )
    weights, normalisation = _position_weights(module, input, target, mean)  # [N, *d]
    # An ignored target stays 0 where all are ignored: 0 / 0.
    scale = torch.where(weights > 0, weights / normalisation, weights)  # [N, *d]
    root = scale.sqrt()

    samples, classes, *positions = input.shape
    dtype, length = statistics_dtype(input.dtype), prod(positions)

    def form(begin: int, end: int, reduced: bool) -> tuple[Tensor, None]:
        count = end - begin
        column = torch.arange(begin, end, device=input.device)  # [V]
        tau = (0.5 * input.log_softmax(1, dtype)).exp()  # [N, C, *d], sqrt(p)
        factor = root
        if positions:  # columns and positions side by side
            position = column % length
            column = column // length
            tau = tau.flatten(2).movedim(2, 0)[position]  # [V, N, C]
            factor = root.flatten(1).t()[position]  # [V, N]
        else:
            tau = tau.unsqueeze(0)  # [1, N, C]
        column = column.unsqueeze(1)  # [V, 1]: the column's class
        if reduced:
            vector, column = _complement(tau, column)
        else:
            vector = tau
        column = column.expand(count, samples).unsqueeze(2)  # [V, N, 1]
        # S_v = factor * diag(tau) (e_c - tau_c vector)
        scaled = tau * factor.unsqueeze(-1)  # [V or 1, N, C]
        values = -tau.expand(count, samples, classes).gather(2, column) * (scaled * vector)
        values.scatter_add_(2, column, scaled.expand(count, samples, classes).gather(2, column))
        values = values.to(input.dtype)  # [V, N, C]
        if not positions:
            return values, None
        position = position.view(count, 1, 1, 1).expand(count, samples, classes, 1)
        columns = values.new_zeros(count, samples, classes, length).scatter(3, position, values.unsqueeze(3))
        return columns.view(count, *input.shape), None

    def sampled(mc_samples: int) -> SquareRoot:
        probabilities = input.softmax(1, dtype)  # [N, C, *d]
        # The first of exponential clocks with rates p to ring; as torch.multinomial, which waits for the device.
        clocks = torch.empty(mc_samples, *input.shape, dtype=dtype, device=input.device).exponential_()
        drawn = torch.div(probabilities.detach(), clocks, out=clocks).argmax(2, keepdim=True)  # [M, N, 1, *d]
        factor = (root / sqrt(mc_samples)).unsqueeze(1)  # [N, 1, *d]

        def form_sampled(begin: int, end: int) -> tuple[Tensor, None]:
            onehot = factor.new_zeros(end - begin, *input.shape).scatter_(2, drawn[begin:end], 1.0)
            return ((probabilities - onehot) * factor).to(input.dtype), None

        return SquareRoot(mc_samples, form_sampled)

    def summed(rows: int) -> Tensor:
        p = input.softmax(1, dtype)
        if rows == length == 1:
            mixed = (p.reshape(-1, classes) * scale.reshape(-1, 1)).t() @ p.reshape(-1, classes)
            mixed = mixed - mixed.diagonal().diag()
            # The rows of a Hessian add up to zero: its diagonal without cancellation.
            return (mixed.sum(1).diag() - mixed)[None]
        p = p.reshape(-1, rows, classes, length)  # [N, R, C, L]
        w = scale.reshape(-1, rows, 1, length)
        mixed = torch.einsum("nrcl,nrdl->rlcd", p * w, p)
        mixed = mixed - mixed.diagonal(dim1=2, dim2=3).diag_embed()
        hessians = mixed.sum(3).diag_embed() - mixed  # [R, L, C, C]
        return hessians.permute(0, 2, 3, 1).diag_embed().transpose(2, 3).reshape(rows, classes * length, -1)

    def product() -> Callable[[Tensor], Tensor]:
        p = input.softmax(1, dtype)  # [N, C, *d]
        pivot = p.detach().argmax(1, keepdim=True) if p.numel() else None  # [N, 1, *d]
        weighted = p * scale.unsqueeze(1)

        def multiply(u: Tensor) -> Tensor:
            # w p_c (u_c - sum_k p_k u_k), the same for u less a constant: u_j of the most probable class, since with
            # p_j close to 1 the sum would nearly cancel u_j.
            if pivot is None:
                return torch.zeros_like(u)
            d = u.to(dtype)
            d = d - d.gather(1, pivot)
            return (weighted * (d - (p * d).sum(1, keepdim=True))).to(u.dtype)

        return multiply

    exact = SquareRoot(classes * length, lambda begin, end: form(begin, end, reduced=False))
    if classes > 1:
        reduced = SquareRoot((classes - 1) * length, lambda begin, end: form(begin, end, reduced=True))
    else:
        reduced = exact
    return LossHessian(input, exact, reduced, sampled, normalisation, summed, product)


def _complement(tau: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis e_c - tau_c h of the vectors orthogonal to the unit vector tau: C - 1 instead of C columns.

    These are the columns, but one, of the Householder reflection that maps tau to -e_j. With j the most probable class
    no entry is a difference of nearly equal numbers, and unlike in the Cholesky factor of diag(p) - p p^T (Tanabe and
    Sagae, 1992) nothing is divided by sums of probabilities that may be 0.

    Args:
        tau: [V or 1, N, C].
        column: [V, 1] in 0..C-2.

    Returns:
        h [V or 1, N, C], and the class c [V, N] of each column: class C - 1 stands in for j.
    """
    pivot = tau.detach().argmax(2, keepdim=True)  # [V or 1, N, 1]
    h = (tau / (1 + tau.gather(2, pivot))).scatter(2, pivot, 1.0)
    return h, torch.where(column == pivot.squeeze(2), tau.shape[2] - 1, column)


def _position_weights(
    module: nn.CrossEntropyLoss, input: Tensor, target: Tensor, mean: bool
) -> tuple[Tensor, Tensor | float]:
    """Factors w [N, *d] of the Hessians of the unreduced losses, and what a mean divides by.

    The loss at a position is -sum_c q_c w_c log p_c, with class weights w_c and smoothed targets q.
    """
    class_weights, smoothing = module.weight, module.label_smoothing
    dtype, classes = statistics_dtype(input.dtype), input.shape[1]
    if not isinstance(target, Tensor):
        raise TypeError(f"CrossEntropyLoss target: expected a Tensor, got {type(target).__name__}")
    if class_weights is not None:
        if class_weights.shape != (classes,):
            raise ValueError(
                f"CrossEntropyLoss weight: expected one per class, [{classes}], got {list(class_weights.shape)}"
            )
        _check_not_negative("CrossEntropyLoss weight", class_weights)
        class_weights = class_weights.to(dtype)
    if target.shape == input.shape:
        if not target.is_floating_point():
            raise TypeError(
                f"CrossEntropyLoss target: expected probabilities for the shape {list(target.shape)} of input, got "
                f"{target.dtype}"
            )
        if (target < 0).any():
            raise ValueError(
                f"CrossEntropyLoss target: expected probabilities, got values down to {target.min().item():g}: the "
                "Hessian need not be positive semi-definite"
            )
        normalisation = float(input.numel() // max(classes, 1)) if mean else 1.0
        weighted, total = target.to(dtype), 1.0
        if class_weights is not None:
            weighted = weighted * class_weights.view(-1, *(1,) * (input.dim() - 2))
            total = class_weights.mean()
        weights = weighted.sum(1)
        return (weights if smoothing == 0 else (1 - smoothing) * weights + smoothing * total), normalisation

    if target.shape != (input.shape[0], *input.shape[2:]):
        raise ValueError(
            f"CrossEntropyLoss target: expected class indices {[input.shape[0], *input.shape[2:]]} or probabilities "
            f"{list(input.shape)} for input {list(input.shape)}, got {list(target.shape)}"
        )
    if target.is_floating_point():
        raise TypeError(f"CrossEntropyLoss target: expected class indices (integers), got {target.dtype}")
    target = target.long()  # an ignore_index may lie outside of a smaller type
    valid = target != module.ignore_index  # [N, *d]
    weights = valid.to(dtype)
    if class_weights is not None:
        weights = class_weights[torch.where(valid, target, 0)] * weights
    normalisation = weights.sum() if mean else 1.0
    if class_weights is not None and smoothing != 0:
        weights = (1 - smoothing) * weights + smoothing * class_weights.mean() * valid
    return weights, normalisation


# ---- binary cross-entropy


def _binary_cross_entropy(module: nn.BCEWithLogitsLoss, input: Tensor, target: Tensor) -> LossHessian:
    """Hessian diag(w s (1 - s)) with s = sigmoid(input)."""
    mean = _is_mean(module)
    _check_prediction(module, input)
    _check_same_shape(module, input, target)
    normalisation = float(input.numel()) if mean else 1.0
    shape, features = input.shape, prod(input.shape[1:])
    dtype = statistics_dtype(input.dtype)
    scale = 1 / max(normalisation, 1.0)  # broadcasts to [N, *]
    for name in ("weight", "pos_weight"):
        factors = getattr(module, name)
        if factors is None:
            continue
        full_name = f"BCEWithLogitsLoss {name}"
        if factors.dim() > len(shape) or any(
            f not in (1, n) for f, n in zip(reversed(factors.shape), reversed(shape), strict=False)
        ):
            raise ValueError(
                f"{full_name}: expected a shape that broadcasts to {list(shape)}, got {list(factors.shape)}"
            )
        _check_not_negative(full_name, factors)
        if name == "weight":
            scale = scale * factors.to(dtype)
        else:
            factors = 1 + (factors.to(dtype) - 1) * target.to(dtype)
            if (factors < 0).any():
                raise ValueError(
                    "BCEWithLogitsLoss target: expected values between 0 and 1 with pos_weight, got some for which the "
                    "Hessian is negative"
                )
            scale = scale * factors
    root = scale.sqrt() if isinstance(scale, Tensor) else sqrt(scale)  # broadcasts to [N, *]

    def form(begin: int, end: int) -> tuple[Tensor, None]:
        logits = input.to(dtype)
        entries = (0.5 * (logsigmoid(logits) + logsigmoid(-logits))).exp() * root  # [N, *]
        entries = entries.to(input.dtype).reshape(shape[0], features)
        columns = entries.new_zeros(end - begin, shape[0], features)
        columns.diagonal(begin, 0, 2).copy_(entries[:, begin:end])
        return columns.view(end - begin, *shape), None

    def sampled(mc_samples: int) -> SquareRoot:
        probabilities = input.to(dtype).sigmoid()  # [N, *]
        drawn = torch.rand(mc_samples, *shape, dtype=dtype, device=input.device) < probabilities  # [M, N, *]
        factor = root / sqrt(mc_samples)

        def form_sampled(begin: int, end: int) -> tuple[Tensor, None]:
            return ((probabilities - drawn[begin:end].to(dtype)) * factor).to(input.dtype), None

        return SquareRoot(mc_samples, form_sampled)

    def summed(rows: int) -> Tensor:
        logits = input.to(dtype)
        values = (logsigmoid(logits) + logsigmoid(-logits)).exp() * scale  # [N * R, *]
        return values.reshape(-1, rows, features).sum(0).diag_embed()

    def product() -> Callable[[Tensor], Tensor]:
        logits = input.to(dtype)
        diagonal = (logsigmoid(logits) + logsigmoid(-logits)).exp() * scale  # [N, *]
        return lambda u: (u * diagonal).to(u.dtype)

    exact = SquareRoot(features, form)
    return LossHessian(input, exact, exact, sampled, normalisation, summed, product)


_HESSIANS = {
    nn.MSELoss.forward: _mse,
    nn.CrossEntropyLoss.forward: _cross_entropy,
    nn.BCEWithLogitsLoss.forward: _binary_cross_entropy,
}


# ---- losses of users


def given_hessian(module: nn.Module, prediction: Tensor, columns: Tensor) -> LossHessian:
    """The Hessian of a loss with the columns [V, *prediction] of a square root, exact or sampled."""
    _check_prediction(module, prediction)
    _check_columns(type(module).__name__, columns, prediction)
    root = _given(columns)
    summed, product = partial(_summed, columns), partial(_product, columns)
    return LossHessian(prediction, root, root, lambda mc_samples: root, 1.0, summed, product)


def _summed(columns: Tensor, rows: int) -> Tensor:
    """Columns [V, N * R, *] -> [R, D, D], their products summed over columns and samples."""
    wide = columns.to(statistics_dtype(columns.dtype)).reshape(len(columns), -1, rows, prod(columns.shape[2:]))
    return torch.einsum("vnrd,vnre->rde", wide, wide)


def _product(columns: Tensor) -> Callable[[Tensor], Tensor]:
    """Columns [V, N, *] -> the product with the sum of their outer products."""

    def multiply(u: Tensor) -> Tensor:
        coefficients = (columns * u).flatten(2).sum(2)  # [V, N]
        return torch.einsum("vn,vn...->n...", coefficients, columns)

    return multiply


def _registered(hessian_sqrt: Callable[..., Tensor]) -> Callable[..., LossHessian]:
    def hessian(module: nn.Module, *args, **kwargs) -> LossHessian:
        if kwargs:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
            bound.apply_defaults()
            args, kwargs = bound.args[1:], bound.kwargs
        prediction = args[0] if args else None
        _check_prediction(module, prediction)
        columns = hessian_sqrt(module, *args, **kwargs)  # [V, N, *]
        _check_columns(type(module).__name__, columns, prediction)

        def sampled(mc_samples: int) -> SquareRoot:
            dtype = statistics_dtype(columns.dtype)
            count, samples = columns.shape[:2]
            signs = torch.randint(0, 2, (mc_samples, count, samples), device=columns.device).to(dtype) * 2 - 1
            combined = torch.einsum("mvn,vn...->mn...", signs / sqrt(mc_samples), columns.to(dtype))
            return _given(combined.to(columns.dtype))

        exact = _given(columns)
        summed, product = partial(_summed, columns), partial(_product, columns)
        return LossHessian(prediction, exact, exact, sampled, 1.0, summed, product)

    return hessian


def _given(columns: Tensor) -> SquareRoot:
    """The square root with these columns [V, N, *]."""
    return SquareRoot(columns.shape[0], lambda begin, end: (columns[begin:end], None))


# ---- checks


def _is_mean(module: nn.Module) -> bool:
    if module.reduction not in ("mean", "sum"):
        raise ValueError(
            f"{type(module).__name__} reduction: Output must be scalar: expected 'mean' or 'sum', got "
            f"{module.reduction!r}"
        )
    return module.reduction == "mean"


def _check_prediction(module: nn.Module, prediction) -> None:
    name = f"{type(module).__name__} input"
    checks.tensor(name, prediction)
    if prediction.dim() == 0:
        raise ValueError(f"{name}: expected at least 1 dimension [N, *], got a scalar")


def _check_same_shape(module: nn.Module, prediction: Tensor, target) -> None:
    name = f"{type(module).__name__} target"
    if not isinstance(target, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(target).__name__}")
    if target.shape != prediction.shape:
        raise ValueError(f"{name}: expected the shape {list(prediction.shape)} of input, got {list(target.shape)}")


_not_negative = WeakIdKeyDictionary()  # tensor -> its version when it was checked


def _check_not_negative(name: str, weights: Tensor) -> None:
    """Once per tensor and version: reading values makes the host wait for a CUDA device."""
    version = None if weights.is_inference() else weights._version
    if version is not None and _not_negative.get(weights) == version:
        return
    if (weights < 0).any():
        raise ValueError(
            f"{name}: expected values of at least 0, got {weights.min().item():g}: the Hessian would not be positive "
            "semi-definite"
        )
    _not_negative[weights] = version


def _check_columns(name: str, columns, prediction: Tensor) -> None:
    """What a registered function returned."""
    if not isinstance(columns, Tensor):
        raise TypeError(f"hessian_sqrt of {name}: expected a Tensor, got {type(columns).__name__}")
    if columns.dim() != prediction.dim() + 1 or columns.shape[1:] != prediction.shape:
        raise ValueError(
            f"hessian_sqrt of {name}: expected [V, *prediction.shape] with prediction {list(prediction.shape)}, got "
            f"{list(columns.shape)}"
        )
    if columns.dtype != prediction.dtype:
        raise TypeError(f"hessian_sqrt of {name}: expected {prediction.dtype} as the prediction, got {columns.dtype}")
    if columns.device != prediction.device:
        raise ValueError(
            f"hessian_sqrt of {name}: expected the prediction's device {prediction.device}, got {columns.device}"
        )
