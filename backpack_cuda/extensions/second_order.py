"""Second-order quantities: diagonals, square roots and Kronecker factors of the loss' curvature, block per parameter.

Throughout, l = sum_n l_n is the loss that `backward()` is called on, INCLUDING the factor of a mean reduction, f_n the
network's prediction for sample n, J_n [C, *P] its Jacobian for one parameter and H_n [C, C] the Hessian of l_n in f_n.
The generalised Gauss-Newton matrix (Schraudolph 2002) of l is sum_n J_n^T H_n J_n. With a square root
H_n = sum_v S_vn S_vn^T its columns J_n^T S_vn come from V backward passes through the graph.

"exact" quantities use all columns of H_n, "MC" ones M sampled columns with the same expectation: gradients of the loss
at targets drawn from the model's own distribution (Martens 2014). They are drawn from torch's global generator, once
per loss and M: quantities with the same M share their draws.
"""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backpack_cuda.extensions.backprop_extension import FAIL_ERROR, SecondOrderBackpropExtension
from backpack_cuda.stats import ColumnStats, ColumnWant


class Root(NamedTuple):
    """Which square root of the loss' Hessian a quantity is formed from; equal ones share one pass."""

    kind: str  # "exact" or "sampled"
    mc_samples: int = 0
    with_residuals: bool = False  # also the curvature of the functions before the prediction: the whole Hessian


def checked_mc_samples(value) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"mc_samples: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"mc_samples: expected at least 1, got {value}")
    return int(value)


class SecondOrderExtension(SecondOrderBackpropExtension):
    """A quantity that is formed from columns of the curvature's square root at the layers' outputs."""

    own = True
    root: Root
    needs_every_column = False  # also of those columns of the exact root that the sum of squares can do without
    per_sample = False  # whether the result has an entry for every sample
    needs_loss_hessian = True  # rather than the loss' graph alone
    needs_convex_loss = True  # also after its multiplication with a factor

    def __init__(
        self,
        savefield: str,
        root: Root,
        fail_mode: str = FAIL_ERROR,
        subsampling: Sequence[int] | None = None,
    ):
        super().__init__(savefield, fail_mode=fail_mode, subsampling=subsampling)
        self.root = root

    def check_takes_module_extensions(self) -> None:
        if self.root.with_residuals:
            raise NotImplementedError(
                f"{self}: a module extension would need the signs of its columns; backpack_cuda.register_layer makes a "
                "layer known to all quantities"
            )

    def get_num_mc_samples(self) -> int:
        """The number of sampled columns M; 0 where all columns are used."""
        return self.root.mc_samples

    def check_mixed_samples(self, module: nn.Module) -> None:
        """Called for a module in which the samples of a batch depend on each other: l is no sum of l_n there."""
        raise NotImplementedError(
            f"{type(self).__name__}: {type(module).__name__} in train mode mixes the samples of its batch, so that the "
            "curvature is no sum over samples; call eval() on it"
        )

    def check_reached(self, layers: Collection) -> None:
        """Called with all that a backward pass is asked for between a loss and the leaves of its graph."""
        if not layers:
            raise RuntimeError(
                f"{self}: the backward pass reaches no parameter of an extended layer from the loss; call "
                "extend(model) before the forward pass, run that outside of disable() and no_grad(), and ask for the "
                "gradient of a parameter that is not frozen"
            )

    def _arguments(self) -> list[str]:
        return [f"mc_samples={self.root.mc_samples}"] if self.root.mc_samples else []

    def __repr__(self) -> str:
        arguments = self._arguments()
        if self.get_subsampling() is not None:
            arguments.append(f"subsampling={self.get_subsampling()}")
        return f"{type(self).__name__}({', '.join(arguments)})"


class ColumnExtension(SecondOrderExtension):
    """A quantity that follows from the `ColumnStats` of a parameter."""

    want: int  # flags of `ColumnWant`

    @abstractmethod
    def update(self, result, stats: ColumnStats, begin: int, total: int):
        """The result so far (None at first) and the statistics of columns [begin, ...) of `total`, combined."""

    def quantity(self, result) -> Tensor:
        """The result to save."""
        return result

    def _check_samples(self, first: int, second: int) -> None:
        """For quantities with a sample dimension, to which several losses contribute."""
        if first != second:
            raise ValueError(
                f"{self}: the losses of one backward pass see {first} and {second} samples: which belong together is "
                "unknown; call backward() for each loss"
            )


class _Diagonal(ColumnExtension):
    want = ColumnWant.DIAG

    def update(self, result, stats: ColumnStats, begin: int, total: int) -> Tensor:
        return stats.diag if result is None else result + stats.diag


class _BatchDiagonal(ColumnExtension):
    want = ColumnWant.BATCH_DIAG
    per_sample = True

    def update(self, result, stats: ColumnStats, begin: int, total: int) -> Tensor:
        if result is None:
            return stats.batch_diag
        self._check_samples(len(result), len(stats.batch_diag))
        return result + stats.batch_diag  # not in place: other quantities may hold the same statistics


class _SquareRoot(ColumnExtension):
    want = ColumnWant.FACTOR
    per_sample = True

    def update(self, result, stats: ColumnStats, begin: int, total: int) -> list[Tensor]:
        factor = stats.factor  # [V_c, N, *P]
        result = [] if result is None else result  # one entry per loss
        if result:
            self._check_samples(result[0].shape[1], factor.shape[1])
        if len(factor) == total:
            result.append(factor)
        elif torch.is_grad_enabled():
            if begin:
                result[-1] = torch.cat((result[-1], factor))
            else:
                result.append(factor)
        else:  # in place, so that the columns are not held twice
            if not begin:
                result.append(factor.new_empty(total, *factor.shape[1:]))
            result[-1][begin : begin + len(factor)] = factor
        return result

    def quantity(self, result: list[Tensor]) -> Tensor:
        return result[0] if len(result) == 1 else torch.cat(result)


class DiagGGNExact(_Diagonal):
    """Diagonal of the generalised Gauss-Newton matrix, saved as `diag_ggn_exact` [*P].

    Float32 (float64 for float64 parameters). With a mean-reduced loss it contains the factor 1/N once.
    """

    def __init__(self):
        super().__init__("diag_ggn_exact", Root("exact"))


class DiagGGNMC(_Diagonal):
    """`DiagGGNExact` from `mc_samples` sampled columns, saved as `diag_ggn_mc` [*P]; unbiased.

    Raises:
        TypeError, ValueError: `mc_samples` is not a positive int.
    """

    def __init__(self, mc_samples: int = 1):
        super().__init__("diag_ggn_mc", Root("sampled", checked_mc_samples(mc_samples)))


class BatchDiagGGNExact(_BatchDiagonal):
    """Diagonal of each sample's term J_n^T H_n J_n, saved as `diag_ggn_exact_batch` [N, *P].

    Float32 (float64 for float64 parameters). The terms sum to `DiagGGNExact`: they contain the factor 1/N of a
    mean-reduced loss.
    """

    def __init__(self):
        super().__init__("diag_ggn_exact_batch", Root("exact"))


class BatchDiagGGNMC(_BatchDiagonal):
    """`BatchDiagGGNExact` from `mc_samples` sampled columns, saved as `diag_ggn_mc_batch` [N, *P]; unbiased.

    Raises:
        TypeError, ValueError: `mc_samples` is not a positive int.
    """

    def __init__(self, mc_samples: int = 1):
        super().__init__("diag_ggn_mc_batch", Root("sampled", checked_mc_samples(mc_samples)))


class SqrtGGNExact(_SquareRoot):
    """Columns J_n^T S_vn of the GGN's square root, saved as `sqrt_ggn_exact` [C, N, *P].

    They are of the parameter's type (autocast's under it). The GGN is the sum over (c, n) of their outer products. C is
    the number of the loss' columns: classes for `CrossEntropyLoss` (times the extra dims' size), features for `MSELoss`
    and `BCEWithLogitsLoss`.

    Args:
        subsampling: indices of the samples to form columns for (may repeat): N is then their number, the scaling is
            that of the whole batch. None for all samples.
    """

    needs_every_column = True

    def __init__(self, subsampling: Sequence[int] | None = None):
        super().__init__("sqrt_ggn_exact", Root("exact"), subsampling=subsampling)


class SqrtGGNMC(_SquareRoot):
    """`SqrtGGNExact` from sampled columns, saved as `sqrt_ggn_mc` [M, N, *P]; their expected outer products are equal.

    Args:
        mc_samples: the number of columns M.
        subsampling: as in `SqrtGGNExact`.

    Raises:
        TypeError, ValueError: `mc_samples` is not a positive int.
    """

    def __init__(self, mc_samples: int = 1, subsampling: Sequence[int] | None = None):
        super().__init__("sqrt_ggn_mc", Root("sampled", checked_mc_samples(mc_samples)), subsampling=subsampling)


class DiagHessian(_Diagonal):
    """Diagonal of the Hessian of the loss, saved as `diag_h` [*P]; float32 (float64 for float64 parameters).

    Exact for networks whose functions between the layers are linear, piecewise linear (ReLU, max pooling) or
    elementwise; anything else in the path of a parameter (attention, normalisation layers) is an error that names it.
    Every elementwise function that is not piecewise linear costs as many columns as a sample has entries there.
    """

    def __init__(self):
        super().__init__("diag_h", Root("exact", with_residuals=True))


class BatchDiagHessian(_BatchDiagonal):
    """`DiagHessian` of each sample's loss l_n, saved as `diag_h_batch` [N, *P]; the terms sum to `DiagHessian`."""

    def __init__(self):
        super().__init__("diag_h_batch", Root("exact", with_residuals=True))
