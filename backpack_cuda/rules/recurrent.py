"""torch.nn.RNN, LSTM and GRU."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import _VF, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from backpack_cuda.capture import Observation, ReplayRule, capturing, observe
from backpack_cuda.per_sample import LinearColumns, LinearUse, Part, PartsColumns, PartsUse
from backpack_cuda.rules.cells import CELLS, Cell, CellCall, CellGradients
from backpack_cuda.rules.generic import generic_forward, without_fused_recurrence
from backpack_cuda.stats import statistics_dtype

INPUTS = ("input", "h0", "c0")  # names of a call's inputs

_FUNCTIONS = {"RNN_TANH": _VF.rnn_tanh, "RNN_RELU": _VF.rnn_relu, "LSTM": _VF.lstm, "GRU": _VF.gru}


class _Sequences:
    """How the tensors of a call lie. Its rules see [N, T, *], samples in the user's order."""

    def __init__(self, module: nn.RNNBase, input: Tensor | PackedSequence):
        self.packed = isinstance(input, PackedSequence)
        self.lengths = None  # [N] of packed sequences, on the CPU
        self.batch_first = module.batch_first
        self.batched = self.packed or input.dim() == 3
        if self.packed:
            _, self.batch_sizes, self.sorted, self.unsorted = input
            self.samples, self.length = int(self.batch_sizes[0]), len(self.batch_sizes)
            self._index_packed(input.data.device)
        elif self.batched:
            self.samples, self.length = input.shape[:2] if self.batch_first else (input.shape[1], input.shape[0])
        else:
            self.samples, self.length = 1, input.shape[0]

    def _index_packed(self, device: torch.device) -> None:
        counts = self.batch_sizes  # [T], of the samples that are longer than t
        t = torch.repeat_interleave(torch.arange(self.length), counts)  # of each packed row
        n = torch.arange(len(t)) - (counts.cumsum(0) - counts)[t]  # its sample, longest first
        lengths = (counts > torch.arange(self.samples)[:, None]).sum(1)  # [N]
        if self.sorted is not None:
            order = self.sorted.cpu()
            n, lengths = order[n], lengths[self.unsorted.cpu()]
        self.lengths = lengths
        self._place = (n * self.length + t).to(device)  # of each packed row in [N * T]
        positions = torch.arange(self.length)  # [T]
        backwards = torch.where(positions < lengths[:, None], lengths[:, None] - 1 - positions, positions)
        self._backwards = (torch.arange(self.samples)[:, None] * self.length + backwards).flatten().to(device)
        self.valid = (positions < lengths[:, None]).unsqueeze(2).to(device)  # [N, T, 1]

    def rows(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """The user's [*leading, ...] -> [*leading, N, T, *]; zeros behind the end of a sample."""
        if self.packed:
            shape = tensor.shape[:leading]
            padded = tensor.new_zeros(*shape, self.samples * self.length, tensor.shape[-1])
            padded = padded.index_copy(leading, self._place, tensor)
            return padded.unflatten(leading, (self.samples, self.length))
        if not self.batched:
            return tensor.unsqueeze(leading)
        return tensor if self.batch_first else tensor.transpose(leading, leading + 1)

    def of_user(self, rows: Tensor, leading: int = 0) -> Tensor:
        """The inverse of `rows`."""
        if self.packed:
            return rows.flatten(leading, leading + 1).index_select(leading, self._place)
        if not self.batched:
            return rows.squeeze(leading)
        return rows if self.batch_first else rows.transpose(leading, leading + 1)

    def to_torch(self, data: Tensor) -> Tensor:
        """The input as torch's functions take it: with a batch dimension, unless it is packed."""
        return data if self.batched else data.unsqueeze(0 if self.batch_first else 1)

    def of_torch(self, output: Tensor) -> Tensor:
        """[N, T, *], from what torch's functions return."""
        if self.packed:
            return self.rows(output)
        return output if self.batch_first else output.transpose(0, 1)

    def states(self, states: Tensor, leading: int = 0) -> Tensor:
        """The user's [*leading, L * D, ...] -> [*leading, L * D, N, P]."""
        return states if self.batched else states.unsqueeze(leading + 1)

    def states_of_user(self, states: Tensor, leading: int = 0) -> Tensor:
        """The inverse of `states`."""
        return states if self.batched else states.squeeze(leading + 1)

    def kind(self, position: int) -> int:
        """What the output's leaf at `position` is: 0 the output, 1 the last hidden and 2 the last cell states."""
        first = 4 if self.packed else 1  # place of these states among the output's leaves
        return max(position - first + 1, 0)

    def samples_first(self, position: int, tensor: Tensor) -> Tensor:
        """[N, ...], from a tensor like the output's leaf at `position`."""
        return self.states(tensor).transpose(0, 1) if self.kind(position) else self.rows(tensor)

    def reversed(self, rows: Tensor, leading: int = 0) -> Tensor:
        """[*leading, N, T, *] with the positions of each sample in reversed order."""
        if not self.packed:
            return rows.flip(leading + 1)
        found = rows.flatten(leading, leading + 1).index_select(leading, self._backwards)
        return found.unflatten(leading, (self.samples, self.length))


class _Setting(NamedTuple):
    """What a call's replay needs to know of the module, which may change."""

    mode: str
    bias: bool
    training: bool
    dropout: float
    directions: int
    names: list[list[list[str]]]  # of the weights, per layer and direction
    sequences: _Sequences

    @classmethod
    def of(cls, module: nn.RNNBase, input: Tensor | PackedSequence) -> "_Setting":
        """Of a call with this input."""
        directions, names = 1 + module.bidirectional, module._all_weights
        layers = [names[begin : begin + directions] for begin in range(0, len(names), directions)]
        sequences = _Sequences(module, input)
        return cls(module.mode, module.bias, module.training, module.dropout, directions, layers, sequences)

    def own(self, layer: int, states: Sequence[Tensor]) -> list[Tensor]:
        """The states [D, N, *] of one layer, from those of all, [L * D, N, *]."""
        return [state[layer * self.directions : (layer + 1) * self.directions] for state in states]


def _has_plain_weights(module: nn.RNNBase) -> bool:
    """Whether the weights are the module's own parameters, each in one place."""
    weights = [module._parameters.get(name) for name in module._flat_weights_names]
    return (
        all(weight is not None for weight in weights)
        and len({id(weight) for weight in weights}) == len(weights)
        and "parametrizations" not in module._modules
    )


def _has_valid_dims(input: Tensor, states: Sequence[Tensor]) -> bool:
    """Whether torch's forward accepts these numbers of dimensions; of the rest of its demands it has a function."""
    return input.dim() in (2, 3) and all(state.dim() == input.dim() for state in states)


def recurrent_forward(module: nn.RNNBase, stock_forward: Callable, input: Tensor | PackedSequence, hx=None):
    """The forward of a recurrent module, prepared for quantities."""
    data = input.data if isinstance(input, PackedSequence) else input
    if not capturing(data):
        return stock_forward(input, hx)
    states = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if not _has_plain_weights(module) or not all(isinstance(state, Tensor) for state in states):
        return generic_forward(module, stock_forward, input, hx)
    draws = module.num_layers > 1 and module.dropout > 0 and module.training
    if draws and (data is not input or _has_valid_dims(input, states)):
        setting = _Setting.of(module, input)  # stock_forward() would draw masks that cannot be found again
        output, masks = _forward_with_masks(module, setting, input, states)
    else:
        output, masks = stock_forward(input, hx), []
        setting = _Setting.of(module, input)
    weights = {name: module._parameters[name] for name in module._flat_weights_names}
    inputs = dict(zip(INPUTS, (data, *states), strict=False))
    sequences = setting.sequences
    kept = _Kept(output[0])

    def replay(observation: Observation, args: tuple, kwargs: dict) -> "_RecurrentReplay":
        return _RecurrentReplay(setting, observation, args, **kwargs, last=kept.take())

    def form(observation: Observation, args: tuple, kwargs: dict, grad_outputs: tuple[Tensor, ...]) -> PartsUse:
        columns = [None if grad is None else grad[None] for grad in grad_outputs]
        return replay(observation, args, kwargs).pull_back(columns, 1).use()

    gates = sum(weight.shape[0] for weight in weights.values() if weight.dim() == 2)  # of W_ih and W_hh
    column_bytes = 2 * gates * sequences.samples * sequences.length * statistics_dtype(data.dtype).itemsize
    return observe(
        module,
        {name: p for name, p in weights.items() if p.requires_grad},
        form,
        (data, *states),
        {"weights": weights, "masks": masks},
        output,
        ReplayRule(replay, sequences.samples_first, sequences.samples, column_bytes),
        {name: tensor for name, tensor in (inputs | weights).items() if tensor.requires_grad},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Layer by layer in torch's own functions
# ---------------------------------------------------------------------------------------------------------------------


def _run_layer(
    setting: _Setting, layer: int, data: Tensor, states: Sequence[Tensor], weights: dict[str, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One layer's output and its last states [D, N, *], for `data` as torch's functions take it."""
    sequences = setting.sequences
    sort = sequences.packed and sequences.sorted is not None
    states = [state.index_select(1, sequences.sorted) if sort else state for state in setting.own(layer, states)]
    hx = tuple(states) if setting.mode == "LSTM" else states[0]
    own = [weights[name] for names in setting.names[layer] for name in names]
    options = (setting.bias, 1, 0.0, setting.training, setting.directions == 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        if sequences.packed:
            output, *last = _FUNCTIONS[setting.mode](data, sequences.batch_sizes, hx, own, *options)
        else:
            output, *last = _FUNCTIONS[setting.mode](data, hx, own, *options, sequences.batch_first)
    return output, [state.index_select(1, sequences.unsorted) if sort else state for state in last]


def _initial_states(setting: _Setting, states: Sequence[Tensor], data: Tensor, weights: dict) -> list[Tensor]:
    """h_0 [L * D, N, P], and c_0 [L * D, N, H] of an LSTM."""
    if states:
        return [setting.sequences.states(state) for state in states]
    hidden = weights[setting.names[0][0][1]]  # [G, P]
    sizes = [hidden.shape[1]] + ([hidden.shape[0] // 4] if setting.mode == "LSTM" else [])
    count = len(setting.names) * setting.directions
    return [data.new_zeros(count, setting.sequences.samples, size) for size in sizes]


def _forward_with_masks(
    module: nn.RNNBase, setting: _Setting, input: Tensor | PackedSequence, states: Sequence[Tensor]
) -> tuple[tuple, list[Tensor]]:
    """What torch's forward returns, and the masks of dropout between the layers, drawn as torch draws them."""
    sequences = setting.sequences
    weights = module._parameters
    data = sequences.to_torch(input.data if sequences.packed else input)
    initial = _initial_states(setting, states, data, weights)
    batch_sizes = sequences.batch_sizes if sequences.packed else None
    module.check_forward_args(data, tuple(initial) if setting.mode == "LSTM" else initial[0], batch_sizes)
    masks, last = [], []
    for layer in range(len(setting.names)):
        if layer:
            ones = torch.ones_like(data)
            if sequences.packed or not sequences.batch_first:
                masks.append(F.dropout(ones, setting.dropout))
            else:
                masks.append(F.dropout(ones.transpose(0, 1).contiguous(), setting.dropout).transpose(0, 1))
            data = data * masks[-1]
        data, own = _run_layer(setting, layer, data, initial, weights)
        last.append(own)
    last = [sequences.states_of_user(torch.cat(states)) for states in zip(*last, strict=True)]
    if sequences.packed:
        output = PackedSequence(data, sequences.batch_sizes, sequences.sorted, sequences.unsorted)
    else:
        output = data if sequences.batched else data.squeeze(0 if sequences.batch_first else 1)
    return (output, tuple(last) if setting.mode == "LSTM" else last[0]), masks


class _Kept:
    """A call's output until the first replay, if nobody changes it meanwhile.

    Not saved by autograd, which would forbid changes. Torch's layers keep it in most cases anyway, but not where hooks
    on saved tensors (checkpoints) ask for that memory.
    """

    def __init__(self, output: Tensor | PackedSequence):
        hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        output = output.data if isinstance(output, PackedSequence) else output
        self._output = None if hooked else output.detach()
        self._version = output._version

    def take(self) -> Tensor | None:
        """The output as it was, without its graph; None where it is not there or not enough."""
        output, self._output = self._output, None
        unchanged = output is not None and output._version == self._version and not torch.is_grad_enabled()
        return output if unchanged else None


# ---------------------------------------------------------------------------------------------------------------------
# Backwards
# ---------------------------------------------------------------------------------------------------------------------


class _RecurrentReplay:
    """A recurrent module's call, with the gates of all its layers."""

    def __init__(
        self,
        setting: _Setting,
        observation: Observation,
        args: tuple[Tensor, ...],
        weights: dict[str, Tensor],
        masks: list[Tensor],
        last: Tensor | None,
    ):
        self.setting = setting
        self.positions = observation.positions
        self.parameters = observation.parameters
        self.inputs = dict(zip(INPUTS, args, strict=False))
        self.dtype = next(iter(weights.values())).dtype
        self.wide = statistics_dtype(self.dtype)
        self.masks = [setting.sequences.of_torch(mask).to(self.wide) for mask in masks]  # [N, T, D * P]
        self._latest: tuple[Sequence[Tensor | None], _PulledBack] | None = None
        data, *states = args
        fused = without_fused_recurrence if torch.is_grad_enabled() else contextlib.nullcontext
        autocast = contextlib.nullcontext()
        if observation.autocast is not None:
            autocast = torch.autocast(data.device.type, observation.autocast, cache_enabled=False)
        with fused(observation.module), autocast:
            outputs = self._outputs(data, states, weights, masks, last)
        self.cells = self._cells(data, states, weights, outputs)  # per layer and direction

    def _outputs(
        self,
        data: Tensor,
        states: Sequence[Tensor],
        weights: dict[str, Tensor],
        masks: list[Tensor],
        last: Tensor | None,
    ) -> list[Tensor]:
        """[N, T, D * P] of each layer, from the last one's output in the user's layout where that is known."""
        sequences, layers = self.setting.sequences, len(self.setting.names)
        data = sequences.to_torch(data)
        states = _initial_states(self.setting, states, data, weights)
        outputs = []
        for layer in range(layers if last is None else layers - 1):
            if layer and masks:
                data = data * masks[layer - 1]
            data, _ = _run_layer(self.setting, layer, data, states, weights)
            outputs.append(sequences.of_torch(data).to(self.wide))
        if last is not None:
            outputs.append(sequences.rows(last).to(self.wide))
        return outputs

    def _cells(
        self, data: Tensor, states: Sequence[Tensor], weights: dict[str, Tensor], outputs: list[Tensor]
    ) -> list[list[Cell]]:
        setting, sequences = self.setting, self.setting.sequences
        valid = sequences.valid.to(self.wide) if sequences.packed else None
        rows = sequences.rows(data).to(self.wide)  # [N, T, I]
        weights = {name: weight.to(self.wide) for name, weight in weights.items()}
        states = [state.to(self.wide) for state in _initial_states(setting, states, data, weights)]
        cells = []
        for layer, names in enumerate(setting.names):
            if layer:
                rows = outputs[layer - 1] * self.masks[layer - 1] if self.masks else outputs[layer - 1]
            own = setting.own(layer, states)
            cells.append([])
            for direction, hidden in enumerate(outputs[layer].chunk(setting.directions, -1)):  # [N, T, P]
                input = rows
                if direction:
                    input, hidden = sequences.reversed(rows), sequences.reversed(hidden)
                h0, *c0 = (state[direction] for state in own)  # [N, P], [N, H]
                before = torch.cat([h0.unsqueeze(1), hidden[:, :-1]], 1)
                before = before if valid is None else before * valid
                own_weights = {name.partition("_l")[0]: weights[name] for name in names[direction]}
                call = CellCall(input, before, hidden, c0[0] if c0 else None, valid, own_weights)
                cells[-1].append(CELLS[setting.mode](call))
        return cells

    def pull_back(self, columns: Sequence[Tensor | None], count: int, keep: bool = False) -> "_PulledBack":
        if self._latest is not None and all(map(_is_same, self._latest[0], columns)):
            pulled = self._latest[1]
        else:
            pulled = _PulledBack(self, columns, count)
        self._latest = (columns, pulled) if keep else None
        return pulled


def _is_same(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two tensors are the same memory, while both are in use."""
    if first is None or second is None:
        return first is second
    return (
        first.data_ptr() == second.data_ptr()
        and first.shape == second.shape
        and first.stride() == second.stride()
        and first._version == second._version
        and not (first.requires_grad or second.requires_grad)
    )


class _PulledBack:
    """V gradients of a recurrent call's outputs on their way back."""

    def __init__(self, replay: _RecurrentReplay, columns: Sequence[Tensor | None], count: int):
        self._replay = replay
        self._count = count
        kind = replay.setting.sequences.kind
        self._columns = {kind(position): c for position, c in zip(replay.positions, columns, strict=True)}

    def _grads(self, which: int, shape: tuple[int, ...]) -> Tensor:
        """Gradients of one kind of output: [V, N, T, D * P], or [V, L * D, N, *]."""
        columns, sequences = self._columns.get(which), self._replay.setting.sequences
        if columns is None:
            like = self._replay.cells[0][0].call.hidden
            return like.new_zeros(self._count, *shape)
        return (sequences.states(columns, 1) if which else sequences.rows(columns, 1)).to(self._replay.wide)

    @cached_property
    def _found(self) -> list[list[CellGradients]]:
        """Per layer and direction."""
        replay = self._replay
        setting, sequences = replay.setting, replay.setting.sequences
        first = replay.cells[0][0].call
        samples, length, size = first.hidden.shape
        layers = len(replay.cells)
        count = layers * setting.directions
        grads = self._grads(0, (samples, length, setting.directions * size))
        grad_states = self._grads(1, (count, samples, size))
        grad_cells = None
        if first.cell_state is not None:
            grad_cells = self._grads(2, (count, samples, first.cell_state.shape[-1]))
        found = [[] for _ in replay.cells]
        for layer in reversed(range(layers)):
            for direction, cell in enumerate(replay.cells[layer]):
                upstream = grads[..., direction * size : (direction + 1) * size]
                upstream = sequences.reversed(upstream, 1) if direction else upstream
                place = layer * setting.directions + direction
                grad_cell = None if grad_cells is None else grad_cells[:, place]
                found[layer].append(cell.pull_back(upstream, grad_states[:, place], grad_cell))
            if layer:
                grads = self._of_input(layer, found[layer])
                grads = grads * replay.masks[layer - 1] if replay.masks else grads
        return found

    def _of_input(self, layer: int, found: list[CellGradients]) -> Tensor:
        """[V, N, T, I]: the gradient of a layer's input."""
        total = None
        for direction, (cell, own) in enumerate(zip(self._replay.cells[layer], found, strict=True)):
            grad = own.input_rows @ cell.call.weights["weight_ih"]
            grad = self._replay.setting.sequences.reversed(grad, 1) if direction else grad
            total = grad if total is None else total + grad
        return total

    def gradients(self, names: Sequence[str]) -> list[Tensor]:
        """[V, *input] of the named ones of INPUTS."""
        sequences, inputs = self._replay.setting.sequences, self._replay.inputs
        result = []
        for name in names:
            if name == "input":
                grad = sequences.of_user(self._of_input(0, self._found[0]), 1)
            else:
                own = [cell.state if name == "h0" else cell.cell_state for layer in self._found for cell in layer]
                grad = sequences.states_of_user(torch.stack(own, 1), 1)
            result.append(grad.to(inputs[name].dtype))
        return result

    def _parts(self, form: Callable[[Tensor, Tensor], LinearUse | LinearColumns]) -> list[Part]:
        """The uses of each weight with its bias, formed from inputs [N, T, I] and gradients [V, N, T, G]."""
        replay, parts = self._replay, []
        for names, cells, found in zip(replay.setting.names, replay.cells, self._found, strict=True):
            for own_names, cell, own in zip(names, cells, found, strict=True):
                by_kind = {name.partition("_l")[0]: name for name in own_names if name in replay.parameters}
                for kind, input, rows in (
                    ("ih", cell.call.input, own.input_rows),
                    ("hh", cell.call.before, own.hidden_rows),
                    ("hr", getattr(cell, "projected", None), own.projected_rows),
                ):
                    inside = {f"weight_{kind}": "weight", f"bias_{kind}": "bias"}
                    used = {by_kind[name]: inner for name, inner in inside.items() if name in by_kind}
                    if used:
                        parts.append(Part(form(input.to(replay.dtype), rows.to(replay.dtype)), used))
        return parts

    def use(self) -> PartsUse:
        """The per-sample gradients, of V = 1."""
        lengths = self._replay.setting.sequences.lengths

        def form() -> list[Part]:
            return self._parts(lambda input, rows: LinearUse(input, rows[0], lengths))

        return PartsUse(form, self._replay.setting.sequences.samples, self._replay.dtype)

    def columns(self) -> PartsColumns:
        """The same for all V."""
        lengths = self._replay.setting.sequences.lengths
        return PartsColumns(self._parts(lambda input, rows: LinearColumns(input, rows, lengths)))
