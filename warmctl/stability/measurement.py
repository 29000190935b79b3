"""What one probe found: a stability ratio at the full scheduled rate, its residual and price, or why it failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from warmctl import distributed
from warmctl.state import ANYTHING, COUNT, FLAG, POSITIVE, SHARE, Allowed, check


@dataclass(frozen=True)
class Measurement:
    """What one probe found. Ratios are dimensionless, at the full scheduled rate, with the edge of stability at 1.

    Attributes:
        ratio: r₁ = λ_max(D^½ H D^½), a lower bound of it by Lanczos; nan if the probe failed.
        residual: of the Ritz pair, relative to the ratio.
        sharpness: ratio in units of curvature, λ = r₁ τ / η of the first group with a rate.
        threshold: τ of that group.
        hvps: products; cost: gradient evaluations, all included.
        reason: why it failed, or "".
        share: the edge of this very step over its long-run value: below 1 while Adam's bias correction makes the
            first steps bolder than momentum alone would, above it where a rule bounds the step by itself.
        relative_update: ‖update‖ / ‖weights‖ of the preconditioned gradient at the full rate, median over matrices.
        noisy: the share rests on the quotient along one gradient.
    """

    ratio: float
    residual: float
    sharpness: float
    threshold: float
    hvps: int
    cost: float
    reason: str = ""
    share: float = 1.0
    relative_update: float = 0.0
    noisy: bool = False

    @staticmethod
    def values(found: Measurement | None) -> list[float]:
        """As plain numbers, for a checkpoint; the words are not kept."""
        numbers = [0.0] * len(_NUMBERS) if found is None else [float(getattr(found, name)) for name in _NUMBERS]
        return [float(found is not None), *numbers]

    @staticmethod
    def from_values(values: Sequence[float]) -> Measurement | None:
        """The inverse of `values`."""
        there, *numbers = values
        found = failed("it failed before the run was resumed")._with(numbers)
        return None if not there else replace(found, reason="") if math.isfinite(found.ratio) else found

    @staticmethod
    def check_values(values: Sequence[float], prefix: str) -> None:
        """Raise ValueError unless `values` may have given these; the fields are named with `prefix`."""
        there, *numbers = values
        allowed = dict.fromkeys(_NUMBERS, Allowed(among=(0.0,)))
        if there:
            allowed = dict.fromkeys(_NUMBERS, ANYTHING) | {"hvps": COUNT, "cost": POSITIVE, "noisy": FLAG}
        if there and math.isfinite(numbers[0]):
            allowed |= {"share": SHARE, "relative_update": Allowed(0.0, math.inf)}
        check(values, {f"{prefix}there": FLAG} | {prefix + name: wanted for name, wanted in allowed.items()})

    def _with(self, numbers: Sequence[float]) -> Measurement:
        named: dict[str, Any] = dict(zip(_NUMBERS, numbers, strict=True))
        return replace(self, **{**named, "hvps": int(named["hvps"]), "noisy": bool(named["noisy"])})

    def times(self, weight: float) -> Measurement:
        """Of a loss `weight` times as large."""
        return replace(self, ratio=self.ratio * weight, sharpness=self.sharpness * weight)

    def agreed(self, device: torch.device) -> Measurement:
        """The same on every rank: the mean over ranks. A failure on one rank is a failure on all."""
        if distributed.world_size() == 1:
            return self
        agreed = distributed.agree([float(getattr(self, name)) for name in _NUMBERS], device)
        found = self._with(agreed)
        return (
            found if math.isfinite(found.ratio) else replace(found, reason=self.reason or "it failed on another rank")
        )


_NUMBERS = [field.name for field in fields(Measurement) if field.name != "reason"]


def failed(reason: str, cost: float = 0.0) -> Measurement:
    """A probe that came to nothing."""
    return Measurement(math.nan, math.nan, math.nan, math.nan, 0, cost, reason)
