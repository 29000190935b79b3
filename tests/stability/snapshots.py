"""The end slope by its definition: from a copy of the parameters at every step, in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

BETA = 0.97


class Snapshots:
    """Told of each step before it is made: M ← β(M + Δ) from the differences of all parameters since the last one."""

    def __init__(self) -> None:
        self.before: Tensor | None = None
        self.movement = torch.zeros(())

    def begin_anew(self) -> None:
        self.__init__()  # type: ignore[misc]

    def end_slope(self, params: Iterable[Tensor]) -> float:
        held = list(params)
        now = torch.cat([p.detach().double().flatten() for p in held])
        if self.before is not None:
            self.movement = BETA * (self.movement + now - self.before)
        self.before = now
        gradient = torch.cat([_gradient(p) for p in held])
        size = float(gradient.norm() * self.movement.norm())
        return -float(gradient @ self.movement) / size if size > 0.0 and math.isfinite(size) else math.nan


def _gradient(param: Tensor) -> Tensor:
    return (torch.zeros_like(param) if param.grad is None else param.grad).double().flatten()
