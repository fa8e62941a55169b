"""The kinds of per-sample gradients: what one use of a layer contributes to its parameters' gradients, per sample."""

from backpack_cuda.per_sample.base import NoPerSampleGradients, Use
from backpack_cuda.per_sample.dense import DenseUse, LazyDenseUse, SummedUse
from backpack_cuda.per_sample.outer import BiasUse, ConvUse, LinearUse

__all__ = ["BiasUse", "ConvUse", "DenseUse", "LazyDenseUse", "LinearUse", "NoPerSampleGradients", "SummedUse", "Use"]
