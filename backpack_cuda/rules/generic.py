"""Every module with parameters that has no rule of its own: its backward, vectorised over the samples.

Right for modules that treat the samples of a batch independently of each other and draw no random numbers; any other
is recognised (outputs and gradients of single samples must add up to those of the batch): a warning, and no result.
"""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from backpack_cuda.capture import Observation, capturing, observe
from backpack_cuda.context import authoring
from backpack_cuda.per_sample import LazyDenseUse, NoPerSampleGradients
from backpack_cuda.rules.registered import registered_gradients, registration_for
from backpack_cuda.rules.twin import apart_from_other_threads, weight_hooks
from backpack_cuda.stored import is_stored

# Modules that use their children's parameters without calling the children.
_WHOLE = (nn.MultiheadAttention,)

# Largest difference, relative to the largest output, between a batch's output and its samples' own outputs.
_SAME = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def _rounded_to(dtype: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """The type that has rounded a result of type `dtype`, of a call under `autocast`, which leaves float64 alone."""
    return dtype if autocast is None or dtype == torch.float64 else max(autocast, dtype, key=_SAME.__getitem__)


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

    registration = registration_for(module)

    def form(observation: Observation, args: tuple, kwargs: dict, grad_outputs: tuple[Tensor, ...]) -> LazyDenseUse:
        def batch_grads() -> dict[str, Tensor]:
            if registration is not None:

                def totals() -> dict[str, Tensor]:
                    samples = _Samples(module, stock_forward, args, kwargs, observation.positions)
                    return samples.total_grads(observation.parameters, grad_outputs, observation.autocast)

                return registered_gradients(
                    registration, module, observation.parameters, args, kwargs, grad_outputs, totals
                )
            samples = _Samples(module, stock_forward, args, kwargs, observation.positions)
            return samples.batch_grads(observation.parameters, grad_outputs, observation.autocast)

        return LazyDenseUse(batch_grads)

    def find_batch(
        observation: Observation, args: tuple, kwargs: dict, shapes: Sequence[torch.Size]
    ) -> tuple[list[int], int]:
        samples = _Samples(module, stock_forward, args, kwargs, observation.positions)
        return samples.output_dims(observation.parameters, shapes, observation.autocast), samples.batch_size

    return observe(module, parameters, form, args, kwargs, output, find_batch=find_batch)


@contextlib.contextmanager
def without_fused_recurrence(module: nn.Module):
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


@contextlib.contextmanager
def _without_saved_tensor_hooks():
    """Function transforms refuse to run inside hooks like those of torch.autograd.graph.save_on_cpu()."""
    hooks = []
    while hook := torch._C._autograd._top_saved_tensors_default_hooks(True):
        torch._C._autograd._pop_saved_tensors_default_hooks()
        hooks.append(hook)
    try:
        yield
    finally:
        for hook in reversed(hooks):
            torch._C._autograd._push_saved_tensors_default_hooks(*hook)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's attributes that are tensors, but neither parameters nor buffers, such as computed weights."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}


class _Bare(nn.Module):
    """`module`'s forward without its hooks, but with those that compute its weight."""

    def __init__(self, module: nn.Module, forward: Callable):
        super().__init__()
        self.module = module
        self._forward = forward
        self._computed = {
            name: value
            for name, value in module.__dict__.items()
            if isinstance(value, Tensor) and value.grad_fn is not None and not is_stored(name)
        }
        self._hooks = weight_hooks(module)
        if self._computed and not self._hooks:
            raise NoPerSampleGradients(
                f"{type(module).__name__}: {', '.join(self._computed)} is computed from other parameters outside of "
                "the module's forward; express it with torch.nn.utils.parametrize"
            )

    def __call__(self, *args, **kwargs):  # without the hooks that are registered for all modules
        return self.forward(*args, **kwargs)

    def forward(self, *args, **kwargs):
        try:
            for hook in self._hooks:
                hook(self.module, args)
            return self._forward(*args, **kwargs)
        finally:
            self.module.__dict__.update(self._computed)


def _not_channels_last(leaf):
    """torch's group_norm on the CPU crashes in its backward where an input in that layout needs no gradient."""
    if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.dim() in (4, 5) and leaf.layout == torch.strided:
        return leaf.contiguous()
    return leaf


class _Samples:
    """A module's call on a batch, taken apart into calls on batches of one."""

    def __init__(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict, positions: list[int]):
        self._name = type(module).__name__
        self._bare = _Bare(*apart_from_other_threads(module, forward))
        self._owned = owned_parameters(module)
        self._buffers = {f"module.{name}": b for name, b in module.named_buffers(remove_duplicate=False)}
        self._find_shared()
        self._positions = positions  # of the differentiated tensors among the outputs' leaves
        batch_dim = 0 if getattr(module, "batch_first", True) else 1
        dims = None
        if isinstance(module, nn.MultiheadAttention):
            bound = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs)
            args, kwargs = (), {name: value for name, value in bound.arguments.items() if name != "self"}
            by_name = {"query": batch_dim, "key": batch_dim, "value": batch_dim, "key_padding_mask": 0}
            dims = [by_name.get(name) if isinstance(value, Tensor) else None for name, value in kwargs.items()]
        self._leaves, self._structure = pytree.tree_flatten((args, kwargs))
        self._leaves = [_not_channels_last(leaf) for leaf in self._leaves]
        first = next((leaf for leaf in self._leaves if isinstance(leaf, Tensor)), None)
        if first is None or first.dim() <= batch_dim:
            raise NoPerSampleGradients(f"{self._name}: per-sample gradients need an input with a batch dimension")
        self.batch_size = first.shape[batch_dim]
        recurrent = isinstance(module, nn.RNNBase)  # states have the batch in dimension 1
        # The batch dimension of each input leaf; None for what is the same for every sample.
        self._dims = dims or [
            self._input_dim(leaf, 1 if recurrent and leaf is not first else batch_dim) for leaf in self._leaves
        ]

    def _find_shared(self) -> None:
        """All names of the module's own parameters, and the children that have some of them, too."""
        module, own = self._bare.module, {id(p) for p in self._owned.values()}
        named = module.named_parameters(remove_duplicate=False)
        self._places = {name: p for name, p in named if id(p) in own}
        self._sharing = []
        if not isinstance(module, _WHOLE):
            for name, part in module.named_modules():
                is_own = part is module or "parametrizations" in name.split(".")
                if not is_own and any(id(p) in own for p in owned_parameters(part).values()):
                    self._sharing.append(part)

    @contextlib.contextmanager
    def _children_apart(self, detached: bool) -> Iterator[None]:
        """While the forward of a child runs that shares a parameter, that is itself: this use is the child's.

        `detached`: it is a constant there.
        """
        paths = [name.rpartition(".") for name in self._places]
        holders = [(self._bare.module.get_submodule(path)._parameters, name) for path, _, name in paths]
        values = [p.detach() if detached else p for p in self._places.values()]

        def run(part: nn.Module, forward: Callable, *args, **kwargs):
            replaced = [held[name] for held, name in holders]
            computed = _tensors(part)
            for (held, name), value in zip(holders, values, strict=True):
                held[name] = value
            try:
                for hook in weight_hooks(part):  # once more: they ran before, outside of the child's forward
                    hook(part, args)
                return forward(*args, **kwargs)
            finally:
                part.__dict__.update(computed)
                for (held, name), value in zip(holders, replaced, strict=True):
                    held[name] = value

        previous = [vars(part).get("forward") for part in self._sharing]
        computed = [_tensors(part) for part in self._sharing]
        try:
            for part in self._sharing:
                part.__dict__["forward"] = functools.partial(run, part, part.forward)
            yield
        finally:
            for part, forward, tensors in zip(self._sharing, previous, computed, strict=True):
                part.__dict__.update(tensors)
                if forward is None:
                    del part.__dict__["forward"]
                else:
                    part.__dict__["forward"] = forward

    def _input_dim(self, leaf, dim: int) -> int | None:
        if isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == self.batch_size:
            return dim
        return None

    def _call(
        self, parameters: dict[str, Tensor], leaves: list, detached: bool = False
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """The differentiated outputs for the given parameters and input leaves; and the buffers afterwards."""
        clones = {id(buffer): buffer.clone() for buffer in self._buffers.values()}
        buffers = {name: clones[id(buffer)] for name, buffer in self._buffers.items()}
        by_id = {id(self._owned[name]): tensor for name, tensor in parameters.items()}
        own = {f"module.{name}": by_id[id(p)] for name, p in self._places.items() if id(p) in by_id}
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        with self._children_apart(detached):
            call = torch.func.functional_call(self._bare, own | buffers, args, kwargs, tie_weights=False)
        outputs = pytree.tree_leaves(call)
        return [outputs[i] for i in self._positions], buffers

    def batch_grads(
        self, parameters: dict[str, nn.Parameter], grad_outputs: tuple[Tensor, ...], autocast: torch.dtype | None
    ) -> dict[str, Tensor]:
        """Per-sample gradients [N, *P] of the named parameters, of a call that ran under `autocast` (None: did not)."""
        with self._as_called(grad_outputs[0].device.type, autocast):
            return self._batch_grads(parameters, grad_outputs, autocast)

    def output_dims(
        self, parameters: dict[str, nn.Parameter], shapes: Sequence[torch.Size], autocast: torch.dtype | None
    ) -> list[int]:
        """The batch dimension of each differentiated output, of these shapes."""
        constant = {name: p.detach() for name, p in parameters.items()}
        with self._as_called(next(iter(constant.values())).device.type, autocast), torch.no_grad():
            single, _ = self._call(constant, [self._narrow(leaf, dim, 0) for leaf, dim in self._batched()])
            return [self._output_dim(shape, s.shape) for shape, s in zip(shapes, single, strict=True)]

    @contextlib.contextmanager
    def _as_called(self, device_type: str, autocast: torch.dtype | None) -> Iterator[None]:
        """Where the call is run again on single samples, under the `autocast` that it ran under."""
        # authoring(): the module's extended children are no part of the pass that runs, nor are their hooks.
        with authoring(), without_fused_recurrence(self._bare), _without_saved_tensor_hooks():
            try:
                if autocast is None:
                    yield
                else:
                    with torch.autocast(device_type, autocast, cache_enabled=False):
                        yield
            except NoPerSampleGradients:
                raise
            except Exception as error:  # whatever a module does to inputs that it was not written for
                reason = str(error).partition("\n")[0]
                raise NoPerSampleGradients(
                    f"{self._name}: it could not be run on single samples ({type(error).__name__}: {reason})"
                ) from error

    def total_grads(
        self, parameters: dict[str, nn.Parameter], grad_outputs: tuple[Tensor, ...], autocast: torch.dtype | None
    ) -> dict[str, Tensor]:
        """torch's gradients of the named parameters, from the call run again."""
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        variables = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        device_type = grad_outputs[0].device.type
        with authoring(), _without_saved_tensor_hooks():
            with torch.enable_grad(), torch.autocast(device_type, autocast, enabled=autocast is not None):
                outputs, _ = self._call(variables, leaves)
            grads = torch.autograd.grad(outputs, list(variables.values()), grad_outputs, allow_unused=True)
        return {
            name: torch.zeros_like(variables[name]) if grad is None else grad.to_dense() if grad.is_sparse else grad
            for name, grad in zip(variables, grads, strict=True)
        }

    def _batch_grads(
        self, parameters: dict[str, nn.Parameter], grad_outputs: tuple[Tensor, ...], autocast: torch.dtype | None
    ) -> dict[str, Tensor]:
        constant = {name: p.detach() for name, p in parameters.items()}
        if self.batch_size == 0:
            return {name: p.new_zeros(0, *p.shape) for name, p in constant.items()}
        with torch.no_grad():
            outputs, vjp, buffers = torch.func.vjp(lambda p: self._call(p, self._leaves), constant, has_aux=True)
            if not all(torch.equal(buffers[name], buffer) for name, buffer in self._buffers.items()):
                raise NoPerSampleGradients(
                    f"{self._name}: its forward changes its buffers, so that the call cannot be repeated"
                )
            (totals,) = vjp([g.to(o.dtype) for g, o in zip(grad_outputs, outputs, strict=True)])
            first = [self._narrow(leaf, dim, 0) for leaf, dim in self._batched()]
            first = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in first]
        with torch.enable_grad():
            single, _ = self._call(constant, first, detached=True)
        self._check_replaced(single, parameters)
        if not torch.is_grad_enabled():
            parameters = constant
        out_dims = [self._output_dim(o.shape, s.shape) for o, s in zip(outputs, single, strict=True)]

        def backward(samples: list[Tensor], grads: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
            left = iter(samples)
            leaves = [leaf if dim is None else next(left).unsqueeze(dim) for leaf, dim in self._batched()]
            found, vjp = torch.func.vjp(lambda p: self._call(p, leaves)[0], parameters)
            (gradients,) = vjp([g.unsqueeze(dim).to(o.dtype) for g, dim, o in zip(grads, out_dims, found, strict=True)])
            return {name: g.to_dense() if g.is_sparse else g for name, g in gradients.items()}, found

        samples = [leaf.movedim(dim, 0) for leaf, dim in self._batched() if dim is not None]
        grads = [g.movedim(dim, 0) for g, dim in zip(grad_outputs, out_dims, strict=True)]
        vectorised = None
        if not torch.is_grad_enabled():  # some batching rules have wrong second derivatives (that of LayerNorm)
            with contextlib.suppress(RuntimeError, ValueError), warnings.catch_warnings():  # no batching rule
                warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
                vectorised = torch.vmap(backward)(samples, grads)
        if vectorised is not None:
            gradients, found = vectorised
        else:  # one sample after the other
            results = [backward([s[n] for s in samples], [g[n] for g in grads]) for n in range(self.batch_size)]
            gradients = {name: torch.stack([g[name] for g, _ in results]) for name in parameters}
            found = [torch.stack(tensors) for tensors in zip(*[o for _, o in results], strict=True)]
        for output, sample_outputs, dim in zip(outputs, found, out_dims, strict=True):
            scale = output.abs().max() if output.numel() else output.new_zeros(())
            found_outputs = sample_outputs.squeeze(dim + 1).movedim(0, dim).detach()
            self._check_same(output, found_outputs, scale, _rounded_to(output.dtype, autocast))
        # Gradients may cancel within a sample, down to the rounding of what was summed.
        types = [_rounded_to(g.dtype, autocast) for g in grad_outputs]
        rounding = sum(
            16 * torch.finfo(dtype).eps * g.detach().abs().sum() for g, dtype in zip(grad_outputs, types, strict=True)
        )
        for name, total in totals.items():
            rows = gradients[name].detach()
            total = total.to_dense() if total.is_sparse else total
            scale = rows.abs().sum(0).max() if total.numel() else rows.new_zeros(())
            dtype = _rounded_to(total.dtype, autocast)
            self._check_same(total, rows.sum(0), scale + rounding / _SAME[dtype], dtype)
        return gradients

    def _check_replaced(self, outputs: list[Tensor], parameters: dict[str, nn.Parameter]) -> None:
        """Outputs of a call with others in the place of the parameters may not depend on the parameters themselves."""
        names = {id(p): name for name, p in parameters.items()}
        visited, stack = set(), [output.grad_fn for output in outputs]
        while stack:
            node = stack.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            name = names.get(id(getattr(node, "variable", None)))
            if name is not None:
                raise NoPerSampleGradients(
                    f"{self._name}: its forward does not look {name} up as an attribute of the module, but has it from "
                    "a list, a closure or the like"
                )
            stack.extend(operand for operand, _ in node.next_functions)

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

    def _check_same(self, whole: Tensor, samples: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """`dtype`: the type that they are rounded to."""
        if whole.numel() and (whole - samples).abs().nan_to_num(0.0).max() > _SAME[dtype] * scale.nan_to_num(0.0):
            raise NoPerSampleGradients(
                f"{self._name}: its output or gradient for a batch is not that of its samples one by one: it mixes the "
                "samples or draws random numbers, so that per-sample gradients do not exist or cannot be formed again"
            )
