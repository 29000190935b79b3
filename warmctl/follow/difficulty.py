"""A curriculum in step with the rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from warmctl.follow.follower import Levers
from warmctl.follow.kept import whole

MOMENTS = "mean_rate", "mean_difficulty", "square_rate", "square_difficulty", "product"


class Difficulty:
    """d_t = easiest + (1 − easiest) · s_t: the data grow harder with the rate, and are all there after warmup.

    When warmup has ended, at whatever scale, the difficulty is 1: a rate that stays below the schedule must not hide
    data for ever. While it lasts, hidden data are not learnt: `easiest` is better too high than too low.

    >>> sampler = EasyFirst(scores=[len(line) for line in ("to", "be", "or not to be")])
    >>> opt = AdaptiveWarmup(optimizer, model).follow(Difficulty(sampler, easiest=0.5))
    >>> train(opt)
    >>> 0.5 <= sampler.difficulty <= 1.0
    True

    Args:
        sampler: what takes the difficulty, in [0, 1]: a function of it, or an object with `set_difficulty(d)` or an
            attribute `difficulty`, as `EasyFirst` has. If it has a `state_dict()` of numbers and `load_state_dict`, its
            place in the data is saved with the optimizer.
        easiest: the difficulty at scale 0.

    Readings: `difficulty` of the batches that come, `alignment`.

    Raises: TypeError for an object without a setter, ValueError for `easiest` outside [0, 1].
    """

    def __init__(self, sampler: Any, easiest: float = 0.7) -> None:
        if not 0.0 <= easiest <= 1.0:
            raise ValueError(f"easiest must be in [0, 1], the difficulty at scale 0, got {easiest!r}")
        self.sampler, self.easiest = sampler, easiest
        self._set = _setter(sampler)
        self.difficulty = math.nan
        self._steps, self._moments = 0, dict.fromkeys(MOMENTS, 0.0)

    @property
    def alignment(self) -> float:
        """Pearson correlation of applied rate and difficulty over the steps so far; nan while one is constant."""
        spread = self._moments["square_rate"] * self._moments["square_difficulty"]
        return self._moments["product"] / math.sqrt(spread) if spread > 0.0 else math.nan

    def attach(self, levers: Levers) -> None:
        self._move(levers.scale, "warmup")

    def detach(self) -> None:
        self._set(1.0)

    def follow(self, scale: float, rate: float, phase: str) -> None:
        self._take_in(rate, self._move(scale, phase))

    def readings(self) -> dict[str, float]:
        return {"difficulty": self.difficulty, "alignment": self.alignment}

    def state_dict(self) -> dict[str, float]:
        own = {"steps": float(self._steps), "difficulty": self.difficulty, **self._moments}
        return own | {f"sampler.{name}": value for name, value in self._sampler_state().items()}

    def load_state_dict(self, values: dict[str, float]) -> None:
        if values["difficulty"] < 0.0 or values["difficulty"] > 1.0:
            raise ValueError(f"difficulty is {values['difficulty']!r} in the state, it must be in [0, 1]")
        self._steps = whole("steps", values["steps"])
        self._moments = {name: values[name] for name in MOMENTS}
        theirs = {name: values[f"sampler.{name}"] for name in self._sampler_state()}
        if theirs:
            self.sampler.load_state_dict(theirs)
        if not math.isnan(values["difficulty"]):
            self.difficulty = values["difficulty"]
            self._set(self.difficulty)

    def _move(self, scale: float, phase: str) -> float:
        self.difficulty = self.easiest + (1.0 - self.easiest) * scale if phase == "warmup" else 1.0
        self._set(self.difficulty)
        return self.difficulty

    def _take_in(self, rate: float, difficulty: float) -> None:
        """Welford's update of means, squares and product."""
        self._steps += 1
        m = self._moments
        from_mean = rate - m["mean_rate"], difficulty - m["mean_difficulty"]
        m["mean_rate"] += from_mean[0] / self._steps
        m["mean_difficulty"] += from_mean[1] / self._steps
        m["square_rate"] += from_mean[0] * (rate - m["mean_rate"])
        m["square_difficulty"] += from_mean[1] * (difficulty - m["mean_difficulty"])
        m["product"] += from_mean[0] * (difficulty - m["mean_difficulty"])

    def _sampler_state(self) -> dict[str, float]:
        if not hasattr(self.sampler, "load_state_dict") or not hasattr(self.sampler, "state_dict"):
            return {}
        state = self.sampler.state_dict()
        return {name: float(value) for name, value in state.items() if isinstance(value, (int, float, Tensor))}


def _setter(sampler: Any) -> Callable[[float], Any]:
    if callable(method := getattr(sampler, "set_difficulty", None)):
        found: Callable[[float], Any] = method
        return found
    if hasattr(sampler, "difficulty"):
        return _Attribute(sampler)
    if callable(sampler):
        called: Callable[[float], Any] = sampler
        return called
    raise TypeError(
        "sampler must be a function of the difficulty, or have set_difficulty(d) or an attribute 'difficulty'; "
        f"{type(sampler).__name__} has neither: see warmctl.EasyFirst(scores)"
    )


class _Attribute:
    def __init__(self, holder: Any) -> None:
        self.holder = holder

    def __call__(self, difficulty: float) -> None:
        self.holder.difficulty = difficulty
