"""What a claim about warmup is here: a trial of one seed, and the effect that the claim foretells."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

Figures = Mapping[str, float]
"""What a trial measured, by name; the same names for each seed."""


@dataclass(frozen=True)
class Claim:
    """One line of what is said of warmup, and how it is tried.

    Attributes:
        number: the place in the table; some numbers have several lines, told apart by `title`.
        title: the claim, in a line, as a reader would say it.
        source: who says it: author and year, or "common advice".
        setting: the model, data and optimizer of the trial, in a line.
        trial: (seed, quick) → figures. Deterministic in the seed; quick: fewer steps, some seconds a seed.
        effect: of a trial's figures; above `margin` where the claim holds, below −margin where the reverse does.
        unit: of the effect, as the table prints it: "final loss, without − with".
        margin: effect that is worth speaking of, in the effect's units.
    """

    number: int
    title: str
    source: str
    setting: str
    trial: Callable[[int, bool], Figures]
    effect: Callable[[Figures], float]
    unit: str
    margin: float = 0.0


HOLDS, NOT_HERE, REVERSE = "holds", "does not at this size", "the reverse"


def interval(effects: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval by Student's t: a bootstrap of five is too narrow. One seed has none."""
    values = np.asarray(effects, dtype=float)
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return mean, -math.inf, math.inf
    half = float(stdtrit(count - 1, 0.975) * values.std(ddof=1) / math.sqrt(count))
    return mean, mean - half, mean + half


def verdict(effects: Sequence[float], margin: float) -> str:
    """By the interval of the mean: above `margin`, below −margin, or neither."""
    _, low, high = interval(effects)
    return HOLDS if low > margin else REVERSE if high < -margin else NOT_HERE
