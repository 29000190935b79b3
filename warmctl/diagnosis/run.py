"""A run that is to be judged: its log, its loss on one scale, its warmup."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from warmctl.diagnosis.curve import Curve, Warmup, warmup_of
from warmctl.diagnosis.diagnosis import Evidence
from warmctl.diagnosis.log import Log, Series

EARLY = 0.25
"""Part of the record that counts as soon after warmup, where twice the warmup is shorter."""


@dataclass(frozen=True)
class Run:
    log: Log
    curve: Curve
    warmup: Warmup

    @classmethod
    def of(cls, log: Log) -> Run:
        curve = Curve.of(log)
        return cls(log, curve, warmup_of(log))

    @property
    def first(self) -> float:
        return float(self.curve.steps[0])

    @property
    def last(self) -> float:
        return float(self.log["loss"].steps[-1])

    @property
    def early_until(self) -> float:
        """The last step of warmup and the time soon after it; of a record that begins later its first step."""
        if not self.warmup.seen:
            return self.first
        return max(2.0 * self.warmup.length, self.first + EARLY * (self.last - self.first))

    def at(self, step: float) -> str:
        """A step, or the row that is counted as one, in words."""
        return f"{self.log.unit} {step:.15g}"

    def row(self, index: int) -> str:
        """A loss and its step, in words."""
        return f"{self.curve.loss[index]:.3g} ({self.at(self.curve.steps[index])})"

    def about(self, index: int) -> str:
        """The loss around a step, in words."""
        return f"about {self.curve.middle[index]:.3g} ({self.at(self.curve.steps[index])})"

    @property
    def took(self) -> str:
        """How long warmup took, in words."""
        return f"took {self.warmup.length} of {self.warmup.total:.15g} {self.log.unit}s"

    def rows(self, says: str, *indices: int) -> Evidence:
        """Evidence of rows of the loss."""
        curve = self.curve
        steps = tuple(int(curve.steps[i]) for i in indices)
        return Evidence(says, self.log["loss"].column, steps, tuple(float(curve.loss[i]) for i in indices))


def tail(series: Series, share: float) -> Series:
    """The last part of a series, at least one row of it."""
    return Series(series.column, series.steps[-_rows(series, share) :], series.values[-_rows(series, share) :])


def head(series: Series, share: float) -> Series:
    return Series(series.column, series.steps[: _rows(series, share)], series.values[: _rows(series, share)])


def middle(series: Series) -> float:
    """The median; NaN of nothing."""
    return float(np.median(series.values)) if len(series) else float("nan")


def _rows(series: Series, share: float) -> int:
    return max(1, int(share * len(series)))
