"""Low-level calls: statistics of per-sample gradients from a layer's saved input and output gradient.

For sample n of a batch the gradient of a weight is G_n = sum_t grad_output[n, t, :] input[n, t, :]^T, a short sum
of outer products. Each `*_grad_stats` call forms any of these in ONE pass over the two operands:

==================== ============== ===========================================
name in `want`       shape          value
==================== ============== ===========================================
"grad"               [*weight]      sum_n G_n, the ordinary gradient
"batch_grad"         [N, *weight]   G_n
"batch_l2"           [N]            sum of the squared entries of G_n
"sum_grad_squared"   [*weight]      sum_n G_n^2, entry by entry
==================== ============== ===========================================

and each `*_weighted_grad` call sum_n weights[n] G_n. The `*_kron_factor` calls take one operand and sum its outer
products with itself.

Second order asks for V output gradients of every sample at once, `columns` [V, N, ...], the columns of a square root of
a curvature matrix at the layer's output. Of their per-sample gradients G_vn each `*_column_stats` call forms any of

==================== ================ ===========================================
name in `want`       shape            value
==================== ================ ===========================================
"factor"             [V, N, *weight]  G_vn
"batch_diag"         [N, *weight]     sum_v signs[v, n] G_vn^2, entry by entry
"diag"               [*weight]        sum_vn signs[v, n] G_vn^2, entry by entry
==================== ================ ===========================================

with all `signs` 1 unless they are given.

Nothing is rescaled: with a mean-reduced loss, grad_output (and so G_n) contains the factor 1/N.

Operands: float32, float64, bfloat16 or float16, any strides. "grad", "batch_grad", "factor" and weighted sums have the
operands' type; the other results are float32 (float64 for float64). N = 0, T = 0 and V = 0 give zeros. NaN and Inf
propagate. Operands that require grad under grad mode give differentiable results.

Precision. bfloat16 and float16 operands are multiplied exactly and summed in float32; squares are taken before
anything is rounded. (On a GPU "sum_grad_squared" of 2-d Linear operands of these types is the exception: there squares
are multiplied, each rounded to 11 bits.) The CPU computes float32 in float32. On a GPU, float32 operands obey
`torch.set_float32_matmul_precision`, as PyTorch's own matrix products do:

* "highest" (PyTorch's default): each operand is split into TF32 terms, three of whose products are summed on the tensor
  cores; as accurate as float32 arithmetic. An operand that is Inf gives NaN where float32 arithmetic may give Inf.
* "high" and "medium" (the same here): one product of operands rounded to TF32, with relative errors of about 5e-4 per
  product, and sums in float32.

Two things on a GPU go through PyTorch itself: float64 operands (but for `outer_norm`), with per-sample gradients formed
chunk by chunk; and "grad" on its own, as no statistic rides along with it. The latter is cuBLAS's or cuDNN's gradient,
and for convolutions cuDNN obeys `torch.backends.cudnn.allow_tf32`, which is on by default.
"""

from backpack_cuda.ops import fake  # noqa: F401 (registers the fake kernels)
from backpack_cuda.ops.column_stats import (
    ColumnStats,
    bias_column_stats,
    conv_column_stats,
    conv_transpose_column_stats,
    linear_column_stats,
)
from backpack_cuda.ops.grad_stats import (
    GradStats,
    bias_grad_stats,
    conv_grad_stats,
    conv_transpose_grad_stats,
    linear_grad_stats,
    outer_norm,
)
from backpack_cuda.ops.kron_factor import conv_kron_factor, conv_transpose_kron_factor, linear_kron_factor
from backpack_cuda.ops.weighted_grad import (
    bias_weighted_grad,
    conv_transpose_weighted_grad,
    conv_weighted_grad,
    linear_weighted_grad,
)

__all__ = [
    "ColumnStats",
    "GradStats",
    "bias_column_stats",
    "bias_grad_stats",
    "bias_weighted_grad",
    "conv_column_stats",
    "conv_grad_stats",
    "conv_kron_factor",
    "conv_transpose_column_stats",
    "conv_transpose_grad_stats",
    "conv_transpose_kron_factor",
    "conv_transpose_weighted_grad",
    "conv_weighted_grad",
    "linear_column_stats",
    "linear_grad_stats",
    "linear_kron_factor",
    "linear_weighted_grad",
    "outer_norm",
]
