"""Which method the operator takes, what it falls back to, and what products cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.helpers import replay
from tests.problems_closed_form import tanh_mlp
from warmctl.curvature.operators import METHODS, HessianOperator
from warmctl.vectors import random_like

EXACT = ["double_backward", "forward_over_reverse"]


def test_auto_takes_the_cheapest_that_works() -> None:
    problem = tanh_mlp()
    gradient = replay(problem).gradient()[1]
    assert HessianOperator(problem.loss, problem.params).method == "double_backward"
    operator = HessianOperator(problem.loss, problem.params, gradient=gradient)
    assert operator.method == "finite_difference"
    operator.matvec(random_like(operator.template, 0))
    assert (operator.method, operator.fallback) == ("finite_difference", "")


def test_auto_falls_back_once_and_says_why() -> None:
    torch.manual_seed(0)
    bag, target = nn.EmbeddingBag(5, 3), torch.tensor([0, 2])
    tokens = torch.tensor([[0, 1], [2, 4]])
    operator = HessianOperator(lambda: F.cross_entropy(bag(tokens), target), list(bag.parameters()))
    vector = random_like(operator.template, 0)
    first, second = operator.matvec(vector), operator.matvec(vector)
    assert operator.method == "finite_difference"
    assert "embedding_bag" in operator.fallback
    assert torch.equal(first[0], second[0])
    assert operator.hvps == 2
    assert operator.cost == pytest.approx(1.3 + 2.4 + 3)  # the attempt; one gradient; two displaced gradients


def test_a_forced_method_does_not_fall_back() -> None:
    bag = nn.EmbeddingBag(5, 3)
    loss = lambda: bag(torch.tensor([[0, 1]])).square().sum()  # noqa: E731
    for method in EXACT:
        operator = HessianOperator(loss, list(bag.parameters()), method)
        with pytest.raises(RuntimeError):
            operator.matvec(random_like(operator.template, 0))


def test_auto_leaves_an_exact_product_that_is_not_finite() -> None:
    """|w|^1.5 has a gradient at 0 but no second derivative there."""
    w = nn.Parameter(torch.tensor([0.0, 1.0, 2.0]))

    def loss() -> Tensor:
        return w.abs().pow(1.5).sum()

    exact = HessianOperator(loss, [w], "double_backward").matvec([torch.ones(3)])
    assert not torch.isfinite(exact[0]).all()
    operator = HessianOperator(loss, [w])
    product = operator.matvec([torch.ones(3)])
    assert operator.method == "finite_difference" and "not finite" in operator.fallback
    assert torch.isfinite(product[0]).all()


# Cost -------------------------------------------------------------------------------------------------------


def test_cost_is_counted_in_gradient_evaluations() -> None:
    problem = tanh_mlp()
    gradient = replay(problem).gradient()[1]
    expected = {
        ("finite_difference", False, True): 2.0,
        ("finite_difference", False, False): 3.0,
        ("finite_difference", True, True): 4.0,
        ("double_backward", False, False): 1.3 + 2 * 2.4,
        ("forward_over_reverse", False, False): 2 * 3.3,
    }
    for (method, central, given), cost in expected.items():
        evaluations = 0

        def loss() -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return problem.loss()

        operator = HessianOperator(loss, problem.params, method, gradient=gradient if given else None, central=central)
        for seed in range(2):
            operator.matvec(random_like(operator.template, seed))
        assert operator.cost == pytest.approx(cost)
        assert operator.hvps == 2
        if method == "finite_difference":
            assert evaluations == cost  # counted, not claimed
        else:
            assert evaluations == (1 if method == "double_backward" else 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("central", [False, True])
def test_the_present_gradient_is_nothing_extra_where_products_need_it(method: str, central: bool) -> None:
    problem = tanh_mlp()
    operator = HessianOperator(problem.loss, problem.params, method, central=central)
    gradient = operator.present_gradient()
    torch.testing.assert_close(gradient, list(torch.autograd.grad(problem.loss(), problem.params)))
    for g in gradient:
        g.zero_()  # it belongs to the caller
    vector = random_like(problem.params, 0)
    product = operator.matvec(vector)
    other = HessianOperator(problem.loss, problem.params, method, central=central)
    torch.testing.assert_close(product, other.matvec(vector))
    extra = operator.cost - other.cost
    assert extra == pytest.approx(1.0 if method == "forward_over_reverse" or (central and "finite" in method) else 0.0)


def test_the_present_gradient_falls_back_with_the_products() -> None:
    torch.manual_seed(0)
    bag, tokens, target = nn.EmbeddingBag(6, 3), torch.randint(6, (12, 2)), torch.randint(3, (12,))

    def loss() -> Tensor:
        return F.cross_entropy(bag(tokens), target)

    operator = HessianOperator(loss, list(bag.parameters()))
    gradient = operator.present_gradient()
    torch.testing.assert_close(gradient, list(torch.autograd.grad(loss(), list(bag.parameters()))))
    operator.matvec([torch.ones_like(g) for g in gradient])
    assert operator.method == "finite_difference" and operator.fallback
