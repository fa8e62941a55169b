"""Products with Jacobians, Hessians and generalised Gauss-Newton matrices of any graph, by differentiation alone.

Nothing here needs `extend` or `backpack`. The matrices are those of all given parameters together, with the blocks
between different ones; `HMP` and `GGNMP` of `backpack_cuda.extensions` are faster for the blocks of single parameters.
"""

from backpack_cuda.hessianfree.ggnvp import ggn_vector_product, ggn_vector_product_from_plist
from backpack_cuda.hessianfree.hvp import hessian_vector_product
from backpack_cuda.hessianfree.lop import L_op, transposed_jacobian_vector_product
from backpack_cuda.hessianfree.rop import R_op, jacobian_vector_product

__all__ = [
    "L_op",
    "R_op",
    "ggn_vector_product",
    "ggn_vector_product_from_plist",
    "hessian_vector_product",
    "jacobian_vector_product",
    "transposed_jacobian_vector_product",
]
