"""What a probe costs: two products, four in the first, and the gradient evaluations of its source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness.problems import PROBLEMS
from tests.helpers import FORWARD_COST, batch_of, closure_for, closure_of, loss_fn, mlp, monitor, train
from warmctl import AdaptiveWarmup


class CountedModel(nn.Module):
    """Counts the forward passes that are followed by a backward pass through it, and those that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.gradients, self.forwards = mlp(), 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.gradients += torch.is_grad_enabled()
        self.forwards += not torch.is_grad_enabled()
        return self.body(x)


class CountedOwnLoss(CountedModel):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": F.mse_loss(super().forward(x), y)}


def probe_costs(
    opt: AdaptiveWarmup, model: CountedModel, step: Callable[[Any], None], forwards: int = 2
) -> list[float]:
    """Gradient evaluations spent on the probe of each step, by the metrics; they are those really made.

    So are the forward passes of each step's look.
    """
    costs, before = [], 0.0
    for index in range(3):
        model.gradients = model.forwards = 0
        step(batch_of(index))
        total = opt.metrics["overhead"] * (index + 1) - forwards * FORWARD_COST * (index + 1)
        assert model.gradients - 1 == pytest.approx(total - before)
        assert model.forwards == forwards
        costs.append(round(total - before, 6))
        before = total
        assert opt.metrics["hvps"] == 2 * (index + 2) and opt.metrics["probes"] == index + 1
    return costs


def counted(model: CountedModel, **options: Any) -> AdaptiveWarmup:
    base = torch.optim.SGD(model.parameters(), 0.1)
    return monitor(model, base, probe_steps=2, hvp="finite_difference", **options)


def test_cost_of_a_closure_one_more_at_the_first_probe() -> None:
    model = CountedModel()
    opt = counted(model)
    assert probe_costs(opt, model, lambda b: opt.step(closure_for(opt, model, b)), forwards=1) == [5, 2, 2]


def test_cost_of_a_clipped_gradient_no_more() -> None:
    model = CountedModel()
    opt = counted(model)

    def step(batch: Any) -> None:
        def closure() -> Tensor:
            loss = closure_for(opt, model, batch)()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            return loss

        opt.step(closure)

    assert probe_costs(opt, model, step, forwards=1) == [5, 2, 2]


def test_cost_of_an_observed_batch_one_more() -> None:
    model = CountedModel()
    opt = counted(model, loss_fn=loss_fn)

    def step(batch: Any) -> None:
        closure_for(opt, model, batch)()
        opt.observe(batch)
        opt.step()

    assert probe_costs(opt, model, step) == [5, 3, 3]


@pytest.mark.parametrize("clipped", [False, True])
def test_cost_of_a_captured_loss(clipped: bool) -> None:
    model = CountedOwnLoss()
    opt = counted(model)

    def step(batch: Any) -> None:
        opt.zero_grad()
        model(*batch)["loss"].backward()
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        opt.step()

    assert probe_costs(opt, model, step) == [5, 2, 2]


def test_auto_pays_for_its_comparison_once() -> None:
    model = mlp()
    opt = monitor(model, torch.optim.SGD(model.parameters(), 0.1), probe_steps=2)
    rows = train(opt, model, range(4))
    spent = [row["overhead"] * (i + 1) for i, row in enumerate(rows)]
    assert spent[0] > 4
    assert np.diff(spent) == pytest.approx([2 + FORWARD_COST] * 3)


def test_a_failed_probe_is_paid_for() -> None:
    class Failing(CountedModel):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if self.gradients == 3 and torch.is_grad_enabled():
                raise RuntimeError("too much")
            return out

    model = Failing()
    opt = counted(model)
    with pytest.warns(RuntimeWarning, match="too much"):
        opt.step(closure_for(opt, model, batch_of(0)))
    assert opt.meter.last is not None and opt.meter.last.cost == 2
    assert opt.metrics["overhead"] == pytest.approx(2 + FORWARD_COST)


def test_kinks_do_not_make_a_probe_dearer_in_full_precision() -> None:
    """At this initialisation a finite difference across the kinks is 2.3 times the exact quotient away from it."""
    problem = PROBLEMS["cnn"]
    model = problem.build(2)
    opt = AdaptiveWarmup(problem.optimizer(model.parameters(), problem.tuned_lr), model)
    batch = next(problem.batches(2))
    opt.step(closure_of(opt, lambda: problem.loss(model, batch)))
    assert opt.meter.estimator.method == "finite_difference"
    # can it be repeated, in which precision, four products from cold
    assert opt.metrics["overhead"] == pytest.approx(1 + 1 + 4 + FORWARD_COST)
