"""Losses, gradients and rates that are not finite, zero or absent: a safe fallback."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_same, batch_of, closure_of, everything, loss_fn, mlp, monitor, train, weights
from warmctl import AdaptiveWarmup


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("every", [1, "auto"])
@pytest.mark.parametrize("at", [0, 6])
def test_a_loss_or_gradient_that_is_not_finite_never_raises_the_scale(
    value: float, what: str, every: Any, at: int
) -> None:
    model = mlp()
    opt = AdaptiveWarmup(torch.optim.SGD(model.parameters(), 3.0), model, every=every, target=0.1)
    train(opt, model, range(at))
    scale = opt.metrics["scale"]
    start = {name: t.clone() for name, t in model.state_dict().items()}

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_fn(model, batch_of(at))
        loss.backward()
        if what == "gradient":
            for p in model.parameters():
                p.grad.mul_(value)  # type: ignore[union-attr]
            return loss
        return loss * value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            opt.step(closure)
            assert math.isfinite(opt.metrics["scale"])
            assert opt.metrics["scale"] <= scale
            assert opt.metrics["phase"] == "warmup"
            model.load_state_dict(start)  # as a loop does that goes back to its last good weights
        assert opt.sources.verdict.repeats == (1.0 if at else -1.0)
        train(opt, model, range(3))
    assert opt.meter.last is not None and not opt.meter.last.reason


@pytest.mark.parametrize("source", ["closure", "none"])
def test_gradients_none(source: str) -> None:
    model = mlp()
    opt = monitor(model)
    opt.zero_grad()
    before = everything(model, opt)
    if source == "closure":
        opt.step(lambda: torch.zeros(()))
    else:
        opt.step()
    assert_same(everything(model, opt), before)
    assert opt.metrics["step"] == 0


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_all_zero_gradients(base: Any) -> None:
    model = mlp()
    opt = AdaptiveWarmup(base(model.parameters(), 0.1), model, every=1)
    closure = closure_of(opt, lambda: 0.0 * loss_fn(model, batch_of(0)))
    for _ in range(3):
        opt.step(closure)
    assert opt.meter.last is not None and opt.meter.last.ratio == 0.0
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_constant_loss_after_the_model_is_cut_off() -> None:
    model = mlp()
    opt = monitor(model)

    def closure() -> Tensor:
        opt.zero_grad()
        return loss_fn(model, batch_of(0)).detach()

    opt.step(closure)
    assert opt.metrics["step"] == 0


@pytest.mark.parametrize("rate", [0.0, torch.tensor(0.0)])
def test_rate_zero(rate: Any) -> None:
    """The first step of a schedule from zero: nothing is measured or decided, momentum builds up."""
    model, bare = mlp(), mlp()
    opt = monitor(model, torch.optim.AdamW(model.parameters(), rate))
    plain = torch.optim.AdamW(bare.parameters(), 0.0)
    train(opt, model, range(2))
    train(plain, bare, range(2))
    assert_same(weights(model), weights(bare))
    assert opt.metrics["step"] == 0 and opt.metrics["probes"] == 0
    for group in opt.param_groups:
        group["lr"] = 1e-3
    train(opt, model, range(2))
    assert opt.metrics["probes"] == 2 and opt.metrics["sharpness"] > 0


def test_one_group_at_rate_zero() -> None:
    model = mlp()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    base = torch.optim.SGD([{"params": first, "lr": 0.0}, {"params": second, "lr": 0.1}], lr=0.1)
    opt = monitor(model, base)
    train(opt, model, range(2))
    assert opt.metrics["sharpness"] > 0 and opt.metrics["stability_ratio"] > 0
