"""Kronecker-factored curvature: B (x) A for a weight, with B over its outputs and A over its inputs.

a_nr is the r-th of R input rows that the weight multiplies for sample n (positions of a sequence, patches of an image),
b_vnr column v of the curvature's square root at the outputs that belong to it. Three conventions for R > 1:

================ ========================================= ==========================================
convention       A                                         B
================ ========================================= ==========================================
"expand"         1/(N R) sum_nr a_nr a_nr^T                sum_vnr b_vnr b_vnr^T
"reduce"         1/N sum_n (mean_r a_nr) (mean_r a_nr)^T   sum_vn (sum_r b_vnr) (sum_r b_vnr)^T
"backpack"       1/N sum_nr a_nr a_nr^T                    sum_vn (sum_r b_vnr) (sum_r b_vnr)^T
================ ========================================= ==========================================

For R = 1 they agree (Martens & Grosse 2015). "expand" is KFC (Grosse & Martens 2016), "expand" and "reduce" are those
of Eschenhagen et al. (2023), and "backpack" is what BackPACK forms for convolutions; Linear layers with more input
dimensions, which BackPACK refuses, are expanded then. The factor of a mean reduction is in B alone.
"""

import warnings

from torch import Tensor

from backpack_cuda.extensions.backprop_extension import FAIL_ERROR, FAIL_WARN
from backpack_cuda.extensions.curvature import (
    BackpropStrategy,
    Curvature,
    ExpectationApproximation,
    LossHessianStrategy,
    one_of,
)
from backpack_cuda.extensions.second_order import Root, SecondOrderExtension, checked_mc_samples
from backpack_cuda.per_sample import ColumnUse, NoKroneckerFactors, moment

CONVENTIONS = ("backpack", "expand", "reduce")
FISHERS = ("mc", "empirical")


class KroneckerExtension(SecondOrderExtension):
    """A quantity that is a list of Kronecker factors; see the module's docstring for their definition."""

    curv_type = Curvature.GGN
    loss_hessian_strategy = LossHessianStrategy.EXACT
    backprop_strategy = BackpropStrategy.SQRT
    ea_strategy = ExpectationApproximation.BOTEV_MARTENS

    def __init__(self, savefield: str, root: Root, convention: str, fail_mode: str):
        super().__init__(savefield, root, fail_mode)
        self.convention = one_of("convention", convention, CONVENTIONS)

    @property
    def averages(self) -> bool:
        """Whether one matrix is pushed back rather than columns."""
        return self.backprop_strategy == BackpropStrategy.BATCH_AVERAGE

    def get_curv_type(self) -> str:
        """Which matrix is approximated, of `Curvature`."""
        return self.curv_type

    def get_loss_hessian_strategy(self) -> str:
        """How the loss' Hessian enters, of `LossHessianStrategy`."""
        return self.loss_hessian_strategy

    def get_backprop_strategy(self) -> str:
        """What is pushed back through the network, of `BackpropStrategy`."""
        return self.backprop_strategy

    def get_ea_strategy(self) -> str:
        """How the expectation over the samples is split, of `ExpectationApproximation`."""
        return self.ea_strategy

    def effective_convention(self, use: ColumnUse) -> str:
        """What "backpack" stands for at a use."""
        return "expand" if self.convention == "backpack" and not use.sums_positions else self.convention

    def input_factor(self, use: ColumnUse, name: str) -> Tensor | None:
        """A of a parameter; None for one with a single factor. May raise NoKroneckerFactors."""
        n, r = max(use.batch_size, 1), max(use.positions(), 1)
        convention = self.effective_convention(use)
        if convention == "reduce":
            sums = use.input_sums(name)  # [N, G * D]
            return None if sums is None else moment(sums, use.groups(name), 1.0 / (n * r * r))
        return use.input_moment(name, 1.0 / (n if convention == "backpack" else n * r))

    def output_factor(self, use: ColumnUse, name: str) -> Tensor:
        """B of a parameter, of some columns. May raise NoKroneckerFactors."""
        if self.effective_convention(use) == "expand":
            return use.output_moment(name)
        return use.summed_moment(name)

    def factors(self, use: ColumnUse, name: str) -> list[Tensor]:
        """[B, A] or [B]."""
        input = self.input_factor(use, name)
        output = self.output_factor(use, name)
        return [output] if input is None else [output, input]

    def quantity(self, factors: list[Tensor]) -> list[Tensor]:
        """The result to save."""
        return list(factors)

    def without_factors(self, module, reason: NoKroneckerFactors) -> None:
        """Called for a parameter that has no Kronecker factors."""
        sentence = (
            f"{type(self).__name__}: no Kronecker factors are known for {type(module).__name__}.{reason}; freeze the "
            f'parameter, or leave it without {self.savefield} by fail_mode="WARNING" or "SILENT"'
        )
        if self._fail_mode == FAIL_ERROR:
            raise NotImplementedError(sentence)
        if self._fail_mode == FAIL_WARN:
            warnings.warn(sentence, stacklevel=2)

    def _arguments(self) -> list[str]:
        given = super()._arguments()
        if self.convention != "backpack":
            given.append(f"convention={self.convention!r}")
        if self._fail_mode != FAIL_ERROR:
            given.append(f"fail_mode={self._fail_mode!r}")
        return given


class KFAC(KroneckerExtension):
    """Kronecker factors of the Fisher matrix, saved as `kfac`: `[B, A]` for a weight, `[B]` for a bias.

    The factors of a weight [O, I, *kernel] are B [O, O] and A [D, D] with D = I * prod(kernel), so that their Kronecker
    product B (x) A approximates the curvature of `weight.flatten()`. A layer with G groups has factors of each group,
    [G, O/G, O/G] and [G, D, D]; a transposed convolution those of `weight.transpose(0, 1)`; a one-dimensional parameter
    of any other module (a normalisation layer) a single one, its whole block.

    Float32 (float64 for float64 parameters), not shared with anything, writable.

    Args:
        mc_samples: the number of sampled columns.
        fisher: "mc" for targets that are drawn from the model's distribution (Martens & Grosse 2015), "empirical" for
            the ordinary gradients, of the same backward pass. A sample of weight w enters with w^2 then, not with w.
        convention: "backpack", "expand" or "reduce", for layers that apply their weight several times per sample.
        fail_mode: what happens at a parameter without known factors (that of an Embedding): "ERROR", "WARNING" or
            "SILENT"; in the latter two it gets no attribute.

    Raises:
        TypeError, ValueError: an argument that is none of these.
    """

    loss_hessian_strategy = LossHessianStrategy.SAMPLING

    def __init__(
        self, mc_samples: int = 1, *, fisher: str = "mc", convention: str = "backpack", fail_mode: str = FAIL_ERROR
    ):
        mc_samples = checked_mc_samples(mc_samples)
        self.fisher = one_of("fisher", fisher, FISHERS)
        super().__init__("kfac", Root("sampled", mc_samples), convention, fail_mode)

    def check_takes_module_extensions(self) -> None:
        super().check_takes_module_extensions()
        if self.fisher == "empirical":
            raise NotImplementedError(f"{self}: formed from the ordinary gradients, of which there are no columns")

    def empirical_scale(self, losses: list[tuple]) -> Tensor | float:
        """What sum_n g_n g_n^T, of the gradients of the samples' losses, is to be multiplied by.

        With a mean over R samples and the loss multiplied by c, each gradient contains c / R, B shall contain it once.

        Args:
            losses: (R, c) of every loss that the backward pass came through; None for a c of 1.
        """
        if len(losses) != 1:
            raise NotImplementedError(
                f"{self}: expected one loss of an extended module in the backward pass, got {len(losses)}: the "
                "empirical Fisher matrix is not defined for their sum; call extend(loss_function)"
            )
        ((normalisation, factor),) = losses
        return normalisation if factor is None else normalisation / factor

    def _arguments(self) -> list[str]:
        given = super()._arguments()
        return given if self.fisher == "mc" else ["fisher='empirical'", *given[1:]]


class KFLR(KroneckerExtension):
    """`KFAC` with all columns of the loss' Hessian (Botev et al. 2017), saved as `kflr`.

    Args:
        convention: as in `KFAC`.
        fail_mode: as in `KFAC`.

    Raises:
        ValueError: an argument that is none of these.
    """

    def __init__(self, *, convention: str = "backpack", fail_mode: str = FAIL_ERROR):
        super().__init__("kflr", Root("exact"), convention, fail_mode)
