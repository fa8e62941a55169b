"""The kinds of per-sample gradients: what one use of a layer contributes to its parameters' gradients, per sample."""

from backpack_cuda.per_sample.base import NoPerSampleGradients, Use
from backpack_cuda.per_sample.dense import DenseUse, LazyDenseUse, SummedUse
from backpack_cuda.per_sample.outer import ConvUse, LinearUse

__all__ = ["ConvUse", "DenseUse", "LazyDenseUse", "LinearUse", "NoPerSampleGradients", "SummedUse", "Use"]
