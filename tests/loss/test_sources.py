"""Which source of the loss is taken when there are several; all leave the same trajectory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import FORWARD_COST, batch_of, closure_for, loss_fn, mlp, weights
from tests.loss.helpers import FORMS, Returns, dense, exact_monitor, loss_of, sharpness_of


def test_closure_comes_before_an_observed_batch() -> None:
    model = mlp()
    expected = dense(model, batch_of(0))
    opt = exact_monitor(model, loss_fn=lambda m, b: 100 * loss_fn(m, b))
    opt.observe(batch_of(1))
    opt.step(closure_for(opt, model, batch_of(0)))
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_observed_batch_comes_before_the_models_own_loss() -> None:
    model = Returns(FORMS["dict"])
    expected = 100 * dense(model.body, batch_of(1))
    opt = exact_monitor(model, loss_fn=lambda m, b: 100 * loss_fn(m.body, b))
    opt.zero_grad()
    loss_of(model(*batch_of(0))).backward()
    opt.observe(batch_of(1))
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_the_models_own_loss_comes_before_the_live_graph() -> None:
    model = Returns(FORMS["dict"])
    opt = exact_monitor(model, hvp="finite_difference", probe_steps=2)
    opt.zero_grad()
    opt.backward(loss_of(model(*batch_of(0))))
    opt.step()
    assert opt.metrics["overhead"] == pytest.approx(5 + 2 * FORWARD_COST)  # four products and the check


def test_the_sources_leave_the_same_trajectory() -> None:
    ends = []
    for source in ("bare", "closure", "observe", "backward"):
        model = mlp()
        base = torch.optim.AdamW(model.parameters(), 0.01)
        opt: Any = base if source == "bare" else exact_monitor(model, base, loss_fn=loss_fn, probe_steps=2)
        for step in range(4):
            if source == "closure":
                opt.step(closure_for(opt, model, batch_of(step)))
                continue
            opt.zero_grad()
            loss = loss_fn(model, batch_of(step))
            if source == "backward":
                opt.backward(loss)
            else:
                loss.backward()
            if source == "observe":
                opt.observe(batch_of(step))
            opt.step()
        ends.append(weights(model))
    assert all(torch.equal(end, ends[0]) for end in ends[1:])
