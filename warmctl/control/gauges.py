"""What the controller remembers of its two gauges beside curvature: how far a step moves what the network computes, and
whether the next gradient agrees with the last steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from warmctl.state import COUNT, Allowed, FloatState, saved

CHANGE = 0.5
"""Relative change of representations that a step may make without momentum, and divided by the persistence of steps
with it: .115 at .9, where healthy training makes .04 to .15, whatever the network, optimizer or rate."""
LIFT, SURE = 0.4, 0.5
"""Most that is added while the slope is surely positive, as steps are alike then with or without momentum; and from
which certainty on it is."""
BELIEVED = 15.0
"""Readings after which the significance of the slope counts as certainty by two thirds."""
LARGEST_FALL = 1e-3
"""A new change per rate counts as no less than this part of the old one."""
NEWEST = 0.1
"""Weight of the newest slope in its averages."""


@dataclass
class ChangeGauge(FloatState):
    """The relative representation change (RRC) of a step over its learning rate: the mean, in log, of old and new."""

    per_rate: float = saved(math.nan, Allowed(0.0, unknown=True))

    def take(self, change: float, rate: float) -> None:
        """Args: change: RRC of a step, or inf; nan if unknown. rate: as applied to that step, above 0."""
        found = min(change, 1e6) / rate
        if found > 0.0:
            before = self.per_rate if self.known else found
            self.per_rate = math.sqrt(before * max(found, LARGEST_FALL * before))

    @property
    def known(self) -> bool:
        return not math.isnan(self.per_rate)

    def of(self, rate: float) -> float:
        """RRC of a step at this rate; 0 if unknown."""
        return self.per_rate * rate if self.known else 0.0


@dataclass
class SlopeGauge(FloatState):
    """Running averages of the slope e at the end of the steps."""

    mean: float = saved(0.0, Allowed(-1.0, 1.0))
    square: float = saved(0.0, Allowed(0.0, 1.0))
    readings: float = saved(0.0, COUNT)

    def take(self, slope: float) -> None:
        """Args: slope: e, in [−1, 1]; nan if unknown."""
        if math.isnan(slope):
            return
        self.readings += 1
        weight = NEWEST if self.readings > 1 else 1.0
        self.mean += weight * (slope - self.mean)
        self.square += weight * (slope * slope - self.square)

    @property
    def significance(self) -> float:
        """Mean over root mean square, in [−1, 1]: whatever the size of e in an optimizer's geometry."""
        return self.mean / math.sqrt(self.square) if self.square > 0.0 else 0.0

    @property
    def certainty(self) -> float:
        """The significance, in so far as there are readings enough to believe it."""
        return self.significance * (1.0 - math.exp(-self.readings / BELIEVED))

    def allowed_change(self, persistence: float) -> float:
        """RRC that a step may have: the more, the surer the next gradients agree with the last steps.

        Args: persistence: of steps, see `warmctl.momentum`; at least 1.
        """
        return CHANGE / persistence + LIFT * max(0.0, self.certainty - SURE) / (1.0 - SURE)
