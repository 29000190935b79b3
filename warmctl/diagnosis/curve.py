"""The loss on one scale for every run: how far above or below that of the start, in nats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.ndimage import median_filter

from warmctl.diagnosis.columns import NAMES
from warmctl.diagnosis.log import Floats, Log, Series
from warmctl.diagnosis.rules import SHORTEST, limit

CALLED = (
    f". A column of losses is called one of {', '.join(NAMES['loss'])}: rename yours, or name it: `loss=` (`--loss`)"
)
FLOOR = 0.02
"""Losses below this part of the first one are not told apart."""


@dataclass(frozen=True)
class Curve:
    """level = log(loss / first loss + .02) − log 1.02, and its running median."""

    steps: Floats
    loss: Floats
    level: Floats
    smooth: Floats
    middle: Floats
    """The running median of the loss itself."""
    noise: float
    """Usual deviation of the level from its running median."""
    lost_from: float | None
    """The step from which on no loss was finite."""

    @classmethod
    def of(cls, log: Log) -> Curve:
        """Raises ValueError if too few losses were logged."""
        logged = log["loss"]
        series = logged.finite
        if len(logged) < SHORTEST:
            notes = "".join(f" ({column}: {note})" for column, note in log.notes.items())
            columns = ", ".join(log.columns)
            without = f"columns {columns}{CALLED}" if columns else "no rows"
            has = f"{len(logged)} rows with a loss{notes}" if len(logged) else without
            raise ValueError(f"{log.name}: a diagnosis needs {SHORTEST} rows or more with a loss, and finds {has}")
        if not len(series):
            raise ValueError(f"{log.name}: none of its losses is finite")
        last = series.steps[-1]
        later = logged.steps[logged.steps > last]
        level = _level(series.values)
        width = max(3, len(level) // 50) | 1
        smooth, middle = (np.asarray(median_filter(curve, width, mode="nearest")) for curve in (level, series.values))
        noise = 1.4826 * float(np.median(np.abs(level - smooth)))
        return cls(series.steps, series.values, level, smooth, middle, noise, float(later[0]) if len(later) else None)

    @cached_property
    def end(self) -> float:
        """The level at the end: median of the last twentieth."""
        return float(np.median(self.smooth[-max(1, len(self.smooth) // 20) :]))

    @cached_property
    def lowest(self) -> int:
        """Index of the lowest level."""
        return int(np.argmin(self.smooth))

    @cached_property
    def gained(self) -> float:
        """How far the loss got below the start's, at its best."""
        return max(0.0, -float(self.smooth.min()))

    @cached_property
    def setback(self) -> Floats:
        """How far the level is above the lowest before it."""
        return self.smooth - np.minimum.accumulate(self.smooth)

    @cached_property
    def smooth_before(self) -> Floats:
        """The median of the levels before each row, as wide as a twentieth of the record."""
        width = max(5, len(self.level) // 20)
        padded = np.concatenate([np.full(width, self.level[0]), self.level])
        windows = np.lib.stride_tricks.sliding_window_view(padded, width)[: len(self.level)]
        return np.asarray(np.median(windows, axis=1), dtype=np.float64)

    @cached_property
    def end_loss(self) -> float:
        return float(np.median(self.middle[-max(1, len(self.middle) // 20) :]))

    def back_at(self, index: int, level: float) -> float | None:
        """The first step after a row at which the level is at or below this again."""
        found = np.flatnonzero(self.smooth[index:] <= level)
        return float(self.steps[index + found[0]]) if len(found) else None


@dataclass(frozen=True)
class Warmup:
    """Where warmup ended, as far as the record tells."""

    end: float | None
    """The step at which the rate was at its peak; None if the record does not say."""
    total: float
    """Steps of the record, from the first step of the run on."""
    peak: float
    """The largest rate; NaN if none was logged."""
    column: str
    """What it is read from."""
    controlled: bool
    """Whether AdaptiveWarmup set the rate."""
    seen: bool
    """Whether the record has the start of the run; of one that begins in its middle `end` is None."""

    @property
    def length(self) -> int:
        return 0 if self.end is None else round(self.end)

    @property
    def share(self) -> float:
        """Of the record."""
        return 0.0 if self.end is None else min(1.0, self.end / max(1.0, self.total))


def warmup_of(log: Log) -> Warmup:
    """From a rate that rises to its peak: of a controlled run the applied one, at its last new high.

    The phases of AdaptiveWarmup tell less: as a schedule falls, the scale rises long after the rate has peaked.
    """
    lr, scheduled, scale = log["lr"].finite, log["scheduled_lr"].finite, log["scale"].finite
    controlled = bool(len(scale)) and bool((scale.values < 1.0).any()) and bool(log.words("phase"))
    steps = log["loss"].steps
    total = float(steps[-1]) + (steps[0] == 0.0)
    peaks = scheduled if len(scheduled) else lr
    peak = float(peaks.values.max()) if len(peaks) else math.nan
    rate = lr if len(lr) or not controlled else scale
    end = _peak_at(rate)
    if end and steps[0] == 0.0:
        end += 1.0
    seen = not _is_late(log) and (not log.restarts or bool(end))
    end = min(end, total) if seen and end is not None else None
    return Warmup(end, total, peak, rate.column, controlled, seen)


def _is_late(log: Log) -> bool:
    """Whether the first loss is from later than logging once in so many steps explains."""
    steps = log["loss"].steps
    return log.unit == "step" and steps[0] > max(limit("late"), 1.0 + 2.0 * float(np.median(np.diff(steps))))


def _peak_at(rate: Series) -> float | None:
    """The step; 0 where the rate is near its peak from the first row on."""
    if not len(rate) or not rate.values.max() > 0.0:
        return None
    peak = rate.values.max()
    if rate.values[0] >= 0.9 * peak:
        return 0.0
    return float(rate.steps[int(np.argmax(rate.values >= 0.999 * peak))])


def _level(loss: Floats) -> Floats:
    """Of losses that may be negative as well: then the lowest one counts as zero."""
    base = min(0.0, float(loss.min()))
    unit = float(loss[0]) - base
    if not unit > 0.0:
        unit = max(float(loss.max()) - base, 1e-300)
    return np.asarray(np.log((loss - base) / unit + FLOOR) - np.log((loss[0] - base) / unit + FLOOR), dtype=np.float64)
