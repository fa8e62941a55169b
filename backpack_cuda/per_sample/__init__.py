"""The kinds of per-sample gradients: what one use of a layer contributes to its parameters' gradients, per sample."""

from backpack_cuda.per_sample.averaged import AveragedColumns, AveragedUse
from backpack_cuda.per_sample.base import NoPerSampleGradients, Use
from backpack_cuda.per_sample.columns import (
    ColumnUse,
    ConvColumns,
    LinearColumns,
    LoopedColumns,
    NoKroneckerFactors,
    merge_columns,
    moment,
)
from backpack_cuda.per_sample.dense import DenseUse, LazyDenseUse, SummedUse
from backpack_cuda.per_sample.embedding import EmbeddingColumns, EmbeddingUse, Lookup
from backpack_cuda.per_sample.outer import BiasUse, ConvUse, LinearUse
from backpack_cuda.per_sample.parts import Part, PartsColumns, PartsUse

__all__ = [
    "AveragedColumns",
    "AveragedUse",
    "BiasUse",
    "ColumnUse",
    "ConvColumns",
    "ConvUse",
    "DenseUse",
    "EmbeddingColumns",
    "EmbeddingUse",
    "LazyDenseUse",
    "LinearColumns",
    "LinearUse",
    "Lookup",
    "LoopedColumns",
    "NoKroneckerFactors",
    "NoPerSampleGradients",
    "Part",
    "PartsColumns",
    "PartsUse",
    "SummedUse",
    "Use",
    "merge_columns",
    "moment",
]
