"""An observed batch as the source of the loss: for one step, and waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers import batch_of, closure_for, loss_fn, mlp
from tests.loss.helpers import dense, exact_monitor, sharpness_of


def test_observed_batch() -> None:
    model = mlp()
    expected = dense(model)
    opt = exact_monitor(model, loss_fn=loss_fn)
    closure_for(opt, model, batch_of(0))()
    opt.observe(batch_of(0))
    opt.step()
    assert sharpness_of(opt) == pytest.approx(expected, rel=1e-3)


def test_a_batch_is_observed_for_one_step_only() -> None:
    model = mlp()
    opt = exact_monitor(model, loss_fn=loss_fn)
    closure_for(opt, model, batch_of(0))()
    opt.observe(batch_of(0))
    opt.step()
    closure_for(opt, model, batch_of(1))()
    opt.step()
    assert opt.metrics["probes"] == 1


@pytest.mark.parametrize("rule", [torch.optim.SGD, torch.optim.Rprop])
@pytest.mark.parametrize("first", [0, 5])
def test_a_probe_waits_for_a_step_with_a_batch(first: int, rule: Any) -> None:
    model = mlp()
    opt = exact_monitor(model, rule(model.parameters(), 1e-3), loss_fn=loss_fn, control=True)
    probed = []
    for step in range(36):
        closure_for(opt, model, batch_of(step))()
        if step % 10 == first:
            opt.observe(batch_of(step))
        probes = opt.metrics["probes"]
        opt.step()
        if opt.metrics["probes"] > probes:
            probed.append(step)
    assert probed == list(range(first, 36, 10))


def test_a_loss_fn_that_never_sees_a_batch_is_warned_of_once() -> None:
    model = mlp()
    opt = exact_monitor(model, loss_fn=loss_fn, control=True)
    with pytest.warns(RuntimeWarning, match="observe") as caught:
        for step in range(120):
            closure_for(opt, model, batch_of(step))()
            opt.step()
    assert len(caught) == 1 and opt.metrics["probes"] == 0
