"""Curvature products: callables that multiply vectors with the curvature block of one parameter.

`parameter.hmp(mat)`, with mat [V, *P] or [*P], is the product of that parameter's diagonal block of the curvature of
the loss l with each of the V vectors, of the size of `mat`. l is the loss that `backward()` is called on, including the
factor of a mean reduction; with several losses in one backward pass the products are those of their sum.

A product belongs to the backward pass that formed it: it does not change when the model is called again or when its
parameters are changed afterwards. It keeps the activations of the batch, and copies of the parameters that it needs, in
memory until it is dropped (`del parameter.hmp`, or the next backward pass with the quantity); where a segment is
checkpointed the model's graph as well.
"""

from backpack_cuda.extensions.second_order import Root, SecondOrderExtension

MODIFICATIONS = ("clip", "abs")


class ProductExtension(SecondOrderExtension):
    """A quantity that is a callable on every parameter."""

    def __init__(self, savefield: str):
        super().__init__(savefield, Root("product"))

    def check_takes_module_extensions(self) -> None:
        raise NotImplementedError(f"{self}: formed by differentiating twice, which needs nothing from a layer")

    def check_mixed_samples(self, module) -> None:
        """Nothing to refuse: a product is that of the whole batch, whatever the samples do to each other."""

    def _arguments(self) -> list[str]:
        return [f"savefield={self.savefield!r}"]


class HMP(ProductExtension):
    """Products with the Hessian of the loss, saved as `hmp`: [V, *P] -> [V, *P] or [*P] -> [*P].

    Of every parameter on any graph that torch can differentiate twice, also in a batch normalisation in train mode, and
    for any loss module, whether its Hessian is known or not. Not differentiable in the parameters, except inside of
    `backward(create_graph=True)`.

    Args:
        savefield: the attribute's name.
    """

    needs_loss_hessian = False
    needs_convex_loss = False

    def __init__(self, savefield: str = "hmp"):
        super().__init__(savefield)


class GGNMP(ProductExtension):
    """Products with the generalised Gauss-Newton matrix (Schraudolph 2002), saved as `ggnmp`; as `HMP` otherwise.

    Args:
        savefield: the attribute's name.
    """

    needs_convex_loss = False

    def __init__(self, savefield: str = "ggnmp"):
        super().__init__(savefield)


class PCHMP(ProductExtension):
    """Products with the positive-curvature Hessian (Dangel & Hennig 2019), saved as `pchmp`; as `HMP` otherwise.

    The Hessian is the GGN plus a term J_x^T diag(phi''(x) dl/dy) J_x for every elementwise function y = phi(x) between
    the parameters and the loss, with the Jacobian J_x of x. Here the entries of each diagonal are made non-negative
    first, which makes the matrix positive semi-definite. Defined for graphs whose other functions are linear or
    piecewise linear in what depends on a parameter, as `DiagHessian`; any other is an error that names it.

    Args:
        savefield: the attribute's name.
        modify: "clip" sets negative entries to zero, "abs" takes absolute values.

    Raises:
        ValueError: `modify` is neither.
    """

    def __init__(self, savefield: str = "pchmp", modify: str = "clip"):
        if modify not in MODIFICATIONS:
            raise ValueError(f"modify: expected one of {', '.join(MODIFICATIONS)}, got {modify!r}")
        super().__init__(savefield)
        self.modify = modify

    def get_modification_mode(self) -> str:
        """How negative residual curvature is made positive: "clip" or "abs"."""
        return self.modify

    def _arguments(self) -> list[str]:
        return [*super()._arguments(), f"modify={self.modify!r}"]
