"""The feedback law: from readings and signals to one scale for all learning rates. Numbers in, numbers out; no tensors.

Three gauges say what a rate may be. `reference.py` is the law alone.

* r, what the landscape forbids: the stability ratio of the coming step (edge at 1), from probes of the curvature. A
  reading is r₁, at the full scheduled rate; over the rate it is the forecast until the next. Held at `target`; SGD,
  which undoes a small overshoot by itself, is cut only above the edge.
* RRC, how far a step moves what the network computes: the relative change of its layers' outputs. Over the rate it is
  a forecast too. Held at an amount that is the same for all networks, rules and rates (Kosson et al. 2024, arXiv
  2410.23922, find in it the need of warmup): curvature does not see a step that wrecks features. Counted is what
  lasts: under momentum steps add up, without it most of a step is noise of its batch that the next ones undo.
* e, whether there is reason to go faster: the slope of the next batch at the end of the last steps. While it surely
  agrees with them the scale grows by a factor a step, and RRC may be larger; once it has turned, the scale grows with
  the age of the run, its root while e is below 0, and only while RRC is not near its limit; where e is surely against
  them, for they go to and fro, the scale falls. As long as steps hardly move the network e is noise, and is not asked.

No evidence, no growth: at most by a factor beyond the scale of the last reading of r or RRC. What a cut has taken comes
back sooner than what was never reached. A gradient norm far above its average shortens the step.

An end: warmup is over when the rate has reached no new high for long, and is not on its way back from a cut or a fall.
The scale is kept then, so that the user's decay keeps its shape. Guard cuts it by r still, and lets it come back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from warmctl.control.ending import Ending
from warmctl.control.gauges import ChangeGauge, SlopeGauge
from warmctl.state import COUNT, FLAG, SHARE, Allowed, FloatState, saved

FLOOR = 1e-5
"""Smallest scale: a loop must not feed itself down to a standstill."""
UNMEASURED = 1e-2
"""Scale before the first reading, and for good if none ever succeeds."""
FIRST = 0.002
"""Relative change of the weights by the first step: what the network does with it is not known yet."""
ASKED, CALM = 0.13, 0.35
"""RRC times persistence from which on e is asked; and up to which the scale grows with age when e has turned."""
AGAINST = -0.7
"""Certainty of e below which the scale falls, as one over the age, once e has turned."""
FASTEST, EAGER = 2.0, 0.6
"""Most growth a step; and its log at full significance of e."""
POWER, POWER_TURNED = 4.0, 2.0
"""Of the age, that growth does not exceed; and once e has turned, which is an average over a third of the run."""
RETURN, OPPOSED = 1.1, -0.5
"""Growth a step back to the highest scale so far, unless the significance of e is below this."""
EVIDENCE = 4.0
"""Largest scale over that of the last reading."""
EXCESS, CUT = 1.3, 0.8
"""RRC over what is allowed from which on the scale is cut, and by how much a step at most."""
LARGEST_FALL = 0.01
"""A reading of r counts as no less than this part of the forecast."""
SURPRISE, SURPRISE_FAR, NEAR = 2.0, 4.0, 0.1
"""A norm so many times its average shortens the step: where the ratio is so near target, and where farther off."""
SHORTEST, RECOVERY = 0.1, 1.4
"""Least shortening, and the way back a step."""
PATIENT_STEPS = 1000
"""Steps after which warmup ends without a single reading, at the scale `UNMEASURED`."""
RELEASE_GROWTH = 1.05
"""Growth a step back to the schedule with `after="release"`."""

PHASES = ("warmup", "guard", "done")
NOTHING, RATIO, REPRESENTATION, SLOPE, UNDONE, RISING, WAITING, SHORTENED, ENDED, UNKNOWN = (
    "",
    "the stability ratio is at target",
    "a step may not move the representations further",
    "the next gradients do not agree that steps should be longer",
    "the next gradients undo the last steps",
    "the rate is rising",
    "the next reading is waited for",
    "the gradient is far longer than it was: the step is shortened",
    "held where warmup ended",
    "nothing has been measured yet",
)
"""What holds the scale below 1."""
DECAY = "the schedule falls faster than the rate may rise"


@dataclass(frozen=True)
class Reading:
    """One probe.

    Attributes:
        ratio: r₁ at the full scheduled rate; not finite if the probe failed.
        share: the edge of this very step over the long-run edge, as in `Measurement`; ratio / share is what is
            held at target.
        relative_update: ‖update‖ / ‖weights‖ of the coming step at the full rate, the median over weight matrices;
            0 if there are none.
        tolerant: the rule undoes a step a little over the edge by itself, see `UpdateRule.tolerates_overshoot`.
        noisy: the share is a noisy one: ratio and share are averaged over readings, half the weight on the last.
        distress: made because the run is breaking up: a fall of ratio / share is no reason to go faster then.
        reason: why it failed, or "".
    """

    ratio: float
    share: float = 1.0
    relative_update: float = 0.0
    tolerant: bool = False
    noisy: bool = False
    distress: bool = False
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
        reason: what was done, or what holds the scale below 1; "" at the full rate.
    """

    scale: float
    phase: str
    ratio: float
    closeness: float
    reason: str = ""


@dataclass
class ControllerState(FloatState):
    """What the controller remembers beside its gauges and the end."""

    phase: float = saved(0.0, Allowed(among=(0.0, 1.0, 2.0)))
    scale: float = saved(UNMEASURED, Allowed(FLOOR, 1.0))
    forecast: float = saved(math.nan, Allowed(0.0, unknown=True))
    share: float = saved(1.0, SHARE)
    tolerant: float = saved(0.0, FLAG)
    measured_scale: float = saved(0.0, Allowed(0.0, 1.0))
    highest_scale: float = saved(0.0, Allowed(0.0, 1.0))
    turned: float = saved(0.0, FLAG)
    shortening: float = saved(1.0, Allowed(SHORTEST, 1.0))
    age: float = saved(0.0, COUNT)
    readings: float = saved(0.0, COUNT)
    settled: float = saved(math.inf, Allowed(FLOOR, math.inf))

    @property
    def aged(self) -> float:
        """The age over that of the step before."""
        return self.age / max(self.age - 1.0, 1.0)


class Controller:
    """Holds each step where all gauges allow it.

    Args:
        target: of the stability ratio, a fraction of the edge.
        after: "guard", "hold" or "release" once warmup has ended.
        max_warmup: steps after which it ends in any case.
    """

    def __init__(self, target: float = 0.8, after: str = "guard", max_warmup: int | None = None) -> None:
        self.target, self.after, self.max_warmup = target, after, max_warmup
        self.restart()

    def restart(self) -> None:
        """Begin warmup again from the next reading."""
        self.state, self.change, self.slope, self.ending = ControllerState(), ChangeGauge(), SlopeGauge(), Ending()

    @property
    def parts(self) -> tuple[FloatState, ...]:
        """What is saved."""
        return self.state, self.change, self.slope, self.ending

    @property
    def phase(self) -> str:
        return PHASES[int(self.state.phase)]

    @property
    def applied(self) -> float:
        """The scale of the last step: the controller's, shortened where that step's gradient called for it."""
        return self.state.scale * self.state.shortening

    def rising(self, rate: float) -> bool:
        """Whether the rate that would be applied is above any that warmup has seen."""
        return self.ending.is_high(self.state.scale * rate)

    def update(
        self,
        rate: float,
        reading: Reading | None = None,
        end_slope: float = math.nan,
        surprise: float = 1.0,
        persistence: float = 1.0,
    ) -> Decision:
        """Decide the coming step.

        Args:
            rate: the common one of all groups, above 0; only its ratios between steps matter.
            reading: if a probe was made for this step.
            end_slope: e of this step's gradient; nan if unknown.
            surprise: gradient norm of this step over its running average if that is an event, else 1.
            persistence: how much farther steps lead than independent ones, see `warmctl.momentum`; 1 without momentum.
        """
        s = self.state
        s.age += 1
        s.shortening = min(1.0, s.shortening * RECOVERY)
        if self.phase == "done":
            if self.after == "release" and self._measured:
                s.scale = min(1.0, s.scale * RELEASE_GROWTH)
            return self._decision(rate)
        self.slope.take(end_slope)
        if reading is not None and not reading.ok:
            reason = f"scale held: {reading.reason}"
        else:
            if reading is not None:
                self._read(reading, rate)
            reason = self._move(rate, reading, persistence) if self._measured else UNKNOWN
        self._shorten(rate, surprise)
        return self._end(rate, reason)

    def changed(self, change: float, rate: float) -> None:
        """RRC of the step just made, at this applied rate; nan if it could not be seen."""
        if not math.isnan(change):
            self.change.take(change, rate)
            self.state.measured_scale = self.state.scale

    @property
    def _measured(self) -> bool:
        return self.state.readings > 0 or self.change.known

    def _read(self, reading: Reading, rate: float) -> None:
        """Rising counts at once; a fall counts half in log, and as one of two decades at most; in distress not at all.

        A Ritz value is a lower bound: a low one, or one below 0, may only mean that the probe looked elsewhere.
        """
        s = self.state
        s.readings += 1
        before, curvature = s.forecast, max(reading.ratio, 0.0) / rate
        if math.isnan(before) or (curvature >= before and not (reading.noisy and before)):
            forecast = curvature
        else:
            forecast = math.sqrt(before * max(curvature, before * LARGEST_FALL))
        noisy = reading.noisy and s.readings > 1
        share = math.sqrt(s.share * reading.share) if noisy else reading.share
        if reading.distress and forecast * s.share < before * share:
            return
        s.forecast, s.share, s.tolerant = forecast, share, float(reading.tolerant)

    def _carried(self, rate: float) -> float:
        """The scale at which r is at target, by the last reading; infinite before it."""
        s = self.state
        return math.inf if math.isnan(s.forecast) else self.target * s.share / max(s.forecast * rate, 1e-30)

    def _bearable(self, rate: float, persistence: float) -> float:
        """The scale at which RRC is what a step may have; infinite if it was never seen."""
        return self.slope.allowed_change(persistence) / max(self.change.of(rate), 1e-30)

    def _shorten(self, rate: float, surprise: float) -> None:
        near = self.state.scale > NEAR * self._carried(rate)
        allowed = SURPRISE if near else SURPRISE_FAR
        if surprise > allowed:
            self.state.shortening = min(self.state.shortening, max(allowed / surprise, SHORTEST))

    def _move(self, rate: float, reading: Reading | None, persistence: float) -> str:
        """Towards the scale that all gauges allow, or 1. Once warmup has ended, no higher than where it did.

        RRC is then looked at after shocks alone; the last of warmup allows what it ended at, as rates fall.
        """
        s = self.state
        carried, bearable = self._carried(rate), self._bearable(rate, persistence)
        if self.phase != "warmup":
            bearable = min(s.settled, bearable)
        elif self._turns(rate, persistence):
            s.turned = 1.0
        limit, before, undone = min(1.0, carried, bearable), s.scale, False
        overshoot = max(1.0 / self.target, 1.0) if s.tolerant else 1.0
        first = reading is not None and s.readings == 1 and not self.change.known and self.phase == "warmup"
        if first and reading is not None:
            s.scale = max(min(limit, FIRST / max(reading.relative_update, 1e-30)), FLOOR)
        elif carried * overshoot < s.scale:
            s.scale = max(carried, FLOOR)
        elif EXCESS * bearable < s.scale:
            s.scale = max(CUT * s.scale, bearable, FLOOR)
        elif self._undone:
            s.scale, undone = max(s.scale / s.aged, FLOOR), True
            s.highest_scale = s.scale
        elif limit > s.scale:
            s.scale = max(s.scale, min(limit, s.scale * self._growth(rate, persistence), EVIDENCE * s.measured_scale))
        s.measured_scale = s.scale if reading is not None else s.measured_scale
        s.highest_scale = max(s.highest_scale, s.scale)
        if first:
            return f"started at scale {s.scale:.3g}"
        holder = (
            RATIO if carried < bearable else REPRESENTATION if self.phase == "warmup" or bearable < s.settled else ENDED
        )
        if undone:
            return UNDONE
        if s.scale < before:
            return f"cut from scale {before:.3g} to {s.scale:.3g}: {holder}"
        if s.scale >= 1.0:
            return NOTHING
        if s.scale >= limit:
            return holder
        return RISING if s.scale > before else WAITING if s.scale >= EVIDENCE * s.measured_scale else SLOPE

    @property
    def _undone(self) -> bool:
        """Whether the next gradients surely undo the last steps."""
        return self.phase == "warmup" and self.state.turned > 0.0 and self.slope.certainty < AGAINST

    def _turns(self, rate: float, persistence: float) -> bool:
        """Whether e is against the last steps, and these move the network enough for it to count."""
        s = self.state
        moves = self.change.of(s.scale * rate) * persistence >= ASKED
        return moves and s.age > 3 and self.slope.mean < 0.0

    def _growth(self, rate: float, persistence: float) -> float:
        """The factor that the scale may grow by at this step."""
        s, slope = self.state, self.slope
        if self.phase != "warmup":
            return RETURN
        aged = s.aged
        change = self.change.of(s.scale * rate) * persistence
        if self.change.known and change < ASKED and not s.turned:
            growth = FASTEST
        else:
            growth = min(FASTEST, math.exp(EAGER * max(0.0, slope.significance)))
            if change < CALM:
                growth = max(growth, aged if slope.mean >= 0.0 else math.sqrt(aged))
        growth = min(growth, float(aged ** (POWER_TURNED if s.turned else POWER)))
        return max(growth, RETURN) if s.scale < s.highest_scale and slope.significance > OPPOSED else growth

    def _end(self, rate: float, reason: str) -> Decision:
        """End warmup if it is time, and decide."""
        s = self.state
        if self.phase == "warmup":
            why = self._over(rate, reason)
            if why:
                s.settled, s.phase = s.scale, 1.0 if self.after == "guard" else 2.0
                reason = f"warmup ended: {why}"
        return self._decision(rate, reason)

    def _over(self, rate: float, reason: str) -> str:
        """Why warmup is over, or ""."""
        s = self.state
        if self.max_warmup is not None and s.age >= self.max_warmup:
            return f"max_warmup of {self.max_warmup} steps reached at scale {s.scale:.3g}"
        if not self._measured:
            patient = s.age < PATIENT_STEPS
            return "" if patient else f"no probe succeeded, the rate stays at {UNMEASURED:g} of the schedule"
        self.ending.take(s.age, s.scale, rate)
        if not self.ending.over(s.age, s.scale):
            return ""
        if s.scale >= 1.0:
            return "full rate"
        if reason == RISING:  # too slowly for a new high
            high = self.ending
            fell = high.highest * high.age > s.age * high.scale * rate  # by more than it has grown older
            reason = DECAY if fell else SLOPE
        return f"the scale {'fell to' if reason == UNDONE else 'settled at'} {s.scale:.3g}: {reason}"

    def _decision(self, rate: float, reason: str = "") -> Decision:
        s = self.state
        ratio = self.applied * s.forecast * rate
        if s.shortening < 1.0 and reason in (NOTHING, RISING, ENDED):
            reason = SHORTENED
        return Decision(self.applied, self.phase, ratio, ratio / (self.target * s.share), reason)
