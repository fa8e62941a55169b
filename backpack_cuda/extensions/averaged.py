"""Kronecker factors from one matrix that is averaged over the samples on its way back, and the family around them.

With mat [D, D] at a tensor of D features per sample, and J_n the Jacobian of what follows that tensor,

    mat <- (1/N) sum_n J_n^T mat J_n,    starting from sum_n H_n, the loss' Hessians at the prediction

(Botev et al. 2017). A step leads from a tensor to the next one that every path of the graph passes: a function in a
chain of them is a step of its own, a block with a skip connection one step, of its whole Jacobian. Within a branch the
same holds for the functions there, from where the branch joins the others.
"""

from abc import ABCMeta
from numbers import Integral

from torch import Tensor

from backpack_cuda.extensions.backprop_extension import FAIL_ERROR
from backpack_cuda.extensions.curvature import (
    BackpropStrategy,
    Curvature,
    ExpectationApproximation,
    LossHessianStrategy,
    one_of,
)
from backpack_cuda.extensions.kronecker import KFAC, KFLR, KroneckerExtension
from backpack_cuda.extensions.second_order import Root, checked_mc_samples
from backpack_cuda.per_sample import ColumnUse


class HBP(KroneckerExtension, metaclass=ABCMeta):
    """Kronecker-factored curvature with every choice: `[B, A]` for a weight, `[B]` for a bias, saved as `hbp`.

    `KFAC`, `KFLR` and `KFRA` are choices of it:

    ======== ========= ===================== ================= =============
    quantity curv_type loss_hessian_strategy backprop_strategy ea_strategy
    ======== ========= ===================== ================= =============
    `KFAC`   GGN       SAMPLING              SQRT              BOTEV_MARTENS
    `KFLR`   GGN       EXACT                 SQRT              BOTEV_MARTENS
    `KFRA`   GGN       SUM                   BATCH_AVERAGE     BOTEV_MARTENS
    ======== ========= ===================== ================= =============

    Factors are float32 (float64 for float64 parameters), writable, and each in memory of its own.

    Args:
        curv_type: of `extensions.curvature.Curvature`. Other than GGN only with BATCH_AVERAGE: every elementwise
            function y = phi(x) adds sum_n phi''(x_n) dl/dy_n to the diagonal of the matrix at x, as it is (HESSIAN), as
            absolute values (PCH_ABS) or without the negative ones (PCH_CLIP).
        loss_hessian_strategy: of `extensions.secondorder.hbp.LossHessianStrategy`. EXACT and SUM are the same with
            BATCH_AVERAGE; SUM is no choice with SQRT.
        backprop_strategy: of `extensions.secondorder.hbp.BackpropStrategy`.
        ea_strategy: of `extensions.secondorder.hbp.ExpectationApproximation`. With CHEN, A is that of the mean of the
            inputs over the samples, a batch of one.
        savefield: name of the attribute.
        mc_samples: the number of columns for SAMPLING.
        convention: as in `KFAC`.
        fail_mode: as in `KFAC`.
        memory_limit: as in `KFRA`.

    Attributes:
        memory_needed: as of `KFRA`.

    Raises:
        TypeError, ValueError: an argument that is none of these, or a combination that is not defined.
    """

    def __init__(
        self,
        curv_type: str,
        loss_hessian_strategy: str,
        backprop_strategy: str,
        ea_strategy: str,
        savefield: str = "hbp",
        *,
        mc_samples: int = 1,
        convention: str = "backpack",
        fail_mode: str = FAIL_ERROR,
        memory_limit: int | None = None,
    ):
        self.curv_type = one_of("curv_type", curv_type, Curvature.CHOICES)
        self.loss_hessian_strategy = one_of("loss_hessian_strategy", loss_hessian_strategy, LossHessianStrategy.CHOICES)
        self.backprop_strategy = one_of("backprop_strategy", backprop_strategy, BackpropStrategy.CHOICES)
        self.ea_strategy = one_of("ea_strategy", ea_strategy, ExpectationApproximation.CHOICES)
        if not self.averages and loss_hessian_strategy == LossHessianStrategy.SUM:
            raise ValueError(
                f"loss_hessian_strategy: expected {LossHessianStrategy.EXACT!r} or {LossHessianStrategy.SAMPLING!r} "
                f"with backprop_strategy {backprop_strategy!r}, which needs columns; got {loss_hessian_strategy!r}"
            )
        if not self.averages and curv_type != Curvature.GGN:
            raise ValueError(
                f"curv_type: expected {Curvature.GGN!r} with backprop_strategy {backprop_strategy!r}, which pushes "
                f"no second derivatives of the network; got {curv_type!r}"
            )
        if memory_limit is not None:
            if isinstance(memory_limit, bool) or not isinstance(memory_limit, Integral):
                raise TypeError(f"memory_limit: expected an int, a number of bytes, or None, got {memory_limit!r}")
            if memory_limit < 0:
                raise ValueError(f"memory_limit: expected at least 0 bytes, got {memory_limit}")
        self.memory_limit = memory_limit
        self.memory_needed: int | None = None
        samples = loss_hessian_strategy == LossHessianStrategy.SAMPLING
        root = Root("sampled", checked_mc_samples(mc_samples)) if samples else Root("exact")
        super().__init__(savefield, root, convention, fail_mode)

    def check_takes_module_extensions(self) -> None:
        super().check_takes_module_extensions()
        if self.averages:
            raise NotImplementedError(
                f"{self}: one matrix is pushed back, of which a module extension gets no columns; "
                "backpack_cuda.register_layer makes a layer known to all quantities"
            )

    def input_factor(self, use: ColumnUse, name: str) -> Tensor | None:
        averaged = self.ea_strategy == ExpectationApproximation.CHEN
        return super().input_factor(use.with_mean_input(name) if averaged else use, name)

    def _choices(self) -> list[str]:
        """The positional arguments, for `repr`."""
        choices = (self.curv_type, self.loss_hessian_strategy, self.backprop_strategy, self.ea_strategy)
        return [*map(repr, choices), f"savefield={self.savefield!r}"]

    def _arguments(self) -> list[str]:
        limit = [] if self.memory_limit is None else [f"memory_limit={self.memory_limit}"]
        return [*self._choices(), *super()._arguments(), *limit]


class KFRA(HBP):
    """`KFLR` with a matrix that is averaged over the samples after every step back (Botev et al. 2017), as `kfra`.

    `[B, A]` for a weight, `[B]` for a bias, as of `KFAC`. The cost does not grow with the number of classes, but the
    matrices do with the square of a sample's features D: a tensor [N, 64, 32, 32] stands for one of 16 GiB. What a pass
    will take is computed from the sizes alone, before anything is allocated.

    The factor B of a Linear layer is mat at its output, summed over equal positions if there are several; that of a
    convolution is summed over both positions (convention "backpack"; as "expand" and "reduce" in `KFAC`). A parameter
    with a single factor, of any other module, has its block (1/N) sum_n J_n^T mat J_n. For one sample all of this is
    `KFLR`.

    Args:
        memory_limit: bytes that matrices and temporary tensors may take at a time, beside the results; None for a
            quarter of the free memory, at most 8 GiB.
        convention: as in `KFAC`.
        fail_mode: as in `KFAC`.

    Attributes:
        memory_needed: bytes that the last pass took at most, or would have taken; None before the first one. What
            torch's own operations allocate inside is not counted.

    Raises:
        TypeError, ValueError: an argument that is none of these.
        ValueError: in the backward pass, before the memory is taken: more than the limit is needed.
        NotImplementedError: in the backward pass: a parameter is used several times.
    """

    def __init__(self, memory_limit: int | None = None, *, convention: str = "backpack", fail_mode: str = FAIL_ERROR):
        super().__init__(
            Curvature.GGN,
            LossHessianStrategy.SUM,
            BackpropStrategy.BATCH_AVERAGE,
            ExpectationApproximation.BOTEV_MARTENS,
            savefield="kfra",
            convention=convention,
            fail_mode=fail_mode,
            memory_limit=memory_limit,
        )

    def _choices(self) -> list[str]:
        return []


# Choices of it, so that isinstance() and CTX.is_extension_active() find them under this name, as in BackPACK.
HBP.register(KFAC)
HBP.register(KFLR)
