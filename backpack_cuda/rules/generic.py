"""Every module with parameters that has no rule of its own: its backward, vectorised over the samples.

Right for modules that treat the samples of a batch independently of each other and draw no random numbers; any other
is recognised by its outputs (those of single samples must be those of the batch): a warning, and no result.
"""

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree as pytree

from backpack_cuda.capture import Observation, capturing, observe
from backpack_cuda.per_sample import LazyDenseUse, NoPerSampleGradients

# Modules that use their children's parameters without calling the children.
_WHOLE = (nn.MultiheadAttention,)

# Hooks that compute a module's weight from its parameters before each forward, without state or randomness.
_WEIGHT_HOOKS = (WeightNorm, BasePruningMethod)

# Largest difference, relative to the largest output, between a batch's output and its samples' own outputs.
_SAME = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def owned_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that `module`'s own forward uses: its direct ones and those of its parametrisations."""
    if isinstance(module, _WHOLE):
        return dict(module.named_parameters())
    owned = dict(module.named_parameters(recurse=False))
    if "parametrizations" in module._modules:
        owned.update(module.parametrizations.named_parameters(prefix="parametrizations"))
    return owned


def generic_forward(module: nn.Module, stock_forward: Callable, *args, **kwargs):
    """The forward of any module, prepared for quantities."""
    output = stock_forward(*args, **kwargs)
    if not capturing():
        return output
    parameters = {name: p for name, p in owned_parameters(module).items() if p.requires_grad}
    if not parameters:
        return output

    def form(observation: Observation, args: tuple, kwargs: dict, grad_outputs: tuple[Tensor, ...]) -> LazyDenseUse:
        def batch_grads() -> dict[str, Tensor]:
            samples = _Samples(module, stock_forward, args, kwargs, observation.positions)
            return samples.batch_grads(observation.parameters, grad_outputs)

        return LazyDenseUse(batch_grads)

    return observe(module, parameters, form, args, kwargs, output)


@contextlib.contextmanager
def _without_fused_recurrence(module: nn.Module):
    """Recurrent layers by torch's own operations: the libraries' fused ones fail under function transforms."""
    if not any(isinstance(part, nn.RNNBase) for part in module.modules()):
        yield
        return
    onednn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch._C._set_cudnn_enabled(cudnn)


class _Bare(nn.Module):
    """`module`'s forward without its hooks, but with those that compute its weight."""

    def __init__(self, module: nn.Module, forward: Callable):
        super().__init__()
        self.module = module
        self._forward = forward
        self._computed = {n: t for n, t in module.__dict__.items() if isinstance(t, Tensor) and t.grad_fn is not None}
        self._hooks = [h for h in module._forward_pre_hooks.values() if isinstance(h, _WEIGHT_HOOKS)]
        if self._computed and not self._hooks:
            raise NoPerSampleGradients(
                f"{type(module).__name__}: {', '.join(self._computed)} is computed from other parameters outside of "
                "the module's forward; express it with torch.nn.utils.parametrize"
            )

    def forward(self, *args, **kwargs):
        try:
            for hook in self._hooks:
                hook(self.module, args)
            return self._forward(*args, **kwargs)
        finally:
            self.module.__dict__.update(self._computed)


class _Samples:
    """A module's call on a batch, taken apart into calls on batches of one."""

    def __init__(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict, positions: list[int]):
        self._name = type(module).__name__
        self._bare = _Bare(module, forward)
        self._buffers = {f"module.{name}": buffer for name, buffer in module.named_buffers()}
        self._positions = positions  # of the differentiated tensors among the outputs' leaves
        self._leaves, self._structure = pytree.tree_flatten((args, kwargs))
        first = next((leaf for leaf in self._leaves if isinstance(leaf, Tensor)), None)
        self._batch_dim = 0 if getattr(module, "batch_first", True) else 1
        if first is None or first.dim() <= self._batch_dim:
            raise NoPerSampleGradients(f"{self._name}: per-sample gradients need an input with a batch dimension")
        self.batch_size = first.shape[self._batch_dim]
        recurrent = isinstance(module, nn.RNNBase)
        # The batch dimension of each input leaf; None for what is the same for every sample.
        self._dims = [
            self._input_dim(leaf, 1 if recurrent and leaf is not first else self._batch_dim) for leaf in self._leaves
        ]

    def _input_dim(self, leaf, dim: int) -> int | None:
        if isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == self.batch_size:
            return dim
        return None

    def _call(self, parameters: dict[str, Tensor], leaves: list) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The differentiated outputs for the given parameters and input leaves; and parameters and buffers after it."""
        state = {f"module.{name}": tensor for name, tensor in parameters.items()}
        state.update({name: buffer.clone() for name, buffer in self._buffers.items()})
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        outputs = pytree.tree_leaves(torch.func.functional_call(self._bare, state, args, kwargs))
        return [outputs[i] for i in self._positions], state

    def batch_grads(self, parameters: dict[str, nn.Parameter], grad_outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Per-sample gradients [N, *P] of the named parameters."""
        with _without_fused_recurrence(self._bare):
            return self._batch_grads(parameters, grad_outputs)

    def _batch_grads(self, parameters: dict[str, nn.Parameter], grad_outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        parameters = {n: p if torch.is_grad_enabled() else p.detach() for n, p in parameters.items()}
        if self.batch_size == 0:
            return {name: p.new_zeros(0, *p.shape) for name, p in parameters.items()}
        with torch.no_grad():
            outputs, state = self._call(parameters, self._leaves)
            if not all(torch.equal(state[name], buffer) for name, buffer in self._buffers.items()):
                raise NoPerSampleGradients(
                    f"{self._name}: its forward changes its buffers, so that the call cannot be repeated"
                )
            single, _ = self._call(parameters, [self._narrow(leaf, dim, 0) for leaf, dim in self._batched()])
        out_dims = [self._output_dim(o.shape, s.shape) for o, s in zip(outputs, single, strict=True)]

        def backward(samples: list[Tensor], grads: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
            left = iter(samples)
            leaves = [leaf if dim is None else next(left).unsqueeze(dim) for leaf, dim in self._batched()]
            found, vjp = torch.func.vjp(lambda p: self._call(p, leaves)[0], parameters)
            (gradients,) = vjp([g.unsqueeze(dim).to(o.dtype) for g, dim, o in zip(grads, out_dims, found, strict=True)])
            return gradients, found

        samples = [leaf.movedim(dim, 0) for leaf, dim in self._batched() if dim is not None]
        grads = [g.movedim(dim, 0) for g, dim in zip(grad_outputs, out_dims, strict=True)]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
                gradients, found = torch.vmap(backward)(samples, grads)
        except (RuntimeError, NotImplementedError, ValueError):  # no batching rule: one sample after the other
            results = [backward([s[n] for s in samples], [g[n] for g in grads]) for n in range(self.batch_size)]
            gradients = {name: torch.stack([g[name] for g, _ in results]) for name in parameters}
            found = [torch.stack(tensors) for tensors in zip(*[o for _, o in results], strict=True)]
        for output, sample_outputs, dim in zip(outputs, found, out_dims, strict=True):
            self._check_same(output, sample_outputs.squeeze(dim + 1).movedim(0, dim).detach())
        return gradients

    def _batched(self):
        return zip(self._leaves, self._dims, strict=True)

    @staticmethod
    def _narrow(leaf, dim: int | None, sample: int):
        return leaf if dim is None else leaf.narrow(dim, sample, 1)

    def _output_dim(self, whole: torch.Size, single: torch.Size) -> int:
        """The batch dimension of an output, from its size for the batch and for a batch of one."""
        for dim in range(len(single) if len(single) == len(whole) else 0):
            rest_is_equal = whole[:dim] == single[:dim] and whole[dim + 1 :] == single[dim + 1 :]
            if rest_is_equal and single[dim] == 1 and whole[dim] == self.batch_size:
                return dim
        raise NoPerSampleGradients(
            f"{self._name}: expected an output with one entry per sample, got size {list(whole)} for a batch of "
            f"{self.batch_size} and {list(single)} for one sample"
        )

    def _check_same(self, whole: Tensor, samples: Tensor) -> None:
        scale = whole.abs().amax().item() if whole.numel() else 0.0
        difference = (whole - samples).abs().nan_to_num(0.0).amax().item() if whole.numel() else 0.0
        if difference > _SAME[whole.dtype] * scale:
            raise NoPerSampleGradients(
                f"{self._name}: its output for a batch is not that of its samples one by one: it mixes the samples or "
                "draws random numbers, so that per-sample gradients do not exist or cannot be formed again"
            )
