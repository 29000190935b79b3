"""Optimizers whose update rule is not known: measured along the update that they make."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import closure_of, mlp, monitor
from warmctl import AdaptiveWarmup


class Lion(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1e-3, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["momentum"])
                    p.sub_(average.sign(), alpha=group["lr"])
                    p.grad.zero_()  # an optimizer may do as it likes with the gradient
        return loss


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation in the form that calls its closure twice."""

    def __init__(self, params: Any, lr: float = 0.1, radius: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "radius": radius})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        closure = torch.enable_grad()(closure)
        loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        ascent = [p.grad * (self.param_groups[0]["radius"] / norm) for p in params]
        for p, e in zip(params, ascent, strict=True):
            p.add_(e)
        closure()
        for p, e in zip(params, ascent, strict=True):
            p.sub_(e).sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return loss


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        root = torch.randn(6, 6, dtype=torch.float64)
        self.curvature = root @ root.T / 6
        self.matrix = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def forward(self) -> Tensor:
        flat = self.matrix.flatten()
        return 0.5 * flat @ self.curvature @ flat


UNKNOWN: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Rprop": lambda p: torch.optim.Rprop(p, 1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 1e-2),
    "Lion": Lion,
    "SAM": Sam,
}
if hasattr(torch.optim, "Muon"):
    UNKNOWN["Muon"] = lambda p: torch.optim.Muon(p, 1e-2)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_rules_are_measured_along_the_update_they_make(name: str, clipped: bool) -> None:
    model = Quadratic()
    opt = monitor(model, UNKNOWN[name](model.parameters()), hvp="double_backward")
    assert opt.meter.rule is None

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model()
        loss.backward()
        if clipped:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        return loss

    for _ in range(3):
        before = model.matrix.detach().flatten().clone()
        opt.step(closure)
        update = model.matrix.detach().flatten() - before
        gradient = model.curvature @ before
        expected = -0.5 * float(update @ model.curvature @ update) / float(gradient @ update)
        assert opt.meter.last is not None
        if float(gradient @ update) < 0:
            assert opt.meter.last.ratio == pytest.approx(expected, rel=1e-6)
        else:
            assert "descend" in opt.meter.last.reason
    assert opt.counts.probes == 3


def test_unknown_rule_under_control_gets_off_the_ground() -> None:
    """The first step has no update to measure along yet; it must not be so small that there never is one."""
    model = Quadratic()
    opt = AdaptiveWarmup(Lion(model.parameters(), 1e-3), model)
    closure = closure_of(opt, model)
    first = float(model().detach())
    for _ in range(30):
        opt.step(closure)
    assert opt.meter.last is not None and opt.meter.last.ratio > 0
    assert opt.metrics["scale"] > 1e-3 and float(model().detach()) < first


def test_ratio_of_an_unknown_rule_is_at_the_full_rate() -> None:
    """Measured along a scaled update and divided by the scale."""
    model = Quadratic()
    opt = AdaptiveWarmup(Lion(model.parameters(), 1e-3), model, every=1)
    opt.controller.state.scale = 0.25
    closure = closure_of(opt, model)
    before = model.matrix.detach().flatten().clone()
    opt.step(closure)
    full = (model.matrix.detach().flatten() - before) / opt.metrics["scale"]
    gradient = model.curvature @ before
    expected = -0.5 * float(full @ model.curvature @ full) / float(gradient @ full)
    assert opt.meter.last is not None and opt.meter.last.ratio == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("change", [0.01, 100.0])
def test_the_reading_of_an_unknown_rule_follows_the_rate(change: float) -> None:
    """It is made along an update at one rate and used at the next step, which may have another."""

    def run(change: float) -> dict[str, Any]:
        model = Quadratic()
        opt = monitor(model, Lion(model.parameters(), 1e-5), hvp="double_backward")
        for step in range(5):
            closure = closure_of(opt, model)
            if step == 4:
                opt.param_groups[0]["lr"] *= change
            opt.step(closure)
        return opt.metrics

    same, changed = run(1.0), run(change)
    assert changed["stability_ratio"] == pytest.approx(same["stability_ratio"] * change, rel=1e-6)


def test_restarting_forgets_the_reading_to_come() -> None:
    model = Quadratic()
    opt = monitor(model, Lion(model.parameters(), 1e-3), hvp="double_backward")
    closure = closure_of(opt, model)
    opt.step(closure)
    opt.restart()
    assert opt.meter.last is None
    opt.step(closure)
    assert not opt.history[-1]["probed"] and math.isnan(opt.metrics["stability_ratio"])


def test_sam_with_a_known_rule_inside_counts_one_step_a_step() -> None:
    model = Quadratic()
    opt = monitor(model, Sam(model.parameters()), hvp="double_backward")
    for _ in range(4):
        opt.step(closure_of(opt, model))
    assert opt.metrics["step"] == 4


def test_lbfgs_is_refused() -> None:
    model = mlp()
    with pytest.raises(TypeError, match="LBFGS chooses its own step"):
        AdaptiveWarmup(torch.optim.LBFGS(model.parameters()), model)
