"""Products with Jacobians, Hessians and GGNs of whole models, against dense matrices."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import assert_close
from products_oracle import jacobian, loss_hessian
from torch import Tensor, nn

from backpack_cuda.hessianfree.ggnvp import ggn_vector_product, ggn_vector_product_from_plist
from backpack_cuda.hessianfree.hvp import hessian_vector_product
from backpack_cuda.hessianfree.lop import L_op, transposed_jacobian_vector_product
from backpack_cuda.hessianfree.rop import R_op, jacobian_vector_product


def case() -> tuple[nn.Module, Tensor, Tensor, list[nn.Parameter]]:
    """A model, its output and loss, and the parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    output = model(torch.randn(5, 3, dtype=torch.float64))
    return model, output, nn.functional.cross_entropy(output, torch.tensor([0, 1, 1, 0, 1])), list(model.parameters())


def like(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.randn_like(t) for t in tensors]


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def dense_hessian(loss: Tensor, parameters: list[Tensor]) -> Tensor:
    gradient = flat(torch.autograd.grad(loss, parameters, create_graph=True))
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in gradient]
    return torch.stack([flat(row) for row in rows])


def test_jacobians():
    _, output, _, parameters = case()
    rows = torch.cat(jacobian(output, parameters), 1)
    v, (w,) = like(parameters), like([output])
    for function in (R_op, jacobian_vector_product):
        (product,) = function(output, parameters, v)
        assert_close("J v", product.flatten(), rows @ flat(v), 1e-12)
        assert not product.requires_grad and function(output, parameters, v, detach=False)[0].requires_grad
    for function in (L_op, transposed_jacobian_vector_product):
        products = function(output, parameters, w)
        assert_close("J^T w", flat(products), rows.T @ w.flatten(), 1e-12)
        assert all(function(output, parameters, [w], detach=False)[i].requires_grad for i in range(3))
    products = function(output, parameters, w, retain_graph=False)
    with pytest.raises(RuntimeError, match="second time"):
        function(output, parameters, w)


def test_several_outputs_and_unused_inputs():
    x, y, unused = (torch.randn(n, dtype=torch.float64, requires_grad=True) for n in (2, 3, 4))
    outputs = (x.sin() * y.sum(), y.exp())
    v, w = like([x, y, unused]), like(list(outputs))
    stacked = torch.cat([torch.cat(jacobian(o, [x, y, unused]), 1) for o in outputs])
    assert_close("J v", flat(R_op(outputs, [x, y, unused], v)), stacked @ flat(v), 1e-12)
    assert_close("J^T w", flat(L_op(outputs, [x, y, unused], w)), stacked.T @ flat(w), 1e-12)
    assert torch.equal(R_op(outputs[1], unused, v[2])[0], torch.zeros(3, dtype=torch.float64))


def test_hessian():
    _, _, loss, parameters = case()
    dense, v = dense_hessian(loss, parameters), like(parameters)
    products = hessian_vector_product(loss, parameters, v)
    assert_close("H v", flat(products), dense @ flat(v), 1e-12)
    assert not any(p.requires_grad for p in products)
    known = torch.autograd.grad(loss, parameters, create_graph=True)
    assert_close("H v", flat(hessian_vector_product(loss, parameters, v, grad_params=known)), dense @ flat(v), 1e-12)
    (single,) = hessian_vector_product(loss, parameters[0], v[0])
    assert_close("a block", single.flatten(), dense[:12, :12] @ v[0].flatten(), 1e-12)
    third = torch.autograd.grad(hessian_vector_product(loss, parameters, v, detach=False)[0].sum(), parameters)
    assert all(torch.isfinite(t).all() for t in third)


def test_hessian_of_a_linear_function():
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(hessian_vector_product((2 * x).sum(), x, torch.ones(3))[0], torch.zeros(3))


def test_ggn():
    model, output, loss, parameters = case()
    rows = torch.cat(jacobian(output, parameters), 1)
    targets = torch.tensor([0, 1, 1, 0, 1])
    curvature = loss_hessian(lambda f: nn.functional.cross_entropy(f, targets), output)
    v = like(parameters)
    expected = rows.T @ (curvature @ (rows @ flat(v)))
    assert_close("G v", flat(ggn_vector_product(loss, output, model, v)), expected, 1e-12)
    block = ggn_vector_product_from_plist(loss, output, parameters[2:], v[2:])
    part = rows[:, 16:]
    assert_close("a block", flat(block), part.T @ (curvature @ (part @ flat(v[2:]))), 1e-12)
    model[0].weight.requires_grad_(False)
    assert len(ggn_vector_product(loss, output, model, v[1:])) == 3


def test_differentiable_ggn_of_a_relu_network_is_its_hessian():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    output = model(torch.randn(4, 3, dtype=torch.float64))
    loss, parameters = output.square().mean(), list(model.parameters())
    v = like(parameters)
    hessian = hessian_vector_product(loss, parameters, v)
    assert_close("G = H", flat(ggn_vector_product(loss, output, model, v)), flat(hessian), 1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda o, loss, p, v: R_op(o, p, v),
        lambda o, loss, p, v: hessian_vector_product(loss, p, v),
        lambda o, loss, p, v: ggn_vector_product_from_plist(loss, o, p, v),
    ],
)
def test_errors(call: Callable):
    _, output, loss, parameters = case()
    v = like(parameters)
    with pytest.raises(ValueError, match=r"expected 4 tensors, one for each of .*, got 3"):
        call(output, loss, parameters, v[:3])
    with pytest.raises(ValueError, match=r"\[1\]: expected the size \[4\] of .*\[1\], got \[5\]"):
        call(output, loss, parameters, [v[0], torch.randn(5), *v[2:]])
    with pytest.raises(TypeError, match="expected a Tensor or several, got float"):
        call(output, loss, parameters, [1.0, *v[1:]])


def test_errors_of_transposed_products_and_known_gradients():
    _, output, loss, parameters = case()
    with pytest.raises(ValueError, match=r"ws\[0\]: expected the size \[5, 2\] of ys\[0\], got \[2\]"):
        L_op(output, parameters, torch.ones(2))
    with pytest.raises(ValueError, match="grad_params: expected 4 tensors"):
        hessian_vector_product(loss, parameters, like(parameters), grad_params=[torch.ones(4, 3)])


def test_as_backpack():
    theirs = pytest.importorskip("backpack.hessianfree.ggnvp")
    model, output, loss, parameters = case()
    v = like(parameters)
    for ours, other in zip(
        ggn_vector_product(loss, output, model, copy.copy(v)),
        theirs.ggn_vector_product(loss, output, model, v),
        strict=True,
    ):
        assert_close("G v", ours, other, 1e-12)
