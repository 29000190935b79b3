"""How much farther steps lead that momentum makes alike, against random walks; and what the law makes of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Optimizer, RMSprop

from tests.helpers import batch_of, closure_for, mlp
from warmctl import AdaptiveWarmup
from warmctl.momentum import persistence


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_it_is_the_ratio_of_two_random_walks(beta: float) -> None:
    """Of SGD with momentum β on noise alone, over steps as long on average without it."""
    torch.manual_seed(0)
    walkers, steps = torch.zeros(20000, requires_grad=True), 400
    opt = SGD([walkers], lr=1.0, momentum=beta)
    for t in range(steps + 100):
        before = walkers.detach().clone()
        walkers.grad = torch.randn(walkers.shape)
        opt.step()
        if t == 99:  # the buffer is full
            start = walkers.detach().clone()
    length = float((walkers.detach() - before).square().mean().sqrt())
    distance = float((walkers.detach() - start).square().mean().sqrt())
    assert distance / (length * steps**0.5) == pytest.approx(persistence(opt.param_groups), rel=0.03)


GROUPS: list[tuple[Any, float]] = [
    (lambda p: SGD(p, 0.1, momentum=0.8), 3.0),
    (lambda p: AdamW(p, betas=(0.8, 0.99)), 3.0),
    (lambda p: RMSprop(p, momentum=0.8), 3.0),
    (RMSprop, 1.0),
    (Adagrad, 1.0),
    (Adafactor, 1.0),
    (lambda p: SGD([{"params": p[:1]}, {"params": p[1:], "momentum": 0.8}], 0.1), 3.0),
]


@pytest.mark.parametrize("build, expected", GROUPS)
def test_it_is_read_off_the_groups_by_the_largest(build: Any, expected: float) -> None:
    assert persistence(build(list(mlp().parameters())).param_groups) == pytest.approx(expected)


def test_a_momentum_under_another_name_and_one_that_never_ends() -> None:
    assert persistence([{"beta1": 0.8}]) == pytest.approx(3.0)
    assert persistence([{"beta1": None}]) == persistence([{"momentum": None}]) == persistence([]) == 1.0
    assert 30.0 < persistence([{"momentum": 1.0}]) < 50.0
    assert persistence([{"betas": (torch.tensor(0.8), 0.9)}]) == pytest.approx(3.0)


@pytest.mark.parametrize("momentum, expected", [(0.0, 1.0), (0.8, 3.0)])
def test_the_law_is_given_it_at_each_step(momentum: float, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    base: Optimizer = SGD(model.parameters(), 0.1, momentum=momentum)
    opt = AdaptiveWarmup(base, model)
    given, update = [], opt.controller.update
    monkeypatch.setattr(opt.controller, "update", lambda *args: (given.append(args[-1]), update(*args))[1])
    for index in range(3):
        opt.step(closure_for(opt, model, batch_of(index)))
    assert given == pytest.approx([expected] * 3)
