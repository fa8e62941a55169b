"""Products with generalised Gauss-Newton matrices (Schraudolph 2002)."""

from torch import Tensor, nn

from backpack_cuda.hessianfree.checks import Tensors
from backpack_cuda.hessianfree.hvp import hessian_vector_product
from backpack_cuda.hessianfree.lop import L_op
from backpack_cuda.hessianfree.rop import R_op


def ggn_vector_product(loss: Tensor, output: Tensor, model: nn.Module, v: Tensors) -> tuple[Tensor, ...]:
    """The GGN of `loss` in all trainable parameters of `model`, times the vectors `v`.

    With the Jacobian J of `output` and the Hessian H of `loss` at `output` that is J^T H J v.

    Args:
        loss: a scalar that depends on the parameters through `output`.
        output: what the model returned.
        model: whose parameters with `requires_grad` are meant, in the order of `model.parameters()`.
        v: one vector for each of them, of its size.

    Returns:
        A vector for each of them, of its size, without a graph.

    Raises:
        TypeError: something else than tensors.
        ValueError: numbers or sizes that do not belong together.
    """
    return ggn_vector_product_from_plist(loss, output, [p for p in model.parameters() if p.requires_grad], v)


def ggn_vector_product_from_plist(loss: Tensor, output: Tensor, plist: Tensors, v: Tensors) -> tuple[Tensor, ...]:
    """`ggn_vector_product` for the given parameters, in their order."""
    tangents = R_op(output, plist, v)
    curved = hessian_vector_product(loss, output, tangents)
    return L_op(output, plist, curved)
