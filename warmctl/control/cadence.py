"""When to probe: a budget in gradient evaluations, and free signals of the step already made that call for a probe.

Probes are as far apart as the run is old: a gap is half of its age near `target`, and twice that age ten times below.
In between, an event calls for one before the step is made: a gradient norm or a loss that stands out of its own running
average. What may be spent is a token bucket, filled by the age of the run too: half a probe each time that it has grown
e-fold, beside a token per hundred steps. The clock and small events wait until that buys a probe; a shock does not, and
may leave a debt. How far a step moves the representations is looked at more often, for it costs less than one gradient,
and the end slope is read more often still. Nothing here reads a clock: the same run probes at the same steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from warmctl.state import COUNT, POSITIVE, Allowed, FloatState, saved

GAP_NEAR, GAP_FAR, GAP_MOST = 0.5, 2.0, 50.0
"""Steps between probes over the age of the run, at the target and a decade below it, and the most in warmup."""
NORM_EVENT, LOSS_EVENT = 2.5, 4.0
"""Mean deviations above the running average that make an event, of the log of the gradient norm and of the loss."""
NORM_SPREAD, LOSS_SPREAD = 0.15, 0.02
"""Least mean deviation that counts: of the log of the norm, and of the loss relative to it."""
SHOCK, AFTERMATH = 2.0, 5.0
"""Gradient norm over its running average, at an event, that is a shock; and the steps after which the representations
are looked at then. At the shock itself its own gradient would be what is seen."""
MEMORY = 0.1
"""Weight of the newest value in the running averages; one value moves them by three mean deviations at most."""
START, EARNED, SAVED = 3.0, 0.5, 3.0
"""Tokens at the start beside the first probe, or one more probe if that is dearer; probes that are earned beside the
budget while the run grows e times as old; and the most that is saved up, in probes."""
LARGEST_LOG = 750.0
"""No float has a logarithm of a larger size."""
LOOKS, LOOK_GAP = 8, 0.5
"""First steps at each of which the representations are looked at, and steps between later looks over the age of the
run: so few that they need no budget. In those steps all changes fast, and no shock is worth a debt."""
NEVER = 1e300
"""A step that no run reaches."""
SLOPE_GAP = 1.0 / 32.0
"""Steps between readings of the end slope over the age of the run: what it averages grows with the run."""
GUARD_SHARE, GUARD_GAP = 0.4, 10.0
"""Part of the budget, and factor on the gaps, once warmup has ended."""


@dataclass
class CadenceState(FloatState):
    """All that the cadence remembers."""

    tokens: float = saved(START, Allowed())
    age: float = saved(0.0, COUNT)
    last_probe: float = saved(-1.0, Allowed(-1.0, COUNT.high, whole=True))
    gap: float = saved(1.0, Allowed(1.0, GAP_MOST))
    surprise: float = saved(1.0, Allowed(1.0))
    norm: float = saved(math.nan, Allowed(-LARGEST_LOG, LARGEST_LOG, unknown=True))
    norm_spread: float = saved(0.2, POSITIVE)
    loss: float = saved(math.nan, Allowed(unknown=True))
    loss_spread: float = saved(0.0, POSITIVE)
    next_look: float = saved(1.0, POSITIVE)
    next_slope: float = saved(1.0, POSITIVE)


class Cadence:
    """Decides at which steps to probe.

    Args:
        every: steps between probes, or "auto".
        budget: gradient evaluations for probes per gradient evaluation of training, beyond two probes, half a one
            each time that the run has grown e times as old, and a debt of one.
    """

    def __init__(self, every: int | str = "auto", budget: float = 0.01) -> None:
        self.every, self.budget = every, budget
        self.state = CadenceState()

    def restart(self) -> None:
        """As at the start, with tokens of its own: what was thawed or added has never been measured."""
        self.state = CadenceState(tokens=max(self.state.tokens, START))

    def due(self, loss: float, norm: float, cost: float, guarding: bool, gradients: float = 1.0) -> str:
        """Why to probe at this step, or "". Call it once a step.

        Args:
            loss, norm: of this step's gradient evaluation; nan if unknown.
            cost: what a probe is expected to cost, in gradient evaluations.
            guarding: whether warmup has ended and the rate is no higher than then.
            gradients: evaluations that went into this step; more than one with gradient accumulation.
        """
        s = self.state
        s.age += 1
        earned = self.budget * gradients * (GUARD_SHARE if guarding else 1.0) + EARNED * cost / s.age
        s.tokens = min(s.tokens + earned, max(START, SAVED * cost))
        event = self._event(loss, norm)
        since = s.age - s.last_probe
        if s.last_probe < 0:
            return "first"
        if self.every != "auto":
            return "every" if since >= int(self.every) else ""
        shock = s.surprise > SHOCK and s.age > LOOKS
        if event and s.tokens >= (0.0 if shock else cost):
            return event
        due = since >= s.gap * (GUARD_GAP if guarding else 1.0) and s.tokens >= cost
        return "clock" if due else ""

    @property
    def surprise(self) -> float:
        """The last gradient norm over its average before, if that was an event, else 1."""
        return self.state.surprise

    def asks_slope(self) -> bool:
        """Whether to read the end slope at the coming step. Call it in warmup, before `due`."""
        s = self.state
        if s.age + 1.0 < s.next_slope:
            return False
        s.next_slope = s.age + 1.0 + max(1.0, float(round(SLOPE_GAP * s.age)))
        return True

    @property
    def looks_next(self) -> bool:
        """Whether the representations are looked at in the coming step, if it is one of warmup."""
        return self.state.age + 1.0 >= self.state.next_look

    def look(self, warming: bool = True) -> bool:
        """Whether to look at the representations at this step. Call it after `due`.

        Also some steps after a shock: a network that breaks has little curvature then, and moves far. Once warmup has
        ended after shocks alone.
        """
        s = self.state
        due = s.age >= s.next_look
        if due and warming:
            s.next_look = s.age + (1.0 if s.age < LOOKS else max(1.0, float(round(LOOK_GAP * s.age))))
        elif due:
            s.next_look = NEVER
        if s.surprise > SHOCK:
            s.next_look = min(s.next_look, s.age + AFTERMATH)
        return due

    def rest(self) -> None:
        """Warmup has ended: of the looks that were planned none is made."""
        self.state.next_look = NEVER

    def probed(self, cost: float, closeness: float) -> None:
        """Account for a probe made at this step.

        Args:
            closeness: stability ratio over target after it; nan if it failed.
        """
        s = self.state
        s.tokens -= 0.0 if s.last_probe < 0 else cost
        if s.last_probe == 1.0:  # the second shows what those after the first cost
            s.tokens += max(cost - START, 0.0)
        s.last_probe = s.age
        far = 0.0 if math.isnan(closeness) else min(max(-math.log10(max(closeness, 1e-9)), 0.0), 1.0)
        s.gap = min(max((GAP_NEAR + (GAP_FAR - GAP_NEAR) * far) * s.age, 1.0), GAP_MOST)

    def _event(self, loss: float, norm: float) -> str:
        """Why this step stands out, or ""; then take it into the averages."""
        s = self.state
        events = []
        s.surprise = 1.0
        if 0.0 < norm < math.inf:
            log_norm = math.log(norm)
            if math.isnan(s.norm):
                s.norm = log_norm
            if log_norm - s.norm > NORM_EVENT * max(s.norm_spread, NORM_SPREAD):
                events.append("gradient norm")
                s.surprise = math.exp(min(log_norm - s.norm, 700.0))
            s.norm, s.norm_spread = _follow(s.norm, s.norm_spread, log_norm)
        if math.isfinite(loss):
            if math.isnan(s.loss):
                s.loss, s.loss_spread = loss, 0.03 * abs(loss)
            if loss - s.loss > LOSS_EVENT * max(s.loss_spread, LOSS_SPREAD * abs(s.loss)):
                events.append("loss")
            s.loss, s.loss_spread = _follow(s.loss, s.loss_spread, loss)
        return " and ".join(events)


def _follow(mean: float, spread: float, value: float) -> tuple[float, float]:
    """Running mean and mean deviation, after one more value."""
    step = value - mean
    most = 3 * max(spread, 1e-12)
    return mean + MEMORY * min(max(step, -most), most), spread + MEMORY * (min(abs(step), most) - spread)
