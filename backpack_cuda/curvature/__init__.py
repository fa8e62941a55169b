"""Second order: square roots of curvature matrices, where they come from and what is made of them."""

from backpack_cuda.curvature.losses import register_loss

__all__ = ["register_loss"]
