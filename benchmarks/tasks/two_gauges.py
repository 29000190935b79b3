"""A law under trial: how far a step moves what the network computes, and whether the next gradient agrees.

No curvature, no probes. Gauge A, the relative representation change of a step (RRC), says how far the rate may go;
gauge B, the slope e at the end of the steps, whether there is reason to go on. It is measured here before it may enter
the library; the constants were chosen on development tasks 0 to 41.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from warmctl.loss.random_state import RandomState
from warmctl.loss.replay import Replay
from warmctl.proxy import OptimizerProxy
from warmctl.rates import ScaledRates, largest_rate
from warmctl.stability.end_slope import EndSlope
from warmctl.stability.representation import RepresentationChange
from warmctl.vectors import dot, locals_of

CAP, LIFT, LIFTED_FROM, LIFT_AGE = 0.12, 0.4, 0.5, 15.0
"""RRC a step may have, and how much more while the slope is surely positive."""
ASKED, MOVING = 0.03, 0.08
"""Below the first e is noise and is not asked; below the second growth goes on after e has crossed zero."""
DENSE, GAP = 8, 0.25
"""RRC is measured at each of so many steps, then after this part of the age."""


class TwoGauges:
    """The law: numbers in, one scale out."""

    def __init__(self) -> None:
        self.age, self.scale, self.highest, self.measured_scale = 0, 1.0, 0.0, 1.0
        self.change = math.nan  # RRC over the applied rate
        self.mean, self.square, self.fast, self.readings = math.nan, math.nan, math.nan, 0
        self.crossed, self.next = False, 1

    @property
    def significance(self) -> float:
        """Mean of e over its root mean square, in [−1, 1]: whatever e's size in an optimizer's geometry."""
        return self.mean / math.sqrt(self.square) if self.square > 0.0 else 0.0

    def cap(self) -> float:
        if not self.readings:
            return CAP
        sure = self.significance * (1 - math.exp(-self.readings / LIFT_AGE))
        return CAP + LIFT * max(0.0, sure - LIFTED_FROM) / (1 - LIFTED_FROM)

    def read(self, e: float) -> None:
        if not math.isfinite(e):
            return
        first, self.readings = not self.readings, self.readings + 1
        self.fast = e if first else self.fast + 0.2 * (e - self.fast)
        self.mean = e if first else self.mean + 0.1 * (e - self.mean)
        self.square = e * e if first else self.square + 0.1 * (e * e - self.square)

    def measured(self, change: float, rate: float) -> None:
        """RRC of the step just made."""
        found = min(change, 1e6) / (rate * self.scale)
        if math.isfinite(found) and found > 0.0:
            before = found if math.isnan(self.change) else self.change
            self.change = before * max(found / before, 1e-3) ** (0.6 if found > before else 0.5)
        self.measured_scale = self.scale
        self.next = self.age + (1 if self.age < DENSE else max(1, round(GAP * self.age)))

    def decide(self, e: float, rate: float) -> float:
        """The scale of the coming step."""
        self.age += 1
        self.read(e)
        known = math.isfinite(self.change)
        limit = min(1.0, self.cap() / max(self.change * rate, 1e-30)) if known else 1.0
        now = self.change * self.scale * rate if known else 0.0
        if now >= ASKED and self.age > 3 and self.fast < 0.0:
            self.crossed = True
        if 1.3 * limit < self.scale:
            self.scale = max(0.8 * self.scale, limit, 1e-5)
        elif limit > self.scale:
            self.scale = max(self.scale, min(limit, self.scale * self._growth(now), 4.0 * self.measured_scale))
        self.highest = max(self.highest, self.scale)
        return self.scale

    def _growth(self, now: float) -> float:
        aged = self.age / (self.age - 1)
        if now < ASKED and not self.crossed:
            growth = 2.0
        else:
            growth = min(2.0, math.exp(0.6 * max(0.0, self.significance - 0.3) / 0.7))
            if self.crossed and self.fast > -0.1 and now < MOVING:
                growth = max(growth, aged**0.5)
        growth = min(growth, aged**4)
        returning = self.scale < self.highest and self.significance > -0.5
        return max(growth, 1.1) if returning else growth


class TwoGaugesWarmup(OptimizerProxy):
    """The law round an optimizer; `step` takes a closure that can be evaluated again."""

    def __init__(self, base: Optimizer, model: nn.Module) -> None:
        super().__init__(base)
        self.model, self.law = model, TwoGauges()
        self.slope, self.gauge = EndSlope(), RepresentationChange(model)
        self._rates, self._forwards = ScaledRates(), 0

    @property
    def metrics(self) -> dict[str, Any]:
        """A forward pass counts as a third of a gradient evaluation."""
        return {"scale": self.law.scale, "overhead": self._forwards / 3 / max(self.law.age, 1), "phase": "warmup"}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:  # type: ignore[override]
        assert closure is not None
        rate, state = largest_rate(self.param_groups), RandomState()
        with torch.enable_grad():
            loss = closure()
        params = self.trainable
        first, due = self.law.age == 0, self.law.age + 1 >= self.law.next
        scale = 1.0 if first else self.law.decide(self._end_slope(params), rate)
        if first:
            self._end_slope(params)
        replay = Replay(closure, params, self.model, state)
        if due:
            self.gauge.before(replay)
        before = [t.clone() for t in locals_of(params)] if first else []
        self._rates.scale(self.param_groups, scale)
        self.base.step()
        self._rates.restore(self.param_groups)
        if first:
            self._shorten_first(params, before)
        if due:
            self._forwards += 2
            self.law.measured(self.gauge.after(replay), rate)
        return loss

    def _end_slope(self, params: list[Tensor]) -> float:
        found = self.slope.products(params)
        if found is None:
            return math.nan
        gradient = [p.grad for p in params if p.grad is not None]
        size = math.sqrt(max(float(found[1]), 0.0) * dot(gradient, gradient))
        return float(found[0]) / size if size > 0.0 else math.nan

    def _shorten_first(self, params: list[Tensor], before: list[Tensor]) -> None:
        """The first step is made in full, looked at, and taken back to a change of the weights by .002."""
        now = locals_of(params)
        matrices = [(b, n) for p, b, n in zip(params, before, now, strict=True) if p.dim() > 1 and bool(b.any())]
        changes = [float((n - b).norm() / b.norm()) for b, n in matrices]
        most = median(changes) if changes else 0.0
        scale = min(1.0, 0.002 / most) if most > 0.0 else 0.01
        for b, n in zip(before, now, strict=True):
            n.copy_(b + scale * (n - b))
        self.law.age, self.law.scale, self.law.highest = 1, scale, scale
