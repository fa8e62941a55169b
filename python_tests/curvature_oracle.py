"""The slow, obvious float64 oracle of the second order: dense per-sample Jacobians and Hessians by loops over autograd.

Nothing of the product is imported here. f_n [*F] is the model's output for sample n, D = numel(f_n), and the loss l is
a function of all outputs that is a sum over the samples. Every quantity is defined from the derivatives of these two.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]  # outputs [N, *F] -> scalar


class Curvature(NamedTuple):
    """Derivatives of outputs and loss, and what follows from them. By the name of a parameter of shape P."""

    jacobian: dict[str, Tensor]  # [N, D, *P]   of f_n
    hessian: Tensor  # [N, D, D]    of l at f_n

    def blocks(self, name: str) -> Tensor:
        """[N, |P|, |P|]: the Gauss-Newton matrix J_n^T H_n J_n of every sample."""
        jacobian = self._matrix(name)
        return jacobian.mT @ self.hessian @ jacobian

    def batch_diag(self, name: str) -> Tensor:
        """[N, *P]: the diagonals of these matrices."""
        diag = torch.einsum("ndp,nde,nep->np", self._matrix(name), self.hessian, self._matrix(name))
        return diag.reshape(len(diag), *self.jacobian[name].shape[2:])

    def diag(self, name: str) -> Tensor:
        """[*P]: the diagonal of their sum."""
        return self.batch_diag(name).sum(0)

    def columns(self, roots: Tensor, name: str) -> Tensor:
        """[V, N, *P]: J_n^T s_vn for the columns `roots` [V, N, D]."""
        return torch.einsum("vnd,nd...->vn...", roots, self.jacobian[name])

    def _matrix(self, name: str) -> Tensor:
        """[N, D, |P|]: the Jacobian of flattened parameters."""
        jacobian = self.jacobian[name]
        return jacobian.reshape(*jacobian.shape[:2], -1)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """[N, *F]: the outputs, one sample at a time."""
    return torch.cat([model(inputs[n : n + 1]) for n in range(len(inputs))])


def loss_hessian(loss: Loss, outputs: Tensor, create_graph: bool = False) -> Tensor:
    """[N, D, D]: second derivatives of l, entry by entry. Asserts that l is a sum over the samples."""
    if not create_graph:
        outputs = outputs.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(outputs), outputs, create_graph=True)
    rows = []
    for entry in gradient.flatten():
        if entry.requires_grad:
            row = torch.autograd.grad(entry, outputs, create_graph=create_graph, retain_graph=True)[0]
        else:
            row = torch.zeros_like(outputs)
        rows.append(row.reshape(len(outputs), -1))
    samples = len(outputs)
    full = torch.stack(rows).reshape(samples, -1, *rows[0].shape)  # [N, D, N, D]
    hessian = torch.stack([full[n, :, n] for n in range(samples)])
    assert torch.allclose(full.square().sum(), hessian.square().sum(), rtol=1e-12), "the samples' losses interact"
    return hessian


def curvature(model: nn.Module, loss: Loss, inputs: Tensor, create_graph: bool = False) -> Curvature:
    """Jacobians and loss Hessian of a stock float64 model; `create_graph` keeps them differentiable."""
    parameters = trained(model)
    assert all(p.dtype == torch.float64 for p in parameters.values())
    outputs, rows = [], []
    for n in range(len(inputs)):
        output = model(inputs[n : n + 1])
        outputs.append(output)
        for entry in output.flatten():
            rows.append(_gradients(entry, list(parameters.values()), create_graph))
    hessian = loss_hessian(loss, torch.cat(outputs), create_graph)
    jacobian = {
        name: torch.stack(column).reshape(len(inputs), -1, *parameters[name].shape)
        for name, column in zip(parameters, zip(*rows, strict=True), strict=True)
    }
    return Curvature(jacobian, hessian)


def _gradients(scalar: Tensor, tensors: list[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
    if not scalar.requires_grad or not tensors:
        return tuple(torch.zeros_like(t) for t in tensors)
    return torch.autograd.grad(
        scalar, tensors, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )


def hessian_diagonals(model: nn.Module, loss: Loss, inputs: Tensor, create_graph: bool = False) -> dict[str, Tensor]:
    """By name the diagonals [N, *P] of the Hessians of the samples' contributions, entry by entry."""
    parameters = trained(model)
    fixed = outputs_of(model, inputs).detach()
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for n in range(len(inputs)):
        # The other samples' outputs are constants, so that only sample n's contribution is differentiated.
        total = loss(torch.cat([fixed[:n], model(inputs[n : n + 1]), fixed[n + 1 :]]))
        gradients = _gradients(total, list(parameters.values()), create_graph=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            entries = []
            for i, entry in enumerate(gradient.flatten()):
                (second,) = _gradients(entry, [parameter], create_graph)
                entries.append(second.flatten()[i])
            rows[name].append(torch.stack(entries).reshape(parameter.shape))
    return {name: torch.stack(row) for name, row in rows.items()}


def square_root(hessian: Tensor) -> Tensor:
    """[V, N, D]: columns with sum_v s_vn s_vn^T = H_n, for positive semi-definite H [N, D, D]; V = D."""
    values, vectors = torch.linalg.eigh(hessian)
    assert (values >= -1e-10 * values.abs().max()).all(), "the loss is not convex in the outputs"
    return (vectors * values.clamp(min=0).sqrt()[:, None]).permute(2, 0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Kronecker factors
# ---------------------------------------------------------------------------------------------------------------------


class LayerUse(NamedTuple):
    """One call of a layer for the whole batch: G_vn = sum_r columns[v, n, r] patches[n, r]^T in every group."""

    patches: Tensor  # [N, R, groups, I]     what the weight multiplies at position r
    columns: Tensor  # [V, N, R, groups, O]   column v of a square root of the curvature at the layer's output


def patches(module: nn.Module, x: Tensor, output_size: tuple[int, ...]) -> Tensor:
    """[R, groups, I]: the rows that a layer multiplies with its weight, for the input x of one sample (no batch)."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, 1, x.shape[-1])
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    if not transposed:
        x = _padded(module, x)
    rows = []
    for position in itertools.product(*map(range, output_size)):
        row = torch.zeros(len(x), *module.kernel_size, dtype=x.dtype)
        for offset in itertools.product(*map(range, module.kernel_size)):
            place = [_place(module, d, o, k, transposed) for d, (o, k) in enumerate(zip(position, offset, strict=True))]
            if all(p is not None and 0 <= p < size for p, size in zip(place, x.shape[1:], strict=True)):
                row[(slice(None), *offset)] = x[(slice(None), *place)]
        rows.append(row.reshape(module.groups, -1))
    return torch.stack(rows)


def _place(module: nn.Module, d: int, o: int, k: int, transposed: bool) -> int | None:
    """The input position along dimension d that kernel entry k joins to output position o."""
    if not transposed:
        return o * module.stride[d] + k * module.dilation[d]  # of the padded input
    at, rest = divmod(o + module.padding[d] - k * module.dilation[d], module.stride[d])
    return None if rest else at


def _padded(module: nn.Module, x: Tensor) -> Tensor:
    """The input with the padding of a convolution around it."""
    if module.padding == "valid":
        return x
    sides = []  # last dimension first, as F.pad has it
    for d in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[d] * (module.kernel_size[d] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [module.padding[d]] * 2
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x[None], sides, mode=mode)[0]


def layer_uses(model: nn.Module, inputs: Tensor, roots: Tensor) -> dict[str, list[LayerUse]]:
    """By module name the calls of every Linear layer and convolution, for the columns `roots` [V, N, D] of H_n."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)}
    calls: list[tuple[str, Tensor, Tensor]] = []  # of one sample

    def note(name: str) -> Callable:
        return lambda _, inputs, output: calls.append((name, inputs[0], output)) if output.requires_grad else None

    handles = [m.register_forward_hook(note(name)) for name, m in layers.items()]
    collected: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}  # (name, number of the call) -> samples
    for n in range(len(inputs)):
        calls.clear()
        output = model(inputs[n : n + 1])
        outputs = [y for _, _, y in calls]
        gradients = [_gradients(output.flatten() @ root, outputs) for root in roots[:, n]]
        counts: dict[str, int] = {}
        for i, (name, x, y) in enumerate(calls):
            module = layers[name]
            number = counts[name] = counts.get(name, -1) + 1
            groups = getattr(module, "groups", 1)
            size = tuple(y.shape[2:]) if isinstance(module, nn.modules.conv._ConvNd) else ()
            rows = patches(module, x[0].detach(), size)
            columns = torch.stack([g[i][0] for g in gradients])  # [V, O, *size] or [V, *T, O]
            if size or not isinstance(module, nn.Linear):
                columns = columns.flatten(2).mT  # [V, R, O]
            columns = columns.reshape(len(roots), len(rows), groups, -1)
            collected.setdefault((name, number), []).append((rows, columns))
    for handle in handles:
        handle.remove()
    uses: dict[str, list[LayerUse]] = {}
    for (name, _), samples in collected.items():
        rows, columns = zip(*samples, strict=True)
        uses.setdefault(name, []).append(LayerUse(torch.stack(rows), torch.stack(columns, 1)))
    return uses


def joined(uses: list[LayerUse]) -> LayerUse:
    """All uses of a weight as one, with their positions behind each other."""
    return LayerUse(torch.cat([u.patches for u in uses], 1), torch.cat([u.columns for u in uses], 2))


def kronecker_factors(use: LayerUse, convention: str, is_linear: bool) -> tuple[Tensor, Tensor]:
    """(B [groups, O, O], A [groups, I, I]) of a layer's weight, summed term by term.

    expand:   A = 1/(N R) sum_nr a a^T,                     B = sum_vnr b b^T
    reduce:   A = 1/N sum_n (mean_r a)(mean_r a)^T,         B = sum_vn (sum_r b)(sum_r b)^T
    backpack: A = 1/N sum_nr a a^T,                         B = as reduce; of Linear layers: expand.
    """
    if convention == "backpack" and is_linear:
        convention = "expand"
    samples, positions, groups, size = use.patches.shape
    a = torch.zeros(groups, size, size, dtype=torch.float64)
    for n in range(samples):
        rows = use.patches[n].mean(0, keepdim=True) if convention == "reduce" else use.patches[n]
        for row in rows:  # [groups, I]
            a += row[:, :, None] * row[:, None, :]
    a /= samples * positions if convention == "expand" else samples
    groups = use.columns.shape[3]
    b = torch.zeros(groups, use.columns.shape[-1], use.columns.shape[-1], dtype=torch.float64)
    for v, n in itertools.product(range(len(use.columns)), range(samples)):
        rows = use.columns[v, n] if convention == "expand" else use.columns[v, n].sum(0, keepdim=True)
        for row in rows:
            b += row[:, :, None] * row[:, None, :]
    return b, a
