"""A value by step, made short enough to be kept; and where a run was lost."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

SETTLED = 0.25
"""Last part of a run, whose median counts."""


def thinned(values: Mapping[int, float], count: int = 120) -> list[list[float]]:
    """[steps, values] at about `count` steps evenly and as many evenly in log; of the finite values alone."""
    steps = [step for step, value in values.items() if math.isfinite(value)]
    even, log = np.linspace(0, len(steps) - 1, count), np.geomspace(1, max(len(steps), 1), count) - 1
    chosen = sorted({int(i) for i in (*even, *log)}) if steps else []
    return [[steps[i] for i in chosen], [float(f"{values[steps[i]]:.4g}") for i in chosen]]


def diverged(losses: Mapping[int, float], last: int) -> int | None:
    """The first step whose loss is not finite, if there is such a loss among the `last` ones."""
    gone = [step for step, loss in losses.items() if not math.isfinite(loss)]
    return gone[0] if gone and gone[-1] in list(losses)[-last:] else None
