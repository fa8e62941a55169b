"""The cells of recurrent layers: their gates for all positions at once, and their recurrence backwards.

Hidden states h_t are known (torch's own layer gives them), so that the gates of all positions are two matrix products.
What is left to do position by position is the sum over the cell states of an LSTM, and backwards the gradients delta_t
of the gates' arguments, from which every parameter's per-sample gradients follow as sums of outer products over t.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sigmoid_backward = torch.ops.aten.sigmoid_backward  # of (g, y): g y (1 - y)
tanh_backward = torch.ops.aten.tanh_backward  # of (g, y): g (1 - y^2)


class CellCall(NamedTuple):
    """One layer and direction of a recurrent module's call, positions in the direction's own order."""

    input: Tensor  # [N, T, I]
    before: Tensor  # [N, T, P]  h_{t-1}, which the weight multiplies
    hidden: Tensor  # [N, T, P]  h_t
    cell_state: Tensor | None  # [N, H]  c_{-1} of an LSTM
    valid: Tensor | None  # [N, T, 1]  1 before a sample's end, 0 behind it; None for samples of one length
    weights: dict[str, Tensor]  # weight_ih [G, I], weight_hh [G, P], bias_ih, bias_hh [G], weight_hr [P, H]

    def products(self) -> tuple[Tensor, Tensor]:
        """[N, T, G] each: what input and hidden state contribute to the gates' arguments."""
        weights = self.weights
        return (
            F.linear(self.input, weights["weight_ih"], weights.get("bias_ih")),
            F.linear(self.before, weights["weight_hh"], weights.get("bias_hh")),
        )

    def arguments(self) -> Tensor:
        """[N, T, G]: the sum of both."""
        weights = self.weights
        bias = weights["bias_ih"] + weights["bias_hh"] if "bias_ih" in weights else None
        from_input = F.linear(self.input, weights["weight_ih"], bias)
        arguments = torch.addmm(from_input.flatten(0, 1), self.before.flatten(0, 1), weights["weight_hh"].t())
        return arguments.view_as(from_input)


class CellGradients(NamedTuple):
    """What V gradients of a cell's outputs become."""

    input_rows: Tensor  # [V, N, T, G]  of W_ih x_t + b_ih
    hidden_rows: Tensor  # [V, N, T, G]  of W_hh h_{t-1} + b_hh
    projected_rows: Tensor | None  # [V, N, T, P]  of W_hr times what it projects
    state: Tensor  # [V, N, P]  of h_{-1}
    cell_state: Tensor | None  # [V, N, H]  of c_{-1}


class _Rows:
    """Gradients [V, N, T, B, H] of B blocks of gates, which arise position by position; out of place under grad mode.

    All views are made beforehand: what is done position by position costs by the number of calls.
    """

    def __init__(self, upstream: Tensor, hidden_size: int, blocks: tuple[int, ...], used: slice, weight: Tensor):
        count, samples, length, _ = upstream.shape
        self._used = used  # the blocks that W_hh is multiplied with
        self._weight = weight
        self._sizes = count, samples, 1, weight.shape[1]
        self._upstream = upstream.flatten(0, 1).unbind(1)  # [V * N, P] each
        self._rows: list[Tensor] = []
        self._buffer = None
        if not torch.is_grad_enabled():
            self._buffer = upstream.new_empty(count, samples, length, sum(blocks), hidden_size)
            self._places = [part.unbind(2) for part in self._buffer.split(blocks, 3)]  # [V, N, B', H] each
            self._flat = self._buffer[:, :, :, used].flatten(3).flatten(0, 1).unbind(1)  # [V * N, G] each

    def put(self, t: int, *products: tuple[Tensor, Tensor]) -> Tensor:
        """Sets the row of position t: products of [V, N, 1, H] and [N, B', H], side by side.

        Returns the gradient of h_{t-1} [V, N, 1, P], by this row and by the output at t - 1.
        """
        if self._buffer is None:
            row = torch.cat([gradient * factor for gradient, factor in products], 2)
            self._rows.append(row)
            row = row[:, :, self._used].flatten(2).flatten(0, 1)
        else:
            for places, (gradient, factor) in zip(self._places, products, strict=True):
                torch.mul(gradient, factor, out=places[t])
            row = self._flat[t]
        earlier = torch.addmm(self._upstream[t - 1], row, self._weight) if t else row @ self._weight
        return earlier.view(self._sizes)

    def all(self) -> Tensor:
        """[V, N, T, B, H], of positions put in falling order."""
        return torch.stack(self._rows[::-1], 2) if self._buffer is None else self._buffer


class Cell(ABC):
    """A cell's call with what its backward pass needs of the forward one."""

    def __init__(self, call: CellCall):
        self.call = call
        valid = call.valid  # [N, T, 1]
        # Behind the end of a sample its state stays, and so does the state's gradient.
        self._stays = None if valid is None else (1 - valid).unsqueeze(2).unbind(1)  # [N, 1, 1] each

    @abstractmethod
    def pull_back(self, grads: Tensor, grad_state: Tensor, grad_cell_state: Tensor | None) -> CellGradients:
        """From V gradients of all h_t [V, N, T, P], the last state [V, N, P] and the last cell state [V, N, H]."""

    def _masked(self, factors: Tensor) -> Tensor:
        """Factors [N, T, *] with zeros behind the samples' ends."""
        valid = self.call.valid
        return factors if valid is None else factors * valid.view(*valid.shape, *(1,) * (factors.dim() - 3))


class _Elman(Cell):
    """h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)."""

    def __init__(self, call: CellCall):
        super().__init__(call)
        self._slope = self._masked(self._derivative(call.hidden)).unsqueeze(2).unbind(1)  # [N, 1, H] each

    @staticmethod
    @abstractmethod
    def _derivative(hidden: Tensor) -> Tensor:
        """phi' as a function of phi."""

    def pull_back(self, grads: Tensor, grad_state: Tensor, grad_cell_state: Tensor | None) -> CellGradients:
        rows = _Rows(grads, grads.shape[-1], (1,), slice(None), self.call.weights["weight_hh"])
        dh = (grads[:, :, -1] + grad_state).unsqueeze(2)  # [V, N, 1, H]
        for t in reversed(range(grads.shape[2])):
            earlier = rows.put(t, (dh, self._slope[t]))
            dh = earlier if self._stays is None else torch.addcmul(earlier, dh, self._stays[t])
        delta = rows.all().flatten(3)
        return CellGradients(delta, delta, None, dh.squeeze(2), None)


class TanhCell(_Elman):
    """torch.nn.RNN with tanh."""

    @staticmethod
    def _derivative(hidden: Tensor) -> Tensor:
        return torch.addcmul(hidden.new_ones(()), hidden, hidden, value=-1)


class ReluCell(_Elman):
    """torch.nn.RNN with ReLU."""

    @staticmethod
    def _derivative(hidden: Tensor) -> Tensor:
        return (hidden > 0).to(hidden.dtype)


class LSTMCell(Cell):
    """torch.nn.LSTM: i, f, o = sigmoid, g = tanh; c_t = f c_{t-1} + i g, h_t = [W_hr] (o tanh(c_t))."""

    def __init__(self, call: CellCall):
        super().__init__(call)
        i, f, g, o = call.arguments().chunk(4, -1)  # [N, T, H] each
        i, f, g, o = self._masked(i.sigmoid()), f.sigmoid(), g.tanh(), o.sigmoid()
        if call.valid is not None:
            f = torch.where(call.valid != 0, f, 1.0)
        states = [call.cell_state]
        for forget, new in zip(f.unbind(1), (i * g).unbind(1), strict=True):
            states.append(torch.addcmul(new, forget, states[-1]))
        before, tanh = torch.stack(states[:-1], 1), torch.stack(states[1:], 1).tanh()
        # Derivatives of c_t by the arguments of i, f, g; of h_t by that of o; of h_t by c_t; of c_t by c_{t-1}.
        gates = [sigmoid_backward(g, i), sigmoid_backward(before, f), tanh_backward(i, g)]
        self._gates = torch.stack(gates, 2).unbind(1)
        self._output_gate = self._masked(sigmoid_backward(tanh, o)).unsqueeze(2).unbind(1)
        self._out = self._masked(tanh_backward(o, tanh)).unsqueeze(2).unbind(1)
        self._forget = f.unsqueeze(2).unbind(1)
        self.projected = self._masked(o * tanh) if "weight_hr" in call.weights else None  # [N, T, H]

    def pull_back(self, grads: Tensor, grad_state: Tensor, grad_cell_state: Tensor | None) -> CellGradients:
        projection = self.call.weights.get("weight_hr")
        rows = _Rows(grads, grad_cell_state.shape[-1], (3, 1), slice(None), self.call.weights["weight_hh"])
        projected = []
        dh, dc = (grads[:, :, -1] + grad_state).unsqueeze(2), grad_cell_state.unsqueeze(2)  # [V, N, 1, *]
        for t in reversed(range(grads.shape[2])):
            if projection is None:
                du = dh
            else:
                projected.append(dh)
                du = dh @ projection
            dc = torch.addcmul(dc, du, self._out[t])
            earlier = rows.put(t, (dc, self._gates[t]), (du, self._output_gate[t]))
            dh = earlier if self._stays is None else torch.addcmul(earlier, dh, self._stays[t])
            dc = dc * self._forget[t]
        delta = rows.all().flatten(3)
        return CellGradients(delta, delta, self._masked_columns(projected), dh.squeeze(2), dc.squeeze(2))

    def _masked_columns(self, projected: list[Tensor]) -> Tensor | None:
        if not projected:
            return None
        rows = torch.cat(projected[::-1], 2)  # [V, N, T, P]
        return rows if self.call.valid is None else rows * self.call.valid


class GRUCell(Cell):
    """torch.nn.GRU: r, z = sigmoid, n = tanh(W_in x + b_in + r (W_hn h + b_hn)); h_t = (1 - z) n + z h_{t-1}."""

    def __init__(self, call: CellCall):
        super().__init__(call)
        from_input, from_hidden = call.products()
        input_r, input_z, input_n = from_input.chunk(3, -1)  # [N, T, H] each
        hidden_r, hidden_z, hidden_n = from_hidden.chunk(3, -1)
        r, z = (input_r + hidden_r).sigmoid(), (input_z + hidden_z).sigmoid()
        n = (input_n + r * hidden_n).tanh()
        by_n = tanh_backward(1 - z, n)
        by_z = sigmoid_backward(call.before - n, z)
        by_r = sigmoid_backward(by_n * hidden_n, r)
        # Derivatives of h_t by the arguments of r, z, n; again with what r multiplies in the place of the last.
        factors = torch.stack([by_r, by_z, by_n, by_r, by_z, by_n * r], 2)
        self._gates = self._masked(factors).unbind(1)
        self._keep = (z if call.valid is None else torch.where(call.valid != 0, z, 1.0)).unsqueeze(2).unbind(1)

    def pull_back(self, grads: Tensor, grad_state: Tensor, grad_cell_state: Tensor | None) -> CellGradients:
        rows = _Rows(grads, grads.shape[-1], (6,), slice(3, None), self.call.weights["weight_hh"])
        dh = (grads[:, :, -1] + grad_state).unsqueeze(2)  # [V, N, 1, H]
        for t in reversed(range(grads.shape[2])):
            dh = torch.addcmul(rows.put(t, (dh, self._gates[t])), dh, self._keep[t])
        both = rows.all()  # [V, N, T, 6, H]
        return CellGradients(both[:, :, :, :3].flatten(3), both[:, :, :, 3:].flatten(3), None, dh.squeeze(2), None)


CELLS: dict[str, type[Cell]] = {"RNN_TANH": TanhCell, "RNN_RELU": ReluCell, "LSTM": LSTMCell, "GRU": GRUCell}
