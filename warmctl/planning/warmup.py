"""How long a linear warmup has to be, for a stability ratio that falls (or does not) as training goes on.

r₁(t) is the ratio at the full peak rate at step t = 1, 2, …; a linear warmup over W steps applies min(1, t/W) of the
rate, and so min(1, t/W)·r₁(t) of the ratio. It has to stay at or below a target: 1 is the edge of stability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
from numpy.typing import NDArray

from warmctl.record.history import History

ROUNDING = 1e-9
LONGEST = 10_000_000
"""Steps of a warmup beyond which it is not looked for."""


@dataclass(frozen=True)
class ExponentialFall:
    """Sharpness that falls from what it is now to a share of it: λ(t)/λ(0) = to + (1 − to)·exp(−t/time).

    >>> optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    >>> plan(model, loss_fn, batch, optimizer, reference=ExponentialFall(to=0.01, time=50)).warmup_steps > 50
    True

    Args:
        to: what is left in the end, as a share of the sharpness now, at least 0.
        time: steps until 63 % of the fall is done, above 0.
    """

    to: float
    time: float

    def __post_init__(self) -> None:
        for name, value, least in (("to", self.to, "at least"), ("time", self.time, "above")):
            fine = isinstance(value, Real) and math.isfinite(value) and (value > 0 or (value == 0 and least != "above"))
            if not fine:
                raise ValueError(f"{name} of ExponentialFall must be a number {least} 0, got {value!r}")

    def ratios(self, first: float, target: float, total_steps: int | None) -> NDArray[np.float64] | None:
        """r₁(t) from r₁(0) = `first`, at t = 1, 2, … until it stays below `target`; None if it never does.

        With `total_steps`, of a fall that does not reach the target: until then.
        """
        last = first * self.to
        if first <= target and last <= target:
            steps = 0.0
        elif last < target:
            steps = self.time * math.log((first - last) / (target - last))
        else:
            steps = math.inf
        steps = min(
            math.floor(steps) + 1 if math.isfinite(steps) else math.inf,
            math.inf if total_steps is None else total_steps,
        )
        if steps > LONGEST:
            return None
        return last + (first - last) * np.exp(-np.arange(1, int(steps) + 1) / self.time)


def smallest_linear_warmup(ratios: Sequence[float] | NDArray[np.float64], target: float = 1.0) -> int:
    """The smallest W with max_t min(1, t/W)·r₁(t) ≤ target over the steps given; 0 where no warmup is needed.

    A step t with r₁(t) above the target must come early in the warmup: W ≥ t·r₁(t)/target. The largest of these is W;
    it is longer than the steps given where r₁ is still above the target at the last of them.
    """
    values = np.asarray(ratios, dtype=np.float64)
    above = np.flatnonzero(values > target * (1 + ROUNDING))
    if not len(above):
        return 0
    return math.ceil(float(((above + 1) * values[above]).max()) / target * (1 - ROUNDING))


def recorded_ratios(history: History, rate: float) -> NDArray[np.float64]:
    """r₁(t) at the peak `rate` from a record, held between readings.

    A reading is sharpness over threshold, as measured; where a row lacks them, its stability ratio per unit of applied
    rate, which the wrapper smooths.

    Raises: ValueError for a record without a single reading.
    """
    names = ("step", "sharpness", "threshold", "stability_ratio", "lr")
    known: dict[int, float] = {}
    for step, sharpness, threshold, ratio, lr in zip(*(history[name] for name in names), strict=True):
        pairs = [(a, b) for a, b in ((sharpness, threshold), (ratio, lr)) if a is not None and b]
        per_rate = next((a / b for a, b in pairs if math.isfinite(a / b)), math.nan)
        if step >= 1 and math.isfinite(per_rate):
            known[step] = per_rate
    if not known:
        raise ValueError(
            "the history of reference has no finite stability_ratio: record the run with AdaptiveWarmup, "
            "control=False if it should not be changed"
        )
    steps = np.array(list(known))
    index = np.searchsorted(steps, np.arange(1, steps[-1] + 1), side="right") - 1
    return np.array(list(known.values()))[np.maximum(index, 0)] * rate
