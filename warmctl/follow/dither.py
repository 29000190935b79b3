"""A slow swing of the rate in place of the noise that a large batch lacks."""

from __future__ import annotations

import math
from typing import Any

from warmctl.follow.follower import Levers
from warmctl.follow.kept import whole
from warmctl.follow.noise import NoiseScale


class Dither:
    """η_t (1 + a·sin(2πt/P)) / (1 + a) in warmup, while gradients are quiet: large batches that starve for noise.

    The division makes the crest of the swing, not its mean, the rate that is held below target. Quiet is a noise scale
    B_noise/B below `quiet`, measured from successive batches, see `NoiseScale`; elsewhere the rate is left alone.

    >>> opt = AdaptiveWarmup(optimizer, model).follow(Dither(period=8, amplitude=0.3))
    >>> train(opt)
    >>> opt.metrics["dither"] <= 1.0
    True

    Args:
        period: P, steps.
        amplitude: a, in (0, 1).
        quiet: the noise scale to stay below. At 1 the noise of the batch is as large as the gradient.

    Readings: `noise_scale` (B_noise/B), `dither` (the factor on the rate); in warmup.

    Raises: ValueError for a period below 2, an amplitude outside (0, 1) or `quiet` not above 0.
    """

    moves_rate = True

    def __init__(self, period: float, amplitude: float, quiet: float = 1.0) -> None:
        if not 2.0 <= period < math.inf:
            raise ValueError(f"period must be at least 2 steps, got {period!r}")
        if not 0.0 < amplitude < 1.0:
            raise ValueError(f"amplitude must be in (0, 1), a fraction of the rate, got {amplitude!r}")
        if not quiet > 0.0:
            raise ValueError(f"quiet must be above 0, the noise scale B_noise/B to stay below, got {quiet!r}")
        self.period, self.amplitude, self.quiet = period, amplitude, quiet
        self._levers: Levers | None = None
        self._noise: NoiseScale | None = None
        self._steps, self._readings = 0, {"noise_scale": math.nan, "dither": 1.0}
        self._warming = True

    def attach(self, levers: Levers) -> None:
        self._levers = levers
        self._noise = NoiseScale([p for group in levers.groups for p in group["params"]])

    def follow(self, scale: float, rate: float, phase: str) -> None:
        assert self._levers is not None and self._noise is not None
        self._warming = phase == "warmup"
        if not self._warming:
            return
        self._noise.see()
        self._steps += 1
        factor = 1.0
        if self._noise.ratio < self.quiet:
            swing = self.amplitude * math.sin(2.0 * math.pi * self._steps / self.period)
            factor = (1.0 + swing) / (1.0 + self.amplitude)
            for group in range(len(self._levers.groups)):
                self._levers.multiply_rate(group, factor)
        self._readings = {"noise_scale": self._noise.ratio, "dither": factor}

    def readings(self) -> dict[str, float]:
        return self._readings if self._warming else {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": float(self._steps), **(self._noise.state_dict() if self._noise else {})}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self._steps = whole("steps", values["steps"])
        if self._noise is not None:
            self._noise.load_state_dict(values)
