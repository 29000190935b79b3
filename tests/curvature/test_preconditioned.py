"""The Hessian scaled by the step of an optimizer: D^½ (H + c) D^½ against the dense matrix."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.curvature.helpers import replay
from tests.problems_closed_form import (
    Problem,
    batch_norm,
    dense_hessian,
    flat,
    linear_regression,
    oracle,
    tanh_mlp,
    transformer,
)
from warmctl.curvature.eigen import lanczos
from warmctl.curvature.operators import HessianOperator
from warmctl.curvature.scaled import ScaledOperator
from warmctl.rates import learning_rate
from warmctl.stability.update_rules import update_rule
from warmctl.vectors import random_like, significant


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scaled_operator_is_the_dense_product(sign: float) -> None:
    problem = tanh_mlp()
    operator = HessianOperator(problem.loss, problem.params, "double_backward")
    root = [t.abs() + 0.1 for t in random_like(operator.template, 5)]
    root[0][0] = 0.0  # a coordinate that the coming step does not move
    decay = [0.1 * (i + 1) for i in range(len(root))]
    shift = np.concatenate([np.full(t.numel(), d) for t, d in zip(root, decay, strict=True)])
    d = flat(root)
    dense = d[:, None] * (sign * oracle(problem) + np.diag(shift)) * d[None, :]
    scaled = ScaledOperator(operator, root, decay, sign)
    vector = random_like(operator.template, 1)
    np.testing.assert_allclose(flat(scaled.matvec(vector)), dense @ flat(vector), atol=1e-5)
    result = lanczos(scaled, steps=60, tol=1e-5)
    assert result.eigenvalue == pytest.approx(np.linalg.eigvalsh(dense)[-1], rel=1e-4)
    assert operator.hvps == 1 + result.hvps


def test_scaling_without_decay_leaves_the_vector_alone() -> None:
    problem = linear_regression()
    operator = HessianOperator(problem.loss, problem.params, "double_backward")
    root = [torch.full_like(t, 2.0) for t in operator.template]
    vector = random_like(root, 0)
    before = flat(vector)
    found = ScaledOperator(operator, root).matvec(vector)
    np.testing.assert_allclose(flat(found), 4 * oracle(problem) @ before, atol=1e-5)
    assert np.array_equal(flat(vector), before)


def largest_entry(gradient: list[Tensor]) -> float:
    return max(float(g.abs().max()) for g in gradient)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adam": lambda params: torch.optim.Adam(params, lr=1e-2),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1),
    "Adam, L2": lambda params: torch.optim.Adam(params, lr=1e-2, weight_decay=0.3),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("make", [tanh_mlp, batch_norm, transformer], ids=lambda make: make.__name__)
def test_preconditioned_by_the_state_of_adam(
    make: Callable[[], Problem], optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
) -> None:
    """λ_max(D^½ (H + c) D^½), D = η / (τ P q) of the update rule, against the dense matrix; and D itself."""
    problem = make()
    opt = optimizer(problem.params)
    for _ in range(3):
        opt.zero_grad()
        problem.loss().backward()
        opt.step()
    opt.zero_grad()
    problem.loss().backward()
    group, rule = opt.param_groups[0], update_rule(opt)
    assert rule is not None
    grads = [p.grad for p in problem.params]
    scale = rule.scale([p.detach() for p in problem.params], grads, [opt.state[p] for p in problem.params], group)
    decay = rule.coupled_decay(group)

    beta1, beta2 = group["betas"]
    for p, d in zip(problem.params, scale, strict=True):
        g = p.grad + decay * p.detach()
        v = (beta2 * opt.state[p]["exp_avg_sq"] + (1 - beta2) * g**2) / (1 - beta2**4)
        edge = 2 * (1 + beta1) / (1 - beta1) * (1 - beta1**4)
        torch.testing.assert_close(d, learning_rate(group) / edge / (v.sqrt() + group["eps"]), rtol=1e-4, atol=0)

    hessian = dense_hessian(problem.model, problem.loss_fn, problem.batch)
    everywhere = [d.sqrt() for d in scale]
    moved = [r * keep for r, keep in zip(everywhere, significant(grads, largest_entry(grads)), strict=True)]
    for method, root, tolerance in (
        ("double_backward", everywhere, 1e-4),
        ("double_backward", moved, 1e-4),
        ("finite_difference", moved, 1e-2),
    ):
        d = flat(root)
        top = np.linalg.eigvalsh(d[:, None] * (hessian + decay * np.eye(len(d))) * d[None, :])[-1]
        operator = HessianOperator(replay(problem), problem.params, method)
        result = lanczos(ScaledOperator(operator, root, [decay] * len(root)), steps=60, tol=1e-4)
        assert result.eigenvalue == pytest.approx(top, rel=tolerance)


@pytest.mark.parametrize("make", [batch_norm, transformer], ids=lambda make: make.__name__)
def test_entries_whose_gradient_is_rounding_are_left_out_of_differences(make: Callable[[], Problem]) -> None:
    """A bias before batch norm, a key bias, an absent token: 1/√v̂ is enormous, the curvature zero."""
    problem = make()
    evaluated = replay(problem)
    gradient = evaluated.gradient()[1]
    everywhere = [(g.abs() + 1e-8).rsqrt() for g in gradient]  # Adam's first step
    moved = [r * keep for r, keep in zip(everywhere, significant(gradient, largest_entry(gradient)), strict=True)]
    assert 0 < sum(int((r == 0).sum()) for r in moved) < sum(r.numel() for r in moved) / 2

    def ratio(method: str, root: list[Tensor]) -> float:
        operator = HessianOperator(evaluated, problem.params, method, gradient=gradient)
        return lanczos(ScaledOperator(operator, root), steps=40, tol=1e-4).eigenvalue

    exact = ratio("double_backward", everywhere)
    assert ratio("double_backward", moved) == pytest.approx(exact, rel=1e-3)  # nothing is lost
    assert ratio("finite_difference", moved) == pytest.approx(exact, rel=1e-2)
    assert ratio("finite_difference", everywhere) > 5 * exact  # the hazard
