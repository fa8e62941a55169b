"""First-order quantities: statistics of the per-sample gradients.

Throughout, l_n is sample n's contribution to the loss l = sum_n l_n that `backward()` is called on, INCLUDING the
factor 1/N of a mean reduction, and g_n [*P] is its gradient for one parameter. So the g_n sum to the ordinary gradient.
"""

import warnings
from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from backpack_cuda.extensions.backprop_extension import FirstOrderBackpropExtension
from backpack_cuda.stats import Stats, Want


class FirstOrderExtension(FirstOrderBackpropExtension):
    """A quantity that follows from statistics of the per-sample gradients; `want` names the statistics."""

    own = True
    want: int  # flags of `Want`

    @abstractmethod
    def quantity(self, stats: Stats, batch_size: int) -> Tensor:
        """The result from the statistics of a parameter's per-sample gradients."""

    def check_mixed_samples(self, module: nn.Module) -> None:
        """Called for a module in which the samples of a batch depend on each other: l is no sum of l_n there."""
        raise NotImplementedError(
            f"{type(self).__name__}: {type(module).__name__} in train mode mixes the samples of its batch, so that its "
            "per-sample gradients do not exist; call eval() on it"
        )


class BatchGrad(FirstOrderExtension):
    """Per-sample gradients g_n, saved as `grad_batch` [N, *P] in the parameter's type (autocast's under it).

    For a mean-reduced loss g_n = (1/N) grad f_n where f_n is sample n's own loss.

    Args:
        subsampling: indices of the samples to form gradients for (may repeat): `grad_batch` is then
            [len(subsampling), *P], with the same scaling. None for all samples.
    """

    want = Want.BATCH_GRAD

    def __init__(self, subsampling: Sequence[int] | None = None):
        super().__init__("grad_batch", subsampling=subsampling)

    def quantity(self, stats: Stats, batch_size: int) -> Tensor:
        return stats.batch_grad

    def check_mixed_samples(self, module: nn.Module) -> None:
        warnings.warn(
            f"BatchGrad: {type(module).__name__} in train mode mixes the samples of its batch; grad_batch holds the "
            "summands of the gradient, which are not gradients of the samples' losses",
            stacklevel=2,
        )


class BatchL2Grad(FirstOrderExtension):
    """Squared norms of the per-sample gradients, sum_p g_n[p]^2, saved per parameter as `batch_l2` [N].

    Float32 (float64 for float64 parameters). The squared norm over all parameters is the sum of the attributes.
    """

    want = Want.BATCH_L2

    def __init__(self):
        super().__init__("batch_l2")

    def quantity(self, stats: Stats, batch_size: int) -> Tensor:
        return stats.batch_l2


class SumGradSquared(FirstOrderExtension):
    """Second moment of the per-sample gradients, sum_n g_n^2, saved as `sum_grad_squared` [*P]; not divided by N.

    Float32 (float64 for float64 parameters).
    """

    want = Want.SUM_GRAD_SQUARED

    def __init__(self):
        super().__init__("sum_grad_squared")

    def quantity(self, stats: Stats, batch_size: int) -> Tensor:
        return stats.sum_grad_squared


class Variance(FirstOrderExtension):
    """Variance of the per-sample gradients, saved as `variance` [*P]: (1/N) sum_n (g_n - (1/N) sum_m g_m)^2.

    Float32 (float64 for float64 parameters); biased (1/N) and scaled like g_n^2, as BackPACK's. Never negative.

    Formed as a sum of squared deviations (Welford's update at each sample), so it does not cancel where the mean is
    large against the spread. The exception is a Linear layer with 2-d input: there the per-sample gradients are never
    formed, and the variance is the difference of two products, summed in short blocks. Where the mean is 100 times
    the spread it is within 1 % in float32 for batches of some thousand samples; its relative error grows with the
    square of that ratio.
    """

    want = Want.SUM_GRAD_CENTERED_SQUARED

    def __init__(self):
        super().__init__("variance")

    def quantity(self, stats: Stats, batch_size: int) -> Tensor:
        return stats.sum_grad_centered_squared / max(batch_size, 1)
