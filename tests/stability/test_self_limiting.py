"""Rules whose step shrinks where the curvature is high: their edge is where step and eigenvector are one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import batch_of, closure_for, loss_fn, mlp
from tests.problems_closed_form import dense_hessian
from warmctl import AdaptiveWarmup
from warmctl.stability.estimator import INCOHERENT, LARGEST_SLACK, _step_slack
from warmctl.stability.update_rules import update_rule


def test_rmsprops_edge_is_where_its_step_points_along_the_top_eigenvector() -> None:
    """λ, and a share (λ/ρ)² for the quotient ρ along the step: both from the dense Hessian of the batch."""
    model = mlp().double()
    batch = tuple(t.double() for t in batch_of(0, 64))
    base = torch.optim.RMSprop(model.parameters(), 1e-3)
    opt = AdaptiveWarmup(base, model, control=False, every=1, hvp="double_backward")
    for _ in range(40):
        opt.step(closure_for(opt, model, batch))
    params = list(model.parameters())
    gradient = torch.autograd.grad(loss_fn(model, batch), params)
    squares = [0.99 * base.state[p]["square_avg"] + 0.01 * g * g for p, g in zip(params, gradient, strict=True)]
    d = torch.cat([1e-3 / 2 / (v.sqrt() + 1e-8) for v in map(torch.ravel, squares)]).numpy()
    a = np.sqrt(d)[:, None] * dense_hessian(model, loss_fn, batch) * np.sqrt(d)
    u = np.sqrt(d) * np.concatenate([g.numpy().ravel() for g in gradient])
    along = u @ a @ u / (u @ u)
    opt.step(closure_for(opt, model, batch))
    found = opt.meter.last
    assert found is not None and found.noisy
    expected = min((found.ratio / along) ** 2, LARGEST_SLACK) if along > 0 else LARGEST_SLACK
    assert found.share == pytest.approx(max(expected, 1.0), rel=1e-6)
    assert found.ratio == pytest.approx(np.linalg.eigvalsh(a).max(), rel=0.05)


@pytest.mark.parametrize(
    "eigenvalue, along, slack",
    [(4.0, 4.0, 1.0), (4.0, 2.0, 4.0), (4.0, 0.4, LARGEST_SLACK), (4.0, 0.0, LARGEST_SLACK), (4.0, -1.0, LARGEST_SLACK),
     (0.0, -1.0, 1.0), (-2.0, -3.0, 1.0), (2.0, 4.0, 1.0)],
)  # fmt: skip
def test_slack_of_a_self_limiting_rule(eigenvalue: float, along: float, slack: float) -> None:
    """(λ/ρ)²: none where step and eigenvector are one, bounded, and none without positive curvature."""
    assert _step_slack(eigenvalue, along) == pytest.approx(slack)


@pytest.mark.parametrize(
    "make, limited",
    [
        (lambda p: torch.optim.RMSprop(p, 0.1), True),
        (lambda p: torch.optim.Adagrad(p, 0.1), True),
        (lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9), False),
        (lambda p: torch.optim.Adam(p, 0.1), False),
        (lambda p: torch.optim.SGD(p, 0.1), False),
    ],
)
def test_only_adaptive_rules_without_momentum_limit_themselves(make: Any, limited: bool) -> None:
    model, batch = mlp(), batch_of(32)
    opt = AdaptiveWarmup(make(model.parameters()), model, control=False, every=1)
    for _ in range(2):
        opt.step(closure_for(opt, model, batch))
    rule = update_rule(opt.base)
    assert rule is not None and rule.self_limiting(opt.param_groups[0]) == limited
    assert opt.meter.last is not None and opt.meter.last.noisy == limited
    assert 0 < INCOHERENT < 1
