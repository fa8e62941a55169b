"""torch.nn.Embedding."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backpack_cuda.capture import apply_layer, capturing
from backpack_cuda.context import is_sweeping
from backpack_cuda.passes import register
from backpack_cuda.per_sample import EmbeddingColumns, EmbeddingUse, Lookup, Use
from backpack_cuda.rules.generic import generic_forward
from backpack_cuda.rules.layer import has_plain_parameters


class EmbeddingOperation:
    """input [N, *] of tokens below E, weight [E, H] -> [N, *, H].

    With `scale_grad_by_freq`, by which torch divides the gradient of a row by the token's count in the whole batch,
    per-sample gradients are divided, too. Curvature is that of the loss, on which this has no influence.
    """

    def __init__(
        self,
        num_embeddings: int,
        padding_idx: int | None,
        max_norm: float | None,
        norm_type: float,
        scale_grad_by_freq: bool,
        sparse: bool,
    ):
        self._num_embeddings = num_embeddings
        self._padding_idx = padding_idx
        self._scale_grad_by_freq = scale_grad_by_freq
        self._sparse = sparse
        self._settings = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)

    def forward(self, input: Tensor, weight: Tensor, bias: None) -> Tensor:
        return F.embedding(input, weight, *self._settings)

    def to_save(self, input: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Tensor, None]:
        return input, None

    def backward(
        self, grad_output: Tensor, input: Tensor, weight: None, needs: Sequence[bool]
    ) -> tuple[None, Tensor | None, None]:
        if not needs[1]:
            return None, None, None
        padding_idx = -1 if self._padding_idx is None else self._padding_idx
        # What passes through a graph for the curvature is differentiated again, and no gradient of the loss.
        scale, sparse = (False, False) if is_sweeping() else (self._scale_grad_by_freq, self._sparse)
        grad = torch.ops.aten.embedding_backward(grad_output, input, self._num_embeddings, padding_idx, scale, sparse)
        return None, grad, None

    def use(self, input: Tensor, grad_output: Tensor) -> Use:
        scale = None
        if self._scale_grad_by_freq:
            tokens = input.reshape(-1)
            count = torch.zeros(self._num_embeddings, dtype=torch.long, device=input.device)
            count = count.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.long))  # [E]
            scale = count.double().reciprocal()  # of a token that occurs; infinite for others
        return EmbeddingUse(self._lookup(input, scale), grad_output, self._sparse)

    def use_of_squares(self, input: Tensor, grad_output: Tensor) -> Use:
        return EmbeddingUse(self._lookup(input), grad_output)

    def columns(self, input: Tensor, columns: Tensor) -> EmbeddingColumns:
        return EmbeddingColumns(self._lookup(input), columns)

    def original_input(self, input: Tensor) -> Tensor:
        return input

    def _lookup(self, input: Tensor, scale: Tensor | None = None) -> Lookup:
        return Lookup(input, self._num_embeddings, self._padding_idx, scale)


# Layers that are alike share one operation; a layer's settings may be changed between forward passes.
_operation = lru_cache(maxsize=None)(EmbeddingOperation)


def embedding_forward(module: nn.Embedding, stock_forward: Callable, input: Tensor) -> Tensor:
    """`module`'s forward, prepared for quantities; a single token is a batch of one."""
    if not capturing(input):
        return stock_forward(input)
    if not has_plain_parameters(module):
        return generic_forward(module, stock_forward, input)
    weight = module.weight
    if not weight.requires_grad:
        return stock_forward(input)
    e, padding_idx = weight.shape[0], module.padding_idx
    operation = _operation(
        e,
        padding_idx if padding_idx is None else padding_idx % e,
        module.max_norm,
        module.norm_type,
        module.scale_grad_by_freq,
        module.sparse,
    )
    # Not by run_layer: autocast leaves an embedding in the type of its weight.
    output = apply_layer(input.unsqueeze(0) if input.dim() == 0 else input, weight, None, module, operation)
    register(output, (weight,))
    return output.squeeze(0) if input.dim() == 0 else output
