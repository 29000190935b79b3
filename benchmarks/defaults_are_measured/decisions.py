"""The law without one of its parts, other ways to choose when to probe, and what else to measure along the way."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from warmctl import AdaptiveWarmup
from warmctl.control.cadence import EARNED, START, Cadence
from warmctl.control.controller import FASTEST, Controller, Decision, Reading
from warmctl.control.gauges import CHANGE, SlopeGauge
from warmctl.distributed import inner_product
from warmctl.stability.measurement import Measurement
from warmctl.stability.meter import Meter
from warmctl.stability.representation import RepresentationChange

PLANNED = 0.2
"""Part of all updates after which a planned warmup reaches the schedule."""


class NoShocks(Cadence):
    """A gradient norm never stands out: no step is shortened, and nothing is measured in the aftermath."""

    def _follow(self, norm: float) -> None:
        super()._follow(norm)
        self.state.surprise = 1.0


class NoShortening(Cadence):
    """A norm that stands out does not shorten its step."""

    @property
    def surprise(self) -> float:
        return 1.0


class LooksAlone(Cadence):
    """After a shock there is a look at the representations, and no probe."""

    def due(self, cost: float, guarding: bool) -> str:
        reason = super().due(cost, guarding)
        return "" if reason == "shock" else reason


class Composed(Cadence):
    """A run that is breaking up is probed no more often."""

    def due(self, cost: float, guarding: bool) -> str:
        reason = super().due(cost, guarding)
        return "" if reason == "distress" else reason


class AtOnce(Cadence):
    """Three times the tokens at the start, and none for the age of the run."""

    def __init__(self, *options: Any, **more: Any) -> None:
        super().__init__(*options, **more)
        self.state.tokens = 3.0 * START

    def step(self, norm: float, cost: float, *more: Any, **others: Any) -> None:
        self.state.tokens -= EARNED * cost / (self.state.age + 1.0)
        super().step(norm, cost, *more, **others)


class Trusting(Controller):
    """A fall of r counts in distress as well."""

    def _read(self, reading: Reading, rate: float) -> None:
        super()._read(replace(reading, distress=False), rate)


class NoStability(Controller):
    """No limit by r: curvature neither cuts nor holds."""

    def _carried(self, rate: float) -> float:
        return math.inf


class NoChange(Controller):
    """No limit by RRC, however far a step moves the representations."""

    def _bearable(self, rate: float, persistence: float) -> float:
        return math.inf


class NoFall(Controller):
    """The scale does not fall where the next gradients undo the last steps."""

    @property
    def _undone(self) -> bool:
        return False


class SetPoint(NoFall):
    """RRC is not only a limit: the scale goes up to what it and r allow, whatever e says."""

    def _growth(self, rate: float, persistence: float) -> float:
        return FASTEST if self.phase == "warmup" else super()._growth(rate, persistence)


class ChangeAlone(SetPoint, NoStability):
    """The scale goes up to what RRC allows, as fast as it may, whatever r and e say."""


class MeanLayer(RepresentationChange):
    """The mean over layers."""

    @staticmethod
    def _over_layers(change: Tensor) -> Tensor:
        return change.nanmean()


class WorstLayer(RepresentationChange):
    """The layer that moves most."""

    @staticmethod
    def _over_layers(change: Tensor) -> Tensor:
        return torch.nanquantile(change, 1.0)


class LastLayer(RepresentationChange):
    """The layer that comes last in the model, its last call."""

    @staticmethod
    def _over_layers(change: Tensor) -> Tensor:
        seen = change[~change.isnan()]
        return seen[-1] if seen.numel() else change.nanmean()


class FlatChange(SlopeGauge):
    """RRC may be no larger while e is surely positive."""

    def allowed_change(self, persistence: float) -> float:
        return CHANGE / persistence


class AnyMomentum(Controller):
    """RRC counts as if every rule had a momentum of .9."""

    def update(self, *args: Any) -> Decision:
        return super().update(*args[:4], math.sqrt(19.0))


class Unasked(SlopeGauge):
    """e is never known: the scale grows with age while RRC is calm, and not at all where it is not."""

    def take(self, slope: float) -> None:
        pass


class Agrees(SlopeGauge):
    """Wherever it is read, e agrees with the last steps: r and RRC alone say how far."""

    def take(self, slope: float) -> None:
        super().take(slope if math.isnan(slope) else 1.0)


class Aged(Controller):
    """The scale grows no faster than the run ages, whatever e says, and comes back no faster."""

    def _growth(self, rate: float, persistence: float) -> float:
        growth = super()._growth(rate, persistence)
        return min(growth, self.state.aged) if self.phase == "warmup" else growth


class AgedAnyway(NoFall):
    """The scale grows as the run ages, at least, up to what r and RRC allow, whatever e says."""

    def _growth(self, rate: float, persistence: float) -> float:
        growth = super()._growth(rate, persistence)
        return max(growth, self.state.aged) if self.phase == "warmup" else growth


class Planned(NoFall):
    """Knows how many updates there will be: the scale grows at least so that it is 1 after a fifth of them, as by rule
    of thumb, up to what r and RRC allow, whatever e says; and warmup does not end before.

    Where e is too timid, as in short runs of noisy steps, or the run ends before a rate that settled early has been
    tried again, a plan says how much time there is to lose.
    """

    updates: int | None = None

    @property
    def planned(self) -> float:
        """The scale at this age by a linear warmup over a fifth of the updates; 0 if they are not known."""
        return 0.0 if self.updates is None else min(1.0, self.state.age / (PLANNED * self.updates))

    def _growth(self, rate: float, persistence: float) -> float:
        growth = super()._growth(rate, persistence)
        behind = self.planned / self.state.scale if self.phase == "warmup" else 0.0
        return max(growth, min(behind, FASTEST))

    def _over(self, rate: float, reason: str) -> str:
        why = super()._over(rate, reason)
        return "" if 0.0 < self.planned < 1.0 else why


class NoEvidence(Controller):
    """The scale may go beyond any multiple of the one at the last reading."""

    def _move(self, rate: float, reading: Reading | None, persistence: float) -> str:
        self.state.measured_scale = 1.0
        return super()._move(rate, reading, persistence)


class NoReturn(Controller):
    """What a cut has taken in warmup comes back no sooner than what was never reached."""

    def _growth(self, rate: float, persistence: float) -> float:
        self.state.highest_scale = min(self.state.highest_scale, self.state.scale)
        return super()._growth(rate, persistence)


class OnlyCuts(Controller):
    """Guard only cuts: nothing that was cut after warmup comes back."""

    def _growth(self, rate: float, persistence: float) -> float:
        return super()._growth(rate, persistence) if self.phase == "warmup" else 1.0


class Cap(Controller):
    """After warmup the applied rate, not the scale, is held: min(schedule, the rate at the end). Guard cuts the cap."""

    cap = math.inf

    def _move(self, rate: float, reading: Reading | None, persistence: float) -> str:
        s = self.state
        if self.phase == "warmup":
            reason = super()._move(rate, reading, persistence)
            self.cap = s.scale * rate
            return reason
        before = s.scale = s.settled = min(1.0, self.cap / rate)
        reason = super()._move(rate, reading, persistence)
        self.cap = s.scale * rate if s.scale < before else self.cap
        return reason


class Realised(AdaptiveWarmup):
    """The library's own path for rules that it does not know: the ratio along the update made, read a step later.

    That path knows neither the relative update, which bounds the first step, nor that SGD undoes an overshoot.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, **options: Any) -> None:
        super().__init__(optimizer, model, **options)
        self.meter.estimator.rule = None


class LagOneMeter(Meter):
    """Also probes where gᵀD^½v, v the tracked eigenvector, changes sign from step to step: a meter for free.

    Where its lag-1 correlation since the last probe is below −.3, over five pairs at least, and the budget allows.
    """

    value, pairs, products, squares = math.nan, 0, 0.0, 0.0
    cadence: Cadence

    @property
    def turning(self) -> str:
        """Why to probe at the coming step, or ""."""
        affordable = self.cadence.state.tokens >= self.expected_cost
        found = affordable and self.pairs >= 5 and self.products < -0.3 * self.squares
        return "lag-1 correlation" if found else ""

    def read(self, due: str, params: list[Tensor], rate: float, *more: Any) -> Measurement | None:
        vector, before = self.estimator.vector, self.value
        if vector is not None:
            step = self.estimator._update(params, self.estimator.scaling(params)[0])
            self.value = inner_product(params)(step, vector)
        if math.isfinite(before * self.value):
            self.pairs, self.products = self.pairs + 1, self.products + before * self.value
            self.squares += (before**2 + self.value**2) / 2
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

    def _due(self) -> str:
        meter: Any = self.meter
        return super()._due() or str(meter.turning)
