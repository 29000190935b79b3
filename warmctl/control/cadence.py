"""When to probe: by the age of the run and a budget in gradient evaluations; known before the step is made.

Probes are as far apart as the run is old: a gap is half of its age near `target`, and twice that age ten times below.
What may be spent is a token bucket, filled by the age of the run too: two fifths of a probe each time that it has grown
e-fold, beside a token per hundred steps. How far a step moves the representations is looked at more often, for it costs
less than one gradient, and the end slope is read more often still. Nothing here reads a clock: the same run probes at
the same steps.

A gradient norm that stands out of its running average makes its own step shorter. What a shock leaves is measured
later, for at the shock itself the batch that stands out would be all that is seen: the ratio at the next step, on
credit if it must be, and the representations some steps after it. A run whose norm has grown tenfold is breaking up,
whatever its last reading says: it is measured every few steps then, on more credit, and a lower ratio counts for
nothing in such a probe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from warmctl.state import COUNT, POSITIVE, Allowed, FloatState, saved

GAP_NEAR, GAP_FAR, GAP_MOST = 0.5, 2.0, 50.0
"""Steps between probes over the age of the run, at the target and a decade below it, and the most in warmup."""
EVENT, SPREAD = 2.5, 0.15
"""Mean deviations by which the log of a gradient norm stands out of its running average; and the least that counts."""
SHOCK, AFTERMATH = 2.0, 5.0
"""Norm over its running average that is a shock; and the steps after which the representations are looked at then."""
DISTRESS, APART, DEBT = 10.0, 3.0, 4.0
"""Running average of the norm over its lowest from which on a run is breaking up; steps between probes then, and how
many of them may be owed when one more is made."""
MEMORY = 0.1
"""Weight of the newest value in the running averages; one value moves them by three mean deviations at most."""
START, EARNED, SAVED = 3.0, 0.4, 3.0
"""Tokens at the start beside the first probe, or one more probe if that is dearer; probes that are earned beside the
budget while the run grows e times as old; and the most that is saved up, in probes."""
LARGEST_LOG = 750.0
"""No float has a logarithm of a larger size."""
LOOKS, LOOK_GAP = 8, 0.5
"""First steps at each of which the representations are looked at, and steps between later looks over the age of the
run: so few that they need no budget. In those steps all changes fast, and no shock is probed."""
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
    lowest: float = saved(LARGEST_LOG, Allowed(-LARGEST_LOG, LARGEST_LOG))
    next_look: float = saved(1.0, POSITIVE)
    aftermath: float = saved(math.inf, Allowed(0.0, math.inf))
    next_slope: float = saved(1.0, POSITIVE)


class Cadence:
    """Decides at which steps to probe.

    Args:
        every: steps between probes, or "auto".
        budget: gradient evaluations for probes per gradient evaluation of training, beyond two probes, two fifths of
            one each time that the run has grown e times as old, and a debt of one, of `DEBT` in distress.
    """

    def __init__(self, every: int | str = "auto", budget: float = 0.01) -> None:
        self.every, self.budget = every, budget
        self.state = CadenceState()

    def restart(self) -> None:
        """As at the start, with tokens of its own: what was thawed or added has never been measured."""
        self.state = CadenceState(tokens=max(self.state.tokens, START))

    def due(self, cost: float, guarding: bool) -> str:
        """Why to probe at the coming step, or "".

        Args:
            cost: what a probe is expected to cost, in gradient evaluations.
            guarding: whether warmup has ended and the rate is no higher than then.
        """
        s = self.state
        if s.last_probe < 0:
            return "first"
        since = s.age + 1.0 - s.last_probe
        if self.every != "auto":
            return "every" if since >= int(self.every) else ""
        if s.surprise > SHOCK and s.age > LOOKS and s.tokens >= 0.0:
            return "shock"
        if since >= s.gap * (GUARD_GAP if guarding else 1.0) and s.tokens >= cost:
            return "clock"
        breaking = s.norm > s.lowest + math.log(DISTRESS)
        return "distress" if breaking and since >= APART and s.tokens >= -DEBT * cost else ""

    def step(self, norm: float, cost: float, guarding: bool, gradients: float = 1.0) -> None:
        """A step begins: it earns tokens. Call it once a step, after `due`.

        Args:
            norm: of this step's gradient; nan if unknown.
            gradients: evaluations that went into this step; more than one with gradient accumulation.
        """
        s = self.state
        s.age += 1
        earned = self.budget * gradients * (GUARD_SHARE if guarding else 1.0) + EARNED * cost / s.age
        s.tokens = min(s.tokens + earned, max(START, SAVED * cost))
        self._follow(norm)

    @property
    def surprise(self) -> float:
        """The last gradient norm over its running average, if it stood out, else 1."""
        return self.state.surprise

    def asks_slope(self) -> bool:
        """Whether to read the end slope at the coming step. Call it in warmup, before `step`."""
        s = self.state
        if s.age + 1.0 < s.next_slope:
            return False
        s.next_slope = s.age + 1.0 + max(1.0, float(round(SLOPE_GAP * s.age)))
        return True

    def looks_next(self, warming: bool) -> bool:
        """Whether the representations are looked at in the coming step."""
        now = self.state.age + 1.0
        return now >= self.state.aftermath or (warming and now >= self.state.next_look)

    def look(self, warming: bool = True) -> bool:
        """Whether to look at the representations at this step. Call it after `step`.

        Also some steps after a shock: a network that breaks has little curvature then, and moves far. Once warmup has
        ended after shocks alone.
        """
        s = self.state
        planned, shocked = warming and s.age >= s.next_look, s.age >= s.aftermath
        if planned:
            s.next_look = s.age + (1.0 if s.age < LOOKS else max(1.0, float(round(LOOK_GAP * s.age))))
        if shocked:
            s.aftermath = math.inf
        if s.surprise > SHOCK:
            s.aftermath = min(s.aftermath, s.age + AFTERMATH)
        return planned or shocked

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

    def _follow(self, norm: float) -> None:
        """Whether this norm stands out; then take it into the running averages."""
        s = self.state
        s.surprise = 1.0
        if not 0.0 < norm < math.inf:
            return
        log_norm = math.log(norm)
        s.norm = log_norm if math.isnan(s.norm) else s.norm
        above, most = log_norm - s.norm, 3.0 * max(s.norm_spread, 1e-12)
        if above > EVENT * max(s.norm_spread, SPREAD):
            s.surprise = math.exp(min(above, 700.0))
        s.norm += MEMORY * min(max(above, -most), most)
        s.norm_spread += MEMORY * (min(abs(above), most) - s.norm_spread)
        s.lowest = s.norm if s.age <= LOOKS else min(s.lowest, s.norm)
