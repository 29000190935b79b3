"""What is done to a curve before it is drawn: made of numbers, smoothed, thinned, freed of what is not finite."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]


def floats(column: Iterable[Any]) -> Floats:
    """A column of a history, nan where it has no value."""
    return np.array([np.nan if value is None else value for value in column], np.float64)


def smooth(y: Floats, log: bool) -> Floats:
    """A centred triangular mean over one part in 75 of the run; `y` itself if the run is short.

    The window grows from one value at the start, where the curve is steep, and is cut at the end.
    """
    half = len(y) // 300
    if half < 1:
        return y
    mean, at = np.log(y) if log else y, np.arange(len(y))
    first, last = np.maximum(at - half, 0), np.minimum(at + np.minimum(half, at), len(y) - 1)
    for _ in range(2):
        total = np.concatenate(([0.0], np.cumsum(mean)))
        mean = (total[last + 1] - total[first]) / (last + 1 - first)
    return np.exp(mean) if log else mean


def thin(x: Floats, y: Floats, points: int = 20_000) -> tuple[Floats, Floats]:
    """A curve that looks the same with about as many points: the lowest and the highest of each stretch."""
    if len(y) <= points:
        return x, y
    width = 4 * len(y) // points
    padded = np.pad(y, (0, -len(y) % width), constant_values=np.nan).reshape(-1, width)
    starts = np.arange(0, len(y), width)
    lowest = starts + np.where(np.isnan(padded), np.inf, padded).argmin(1)
    highest = starts + np.where(np.isnan(padded), -np.inf, padded).argmax(1)
    early = np.arange(points // 10)  # all of the first steps, for a logarithmic axis
    keep = np.unique(np.concatenate((early, lowest, highest, [len(y) - 1])))
    return x[keep], y[keep]


def finite(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    keep = np.isfinite(y)
    return x[keep], y[keep]


def all_equal(curves: list[Floats]) -> bool:
    longest = max(curves, key=len, default=np.zeros(0))
    return all(np.array_equal(curve, longest[: len(curve)], equal_nan=True) for curve in curves)
