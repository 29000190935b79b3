"""The scheduled rates of all parameter groups as one number, which the controller decides by."""

from __future__ import annotations

from torch.optim import Optimizer

from warmctl.rates import learning_rate, trains
from warmctl.state import POSITIVE, check

ROUNDING, TINY = 1e-9, 1e-3
"""Relative difference of two rates that is none; and part of the largest below which a rate is none yet."""


class CommonRate:
    """One number for the rates of all groups, which forecasts are over: what is measured is at most proportional to it.

    r and RRC grow no more than the rate of that group does which has grown most. The common rate is the largest of the
    first rates, times the largest growth since of a group that trains: the largest rate where one schedule drives all,
    more where they move apart, and no less where the fastest group is frozen.

    Args: optimizer: read only.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._first: list[float] = []

    def restart(self) -> None:
        """The present rates are the first ones; of a group at 0, which may take turns with others, its own remains."""
        self._first = [0.0 if rate else first for first, rate in zip(self._known, self._rates, strict=True)]
        self.note_first_rates()

    def note_first_rates(self) -> bool:
        """Call it at each step. Returns whether a group begins to train later than others, for the first time."""
        before, rates = self._known, self._rates
        least = TINY * (max(before, default=0.0) or max(rates, default=0.0))
        self._first = [first or (rate if rate >= least else 0.0) for first, rate in zip(before, rates, strict=True)]
        return any(before) and self._first != before

    @property
    def value(self) -> float:
        """At the scheduled rates; 0 where nothing moves. Waits for the device if one of them is a tensor there."""
        rates, known = self._rates, self._known
        largest = max(rates, default=0.0)
        growth = max([rate / first for rate, first in zip(rates, known, strict=True) if first], default=0.0)
        if growth <= 0.0:
            return largest
        apart = growth * max(known) / largest
        return largest if abs(apart - 1.0) < ROUNDING else largest * apart

    @property
    def _rates(self) -> list[float]:
        return [learning_rate(group) if trains(group) else 0.0 for group in self.optimizer.param_groups]

    @property
    def _known(self) -> list[float]:
        """The first rate of each group, 0 if there was none."""
        groups = len(self.optimizer.param_groups)
        return [*self._first, *[0.0] * groups][:groups]

    def state_values(self) -> list[float]:
        return self._known

    def check_state_values(self, values: list[float]) -> None:
        check(values, {f"first rate of group {place}": POSITIVE for place in range(len(values))})

    def load_state_values(self, values: list[float]) -> None:
        self._first = values
