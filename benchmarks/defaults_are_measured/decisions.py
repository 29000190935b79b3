"""Other ways to choose when to probe, what to allow after warmup, and what to measure along the way."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from warmctl import AdaptiveWarmup
from warmctl.control.cadence import Cadence
from warmctl.control.controller import Controller, Decision, Reading
from warmctl.distributed import inner_product
from warmctl.stability.measurement import Measurement
from warmctl.stability.meter import Meter


class NoEvents(Cadence):
    """Probes by the clock alone, and no shorter steps."""

    @property
    def surprise(self) -> float:
        return 1.0

    def _event(self, loss: float, norm: float) -> str:
        super()._event(loss, norm)
        return ""


class LateProbes(Cadence):
    """An event calls for a probe at the next step, on a batch that did not stand out itself."""

    pending = ""

    def _event(self, loss: float, norm: float) -> str:
        event, self.pending = self.pending, super()._event(loss, norm)
        return event


class NoShortening(Cadence):
    """An event calls for a probe, but does not shorten the step."""

    @property
    def surprise(self) -> float:
        return 1.0


class Cap(Controller):
    """After warmup the applied rate, not the scale, is held: min(schedule, the rate at the end). Guard cuts the cap."""

    cap = math.inf

    def update(
        self, rate: float, reading: Reading | None = None, losing: bool = False, surprise: float = 1.0
    ) -> Decision:
        warm = self.phase == "warmup"
        if not warm:
            self.state.scale = min(1.0, self.cap / rate)
        before = self.state.scale
        decision = super().update(rate, reading, losing, surprise)
        if self.phase != "warmup" and (warm or self.state.scale < before):
            self.cap = self.state.scale * rate
        return decision


class NoReturn(Controller):
    """Guard only cuts: nothing that was cut after warmup comes back."""

    def update(
        self, rate: float, reading: Reading | None = None, losing: bool = False, surprise: float = 1.0
    ) -> Decision:
        decision = super().update(rate, reading, losing, surprise)
        self.state.settled = min(self.state.settled, self.state.scale if self.phase != "warmup" else math.inf)
        return decision


class Realised(AdaptiveWarmup):
    """The library's own path for rules that it does not know: the ratio along the update made, read a step later.

    That path knows neither the relative update, so the ramp at the start is missing, nor that SGD undoes an overshoot.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, **options: Any) -> None:
        super().__init__(optimizer, model, **options)
        self.meter.rule = None


class LagOneMeter(Meter):
    """Also probes where gᵀD^½v, v the tracked eigenvector, changes sign from step to step: a meter for free.

    Where its lag-1 correlation since the last probe is below −.3, over five pairs at least, and the budget allows.
    """

    value, pairs, products, squares = math.nan, 0, 0.0, 0.0
    cadence: Cadence

    def read(self, due: str, params: list[Tensor], rate: float, *more: Any) -> Measurement | None:
        vector, before = self.estimator.vector, self.value
        if vector is not None:
            step = self.estimator._update(params, self.estimator.scaling(params)[0])
            self.value = inner_product(params)(step, vector)
        if math.isfinite(before * self.value):
            self.pairs, self.products = self.pairs + 1, self.products + before * self.value
            self.squares += (before**2 + self.value**2) / 2
        affordable = self.cadence.state.tokens >= self.expected_cost
        if not due and affordable and self.pairs >= 5 and self.products < -0.3 * self.squares:
            due = "lag-1 correlation"
        found = super().read(due, params, rate, *more)
        if found is not None:
            self.value, self.pairs, self.products, self.squares = math.nan, 0, 0.0, 0.0
        return found


class LagOne(AdaptiveWarmup):
    """With a `LagOneMeter`."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, **options: Any) -> None:
        super().__init__(optimizer, model, **options)
        meter: Any = self.meter
        meter.__class__, meter.cadence = LagOneMeter, self.cadence
