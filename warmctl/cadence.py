"""When to probe: a budget in gradient evaluations, and free signals of the step already made that call for a probe.

Probes are dense at the start and after an event, then twice as far apart each time. An event is a gradient norm or a
loss well above its running average. What may be spent is a token bucket: a burst for the start, then `budget` tokens a
step. Nothing here reads a clock: the same run probes at the same steps.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

BURST = 16.0
"""Gradient evaluations that may be spent at once at the start."""
NORM_JUMP, LOSS_JUMP = 1.5, 4.0
"""A gradient norm of so many times its average, a loss so many mean deviations above its own, is an event."""
MEMORY = 0.1
"""Weight of the newest value in the running averages."""
LONGEST = 50.0
"""Largest interval between probes in warmup, in steps; ten times that in guard."""
GUARD_SHARE = 0.2
"""Part of the budget that is left for probes once warmup has ended."""


@dataclass
class CadenceState:
    """All that the cadence remembers, floats only: saved by walking it."""

    tokens: float = BURST
    steps: float = 0.0
    last_probe: float = -1.0
    interval: float = 1.0
    norm: float = math.nan
    loss: float = math.nan
    spread: float = math.nan


class Cadence:
    """Decides at which steps to probe.

    Args:
        every: steps between probes, or "auto".
        budget: gradient evaluations for probes per gradient evaluation of training, when `every="auto"`.
    """

    def __init__(self, every: int | str = "auto", budget: float = 0.1) -> None:
        self.every, self.budget = every, budget
        self.state = CadenceState()

    def restart(self) -> None:
        """Dense probes again, from what is left of the budget."""
        self.state.last_probe, self.state.interval = -1.0, 1.0

    def due(self, loss: float, norm: float, cost: float, guarding: bool) -> str:
        """Why to probe at this step, or "". Call it once a step.

        Args:
            loss, norm: of the coming step's gradient evaluation; nan if unknown.
            cost: what a probe is expected to cost, in gradient evaluations.
            guarding: whether warmup has ended.
        """
        s = self.state
        s.steps += 1
        s.tokens = min(s.tokens + self.budget * (GUARD_SHARE if guarding else 1.0), BURST)
        event = self._event(loss, norm)
        since = s.steps - s.last_probe
        if self.every != "auto":
            return "every" if s.last_probe < 0 or since >= int(self.every) else ""
        if s.last_probe >= 0 and s.tokens < cost:
            return ""
        if event:
            s.interval = 1.0
            return event
        longest = LONGEST * (10 if guarding else 1)
        return "clock" if s.last_probe < 0 or since >= min(s.interval, longest) else ""

    def spent(self, cost: float) -> None:
        """Account for a probe made at this step."""
        s = self.state
        s.tokens -= cost
        s.interval = 1.0 if s.last_probe < 0 else min(2 * s.interval, 10 * LONGEST)
        s.last_probe = s.steps

    def _event(self, loss: float, norm: float) -> str:
        s = self.state
        if not math.isfinite(norm):
            return ""
        event = ""
        if math.isfinite(s.norm) and norm > NORM_JUMP * s.norm:
            event = "gradient norm"
        elif math.isfinite(s.spread) and loss > s.loss + LOSS_JUMP * s.spread:
            event = "loss"
        s.norm = norm if math.isnan(s.norm) else s.norm + MEMORY * (min(norm, 3 * s.norm) - s.norm)
        if math.isfinite(loss):
            if math.isnan(s.loss):
                s.loss, s.spread = loss, 0.05 * abs(loss)
            s.spread += MEMORY * (abs(loss - s.loss) - s.spread)
            s.loss += MEMORY * (min(loss, s.loss + 4 * s.spread) - s.loss)
        return event

    def state_values(self) -> list[float]:
        return [float(v) for v in asdict(self.state).values()]

    def load_state_values(self, values: list[float]) -> None:
        self.state = CadenceState(**{f.name: v for f, v in zip(fields(CadenceState), values, strict=True)})
