"""A value by step, made short enough to be kept."""

from __future__ import annotations

import numpy as np

SETTLED = 0.25
"""Last part of a run, whose median counts."""


def thinned(values: dict[int, float], count: int = 120) -> list[list[float]]:
    """[steps, values] at about `count` steps evenly and as many evenly in log."""
    steps, last = list(values), len(values) - 1
    even, log = np.linspace(0, last, count), np.geomspace(1, last + 1, count) - 1
    chosen = sorted({int(i) for i in (*even, *log)})
    return [[steps[i] for i in chosen], [float(f"{values[steps[i]]:.4g}") for i in chosen]]
