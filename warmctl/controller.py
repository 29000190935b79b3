"""The feedback law: from stability ratios to one scale for all learning rates. Numbers in, numbers out; no tensors.

A reading is the stability ratio r₁ at the full scheduled rate (edge at 1). Per unit of rate it is kept as the
forecast, which rises at once and falls slowly in log; scale · forecast · rate is the stability ratio between probes. The
scale is cut at once to where that meets `target`, and grows at a limited rate up to there. Warmup ends when the scale
has reached 1 below target, or has stopped moving below 1: it is kept then, so that the user's decay keeps its shape.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

GROWTH = 1.5
"""Largest factor by which the scale grows in a step."""
FORGET = 0.5
"""Weight of a falling reading in log space; a rising one counts in full."""
FLOOR = 1e-4
"""Smallest scale: a loop must not feed itself down to a standstill."""
SETTLED_STEPS, SETTLED_READINGS, SETTLED_BAND = 50, 3, 0.1
"""Warmup ends after this many steps and readings in which the scale did not grow by more than the band."""

PHASES = ("warmup", "guard", "done")


@dataclass(frozen=True)
class Reading:
    """One probe: r₁ at the full scheduled rate; not finite if it failed, and then why."""

    ratio: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        return math.isfinite(self.ratio)


@dataclass(frozen=True)
class Decision:
    """What the wrapper applies: rates times `scale`. `ratio` is the stability ratio then; nan before any reading."""

    scale: float
    phase: str
    ratio: float
    reason: str = ""


@dataclass
class ControllerState:
    """All that the controller remembers, floats only: saved by walking it."""

    phase: float = 0.0
    scale: float = 0.0
    forecast: float = math.nan
    steps: float = 0.0
    readings: float = 0.0
    anchor_step: float = 0.0
    anchor_readings: float = 0.0
    anchor_scale: float = 0.0
    failures: float = 0.0


class Controller:
    """Holds s·r₁ at or below `target`.

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
    def moving(self) -> bool:
        """Whether the scale still changes although warmup is done."""
        return self.phase == "done" and self.after == "release" and self.state.scale < 1.0

    def restart(self) -> None:
        """Begin warmup again from the next reading."""
        self.state = ControllerState()

    def update(self, rate: float, reading: Reading | None = None) -> Decision:
        """Decide the coming step.

        Args:
            rate: the scheduled learning rate, above 0; only its ratios between steps matter.
            reading: if a probe was made for this step.
        """
        s = self.state
        s.steps += 1
        if self.phase == "done":
            if self.moving:
                s.scale = min(1.0, s.scale * GROWTH)
            return self._decision(rate)
        if reading is not None:
            s.readings += 1
            if not reading.ok:
                s.failures += 1
                return self._decision(rate, f"probe failed, scale held: {reading.reason}")
            self._learn(max(reading.ratio, 0.0) / rate)
        if math.isnan(s.forecast):
            return self._decision(rate)
        limit = min(1.0, self.target / max(s.forecast * rate, 1e-30))
        reason = self._move(limit, first=s.readings == 1 and reading is not None)
        if self.phase == "warmup":
            reason = self._end(limit) or reason
        return self._decision(rate, reason)

    def _learn(self, curvature: float) -> None:
        s = self.state
        curvature = max(curvature, 1e-30)
        if math.isnan(s.forecast) or curvature >= s.forecast:
            s.forecast = curvature
        else:
            s.forecast *= (curvature / s.forecast) ** FORGET

    def _move(self, limit: float, first: bool) -> str:
        s = self.state
        before = s.scale
        if first:
            s.scale = max(limit, FLOOR)
            return f"started at scale {s.scale:.3g}"
        if limit < s.scale:
            s.scale = max(limit, FLOOR)
            return f"cut to scale {s.scale:.3g}" if s.scale < 0.98 * before else ""
        if self.phase == "warmup":
            s.scale = min(limit, s.scale * GROWTH)
        return ""

    def _end(self, limit: float) -> str:
        s = self.state
        if self.max_warmup is not None and s.steps >= self.max_warmup:
            return self._finish(f"max_warmup of {self.max_warmup} steps reached at scale {s.scale:.3g}")
        if s.scale > s.anchor_scale * (1 + SETTLED_BAND) or s.scale < s.anchor_scale * (1 - SETTLED_BAND):
            s.anchor_scale, s.anchor_step, s.anchor_readings = s.scale, s.steps, s.readings
        calm = s.steps - s.anchor_step >= SETTLED_STEPS and s.readings - s.anchor_readings >= SETTLED_READINGS
        if not calm:
            return ""
        if s.scale >= 1.0:
            return self._finish("full rate reached and the stability ratio settled below target")
        return self._finish(f"scale settled at {s.scale:.3g}: the landscape carries no more at this target")

    def _finish(self, reason: str) -> str:
        self.state.phase = 1.0 if self.after == "guard" else 2.0
        return f"warmup ended: {reason}"

    def _decision(self, rate: float, reason: str = "") -> Decision:
        s = self.state
        return Decision(s.scale, self.phase, s.scale * s.forecast * rate, reason)

    def state_values(self) -> list[float]:
        return [float(v) for v in asdict(self.state).values()]

    def load_state_values(self, values: list[float]) -> None:
        self.state = ControllerState(**{f.name: v for f, v in zip(fields(ControllerState), values, strict=True)})
