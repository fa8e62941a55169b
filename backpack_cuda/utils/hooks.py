"""A hook for where none is wanted."""

from backpack_cuda.context import no_op

__all__ = ["no_op"]
