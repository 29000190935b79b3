"""The feedback law: from stability ratios to one scale for all learning rates. Numbers in, numbers out; no tensors.

A reading is the stability ratio r₁ at the full scheduled rate (edge at 1). Divided by the rate it is kept as the
forecast; scale · forecast · rate is the stability ratio until the next reading. `reference.py` is the law alone.

* Down at once: where a reading, or a scheduled rate that rises after it, puts the ratio above `target`, the scale is
  cut to where the ratio meets it. SGD, which undoes a small overshoot by itself, is cut only above the edge.
* Up with the age of the run: after t steps the scale grows by ((t + 1) / t)^p a step, so it doubles when the run's
  age has doubled, whatever the length of the run. Far below target p is larger, for the first ratios of an adaptive
  rule are too large by orders of magnitude and fall within a few steps. No evidence, no growth: at most by a factor
  beyond the scale of the last reading, and not while the loss is losing ground.
* Curvature is not all that limits an early step (Kosson et al. 2024, arXiv 2410.23922): the relative change of the
  weights by a step is let grow by a constant a step.
* A gradient norm far above its average near the edge is the edge itself, seen before the step is made: the step is
  shortened in proportion, and lengthens again within a few steps.
* An end: warmup is over when the rate has reached no new high while the run's age has grown by half, and is not on its
  way back from a cut, nor was held back by a rising loss. The scale is kept then, so that the user's decay keeps its
  shape. Guard still cuts it, and lets it come back to there: what one batch asked for need not be for good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from warmctl.state import COUNT, FLAG, POSITIVE, SHARE, Allowed, FloatState, saved

FLOOR = 1e-4
"""Smallest scale: a loop must not feed itself down to a standstill."""
UNMEASURED = 1e-2
"""Scale before the first reading, and for good if no probe ever succeeds."""
SETTLED_AGE, SETTLED_STEPS, SETTLED_BELOW, SETTLED_PROBES = 1.5, 20, 100, 2
"""Warmup ends when the run is so many times as old as at its highest rate, so many steps (more of them below the full
rate, for no way leads up again) and probes later."""
HIGHER, RECOVERED, PATIENCE, PATIENCE_STEPS = 1.1, 0.9, 4.0, 200
"""A new high is so much higher; the end waits for a scale cut since then to come back this far, up to so many
times the age, or steps."""
DECADE_POWER = 2.0
"""Power of the growth law for each decade that the stability ratio is below target."""
LARGEST_FALL = 0.01
"""A reading counts as no less than this part of the forecast."""
EVIDENCE = 4.0
"""Largest scale over that of the last reading."""
RAMP = 0.002
"""Growth a step of the relative change of the weights that a step may make."""
SURPRISE, SURPRISE_FAR, NEAR = 2.0, 4.0, 0.1
"""A norm so many times its average shortens the step: where the ratio is so near target, and where farther off."""
SHORTEST, RECOVERY = 0.1, 1.4
"""Least shortening, and the way back a step."""
PATIENT_STEPS = 1000
"""Steps after which warmup ends without a single successful probe, at the scale `UNMEASURED`."""
RELEASE_GROWTH = 1.05
"""Growth a step back to the schedule with `after="release"`."""


PHASES = ("warmup", "guard", "done")


@dataclass(frozen=True)
class Reading:
    """One probe.

    Attributes:
        ratio: r₁ at the full scheduled rate; not finite if the probe failed.
        share: the edge of this very step over the long-run edge, as in `Measurement`; ratio / share is what is
            held at target.
        relative_update: ‖update‖ / ‖weights‖ of the coming step at the full rate, the median over weight matrices.
        tolerant: the rule undoes a step a little over the edge by itself, see `UpdateRule.tolerates_overshoot`.
        noisy: the share is a noisy one: ratio and share are averaged over readings, half the weight on the last.
        reason: why it failed, or "".
    """

    ratio: float
    share: float = 1.0
    relative_update: float = 0.0
    tolerant: bool = False
    noisy: bool = False
    reason: str = ""

    @property
    def ok(self) -> bool:
        return math.isfinite(self.ratio)


@dataclass(frozen=True)
class Decision:
    """What the wrapper applies: rates times `scale`.

    Attributes:
        ratio: the stability ratio at that scale; nan before any reading.
        closeness: the ratio over what is allowed at this step.
    """

    scale: float
    phase: str
    ratio: float
    closeness: float
    reason: str = ""


@dataclass
class ControllerState(FloatState):
    """All that the controller remembers."""

    phase: float = saved(0.0, Allowed(among=(0.0, 1.0, 2.0)))
    scale: float = saved(UNMEASURED, Allowed(FLOOR, 1.0))
    forecast: float = saved(math.nan, Allowed(0.0, unknown=True))
    share: float = saved(1.0, SHARE)
    tolerant: float = saved(0.0, FLAG)
    relative_update: float = saved(0.0, Allowed(0.0, math.inf))
    probed_scale: float = saved(0.0, Allowed(0.0, 1.0))
    shortening: float = saved(1.0, Allowed(SHORTEST, 1.0))
    age: float = saved(0.0, COUNT)
    readings: float = saved(0.0, COUNT)
    probes: float = saved(0.0, COUNT)
    highest: float = saved(0.0, POSITIVE)
    highest_scale: float = saved(0.0, Allowed(0.0, 1.0))
    highest_age: float = saved(0.0, COUNT)
    highest_probes: float = saved(0.0, COUNT)
    settled: float = saved(math.inf, Allowed(FLOOR, math.inf))


class Controller:
    """Holds the stability ratio at or below `target`.

    Args:
        target: a fraction of the edge of stability.
        after: "guard", "hold" or "release" once warmup has ended.
        max_warmup: steps after which it ends in any case.
    """

    def __init__(self, target: float = 0.5, after: str = "guard", max_warmup: int | None = None) -> None:
        self.target, self.after, self.max_warmup = target, after, max_warmup
        self.state = ControllerState()

    @property
    def phase(self) -> str:
        return PHASES[int(self.state.phase)]

    @property
    def applied(self) -> float:
        """The scale of the last step: the controller's, shortened where that step's gradient called for it."""
        return self.state.scale * self.state.shortening

    @property
    def moving(self) -> bool:
        """Whether the scale still changes although warmup is done."""
        return self.phase == "done" and self.after == "release" and self.state.scale < 1.0 and self.state.readings > 0

    def restart(self) -> None:
        """Begin warmup again from the next reading."""
        self.state = ControllerState()

    def update(
        self, rate: float, reading: Reading | None = None, losing: bool = False, surprise: float = 1.0
    ) -> Decision:
        """Decide the coming step.

        Args:
            rate: the scheduled learning rate, above 0; only its ratios between steps matter.
            reading: if a probe was made for this step.
            losing: the running average of the loss is above its lowest by more than its noise.
            surprise: gradient norm of this step over its running average if that is an event, else 1.
        """
        s = self.state
        s.age += 1
        s.shortening = min(1.0, s.shortening * RECOVERY)
        if self.phase == "done":
            s.scale = min(1.0, s.scale * RELEASE_GROWTH) if self.moving else s.scale
            return self._decision(rate)
        s.probes += reading is not None
        if reading is not None and not reading.ok:
            self._shorten(rate, surprise)
            return self._end(rate, f"probe failed, scale held: {reading.reason}")
        if reading is not None:
            s.readings += 1
            s.forecast, s.share = self._forecast(reading, rate), self._share(reading)
            s.relative_update, s.tolerant = reading.relative_update / rate, float(reading.tolerant)
        reason = "" if math.isnan(s.forecast) else self._move(rate, reading is not None, losing)
        self._shorten(rate, surprise)
        return self._end(rate, reason, losing)

    def rising(self, rate: float) -> bool:
        """Whether the rate that would be applied is above any that warmup has seen."""
        return self.state.scale * rate >= HIGHER * self.state.highest

    def _forecast(self, reading: Reading, rate: float) -> float:
        """Rising counts at once; a fall counts half in log, and as one of two decades at most.

        A Ritz value is a lower bound: a low one, or one below 0, may only mean that the probe looked elsewhere.
        """
        before, curvature = self.state.forecast, max(reading.ratio, 0.0) / rate
        if math.isnan(before) or (curvature >= before and not (reading.noisy and before)):
            return curvature
        return math.sqrt(before * max(curvature, before * LARGEST_FALL))

    def _share(self, reading: Reading) -> float:
        noisy = reading.noisy and self.state.readings > 1
        return math.sqrt(self.state.share * reading.share) if noisy else reading.share

    def _carried(self, rate: float) -> float:
        """The scale at which the ratio is at target, by the last reading; nan before it."""
        return self.target * self.state.share / max(self.state.forecast * rate, 1e-30)

    def _shorten(self, rate: float, surprise: float) -> None:
        near = self.state.scale > NEAR * self._carried(rate)
        allowed = SURPRISE if near else SURPRISE_FAR
        if surprise > allowed:
            self.state.shortening = min(self.state.shortening, max(allowed / surprise, SHORTEST))

    def _move(self, rate: float, probed: bool, losing: bool) -> str:
        """Towards the scale that the landscape carries, or 1: down at once, up with the age of the run.

        Once warmup has ended, up means no higher than the scale that it ended with.
        """
        s = self.state
        first = probed and s.readings == 1 and self.phase == "warmup"
        carried = self._carried(rate)
        slack = max(1.0 / self.target, 1.0) if s.tolerant else 1.0
        before, ramp = s.scale, RAMP * s.age / max(s.relative_update * rate, 1e-30)
        limit = min(1.0, carried, ramp if self.phase == "warmup" else s.settled)
        if first:
            s.scale = max(limit, FLOOR)
        elif carried * slack < s.scale:
            s.scale = max(carried, FLOOR)
        elif limit > s.scale and not losing:
            power = max(1.0, DECADE_POWER * math.log10(carried / s.scale))
            grown = s.scale * (s.age / max(s.age - 1, 1.0)) ** power
            s.scale = max(s.scale, min(limit, grown, EVIDENCE * s.probed_scale))
        if probed:
            s.probed_scale = s.scale
        if first:
            return f"started at scale {s.scale:.3g}"
        return f"cut from scale {before:.3g} to {s.scale:.3g}" if s.scale < before else ""

    def _end(self, rate: float, reason: str, losing: bool = False) -> Decision:
        """End warmup if it is time, and decide."""
        s = self.state
        if self.phase == "warmup":
            why = self._settled(rate, losing)
            if why:
                s.settled, s.phase = s.scale, 1.0 if self.after == "guard" else 2.0
                reason = f"warmup ended: {why}"
        return self._decision(rate, reason)

    def _settled(self, rate: float, losing: bool) -> str:
        """Why warmup is over, or ""."""
        s = self.state
        if self.max_warmup is not None and s.age >= self.max_warmup:
            return f"max_warmup of {self.max_warmup} steps reached at scale {s.scale:.3g}"
        if s.readings and self.rising(rate):
            s.highest, s.highest_scale, s.highest_age, s.highest_probes = s.scale * rate, s.scale, s.age, s.probes
        elif losing:  # what held the rate back was not the landscape
            s.highest_age = s.age
        steps = SETTLED_STEPS if s.scale >= 1.0 else SETTLED_BELOW
        old = s.age >= max(SETTLED_AGE * s.highest_age, s.highest_age + steps)
        back = s.scale >= RECOVERED * s.highest_scale or s.age >= max(PATIENCE * s.highest_age, PATIENCE_STEPS)
        if not s.readings and s.age >= PATIENT_STEPS:
            return f"no probe succeeded, the rate stays at {UNMEASURED:g} of the schedule"
        if not (s.readings and old and back and s.probes - s.highest_probes >= SETTLED_PROBES):
            return ""
        if s.scale >= 1.0:
            return "full rate, and the stability ratio stayed below target"
        return f"the scale settled at {s.scale:.3g}, the landscape carries no more at this target"

    def _decision(self, rate: float, reason: str = "") -> Decision:
        s = self.state
        ratio = self.applied * s.forecast * rate
        return Decision(self.applied, self.phase, ratio, ratio / (self.target * s.share), reason)
