"""What a product leaves as it was: parameters, gradients, graphs, and what belongs to the caller."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.curvature.helpers import replay
from tests.problems_closed_form import Problem, awkward, batch_norm, tanh_mlp
from warmctl.curvature.eigen import lanczos
from warmctl.curvature.operators import METHODS, HessianOperator
from warmctl.vectors import random_like


def bits(params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("make", [tanh_mlp, batch_norm, awkward], ids=lambda make: make.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_buffers_stay_bit_for_bit(make: Callable[[], Problem], method: str) -> None:
    problem = make()
    before = copy.deepcopy(problem.model.state_dict())
    addresses = [p.data_ptr() for p in problem.params]
    lanczos(HessianOperator(replay(problem), problem.params, method), steps=4)
    for name, value in problem.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert [p.data_ptr() for p in problem.params] == addresses
    assert all(p.grad is None for p in problem.model.parameters())


@pytest.mark.parametrize("central", [False, True])
def test_parameters_are_put_back_when_the_loss_raises(central: bool) -> None:
    problem = tanh_mlp()
    calls = 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyError("in the middle of a product")
        return problem.loss()

    before = bits(problem.params)
    for p in problem.params:
        p.grad = torch.ones_like(p)
    operator = HessianOperator(loss, problem.params, "finite_difference", central=central)
    with pytest.raises(KeyError):
        operator.matvec(random_like(operator.template, 0))
    assert calls == 2
    assert all(torch.equal(p, b) for p, b in zip(problem.params, before, strict=True))
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in problem.params)


def test_a_graph_that_is_alive_stays_valid() -> None:
    """A probe between forward and backward: displaced and restored parameters must not look modified."""
    problem = batch_norm()
    wanted = torch.autograd.grad(problem.loss(), problem.params)
    loss = problem.loss()
    HessianOperator(replay(problem), problem.params, "finite_difference").matvec(random_like(problem.params, 0))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(loss, problem.params), wanted, strict=True))


def test_the_graph_is_dropped_on_closing() -> None:
    problem = tanh_mlp()
    with HessianOperator(problem.loss, problem.params, "double_backward") as operator:
        operator.matvec(random_like(operator.template, 0))
        assert operator._graph is not None
    assert operator._graph is None and operator.gradient is None


def test_a_kept_graph_does_not_hold_the_gradient() -> None:
    problem = tanh_mlp()
    with HessianOperator(problem.loss, problem.params, "double_backward") as operator:
        operator.matvec([torch.ones_like(p) for p in problem.params])
        assert operator._graph is not None
        assert not any(isinstance(end, Tensor) for end in operator._graph)


def test_a_known_gradient_is_not_written_to() -> None:
    problem = tanh_mlp()
    gradient = replay(problem).gradient()[1]
    before = [g.clone() for g in gradient]
    operator = HessianOperator(problem.loss, problem.params, "finite_difference", gradient=gradient)
    a = operator.matvec(random_like(operator.template, 0))
    b = operator.matvec(random_like(operator.template, 0))
    assert all(torch.equal(x, y) for x, y in zip(before, gradient, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_products_belong_to_the_caller(method: str) -> None:
    """Autograd may return an expanded scalar or the vector that went in; both must be safe to write to."""
    w = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    for loss in (lambda: 0.5 * w.sum() ** 2, lambda: HalfSquare.apply(w)):
        if method == "forward_over_reverse" and loss() == HalfSquare.apply(w):
            continue
        operator = HessianOperator(loss, [w], method)
        vector = [torch.tensor([1.0, 0.0, 0.0])]
        first = operator.matvec(vector)
        kept = first[0].clone()
        first[0].add_(100.0)
        assert torch.equal(vector[0], torch.tensor([1.0, 0.0, 0.0]))
        assert torch.equal(operator.matvec(vector)[0], kept)


class HalfSquare(torch.autograd.Function):
    """½‖x‖², whose double backward hands the vector through."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 0.5 * x.square().sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return Scale.apply(ctx.saved_tensors[0], grad)


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, grad: Tensor) -> Tensor:
        return x * grad

    @staticmethod
    def backward(ctx, vector: Tensor) -> tuple[Tensor, None]:
        return vector, None
