"""How others tell a second-order quantity the Hessian of a loss, in BackPACK's way."""

from collections.abc import Callable

from torch import Tensor, nn

from backpack_cuda.extensions.module_extension import ModuleExtension
from backpack_cuda.extensions.second_order import SecondOrderExtension


class DiagGGNLoss(ModuleExtension):
    """The square root of a loss' Hessian at its first input, for any second-order quantity formed from columns.

    For a subclass of torch's losses: `ext.set_module_extension(MyLoss, MyDiagGGNLoss())`, with overwrite=True for one
    of torch's own. `backpack_cuda.curvature.register_loss` is the shorter way, for all quantities at once.

    Args:
        derivatives: an object with `sqrt_hessian(module, g_inp, g_out)` and `sqrt_hessian_sampled(module, g_inp, g_out,
            mc_samples=M)`, which return columns S [V, *input0] with sum_v S_vn S_vn^T the Hessian of the loss' value at
            sample n (of its expectation), for the value itself: g_out is not a factor of them. `module.input0`, ... are
            the loss' inputs meanwhile; the entries of g_inp are None, because they are not known yet. May be None where
            a subclass overrides `make_loss_hessian_func`.
    """

    def __init__(self, derivatives=None):
        super().__init__()
        self.derivatives = derivatives

    def make_loss_hessian_func(self, ext: SecondOrderExtension) -> Callable[..., Tensor]:
        """The function of (module, g_inp, g_out) that returns the columns for `ext`."""
        mc_samples = ext.get_num_mc_samples()
        if mc_samples == 0:
            return self.derivatives.sqrt_hessian

        def sampled(module: nn.Module, g_inp: tuple, g_out: tuple) -> Tensor:
            return self.derivatives.sqrt_hessian_sampled(module, g_inp, g_out, mc_samples=mc_samples)

        return sampled

    def backpropagate(self, ext: SecondOrderExtension, module: nn.Module, g_inp: tuple, g_out: tuple, bpQuantities):
        return self.make_loss_hessian_func(ext)(module, g_inp, g_out)
