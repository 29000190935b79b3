"""How noisy the gradient is at the present batch size, from the gradients of two successive batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from warmctl import distributed
from warmctl.follow.sampling import Sample
from warmctl.vectors import local

ENTRIES = 4096
KEPT = 0.9
"""Of the averages, a step."""


class NoiseScale:
    """B_noise/B = tr Σ / (B ‖G‖²): the variance of a batch's gradient over the square of the true one.

    Of two batches at nearly the same weights E[g₁·g₂] = ‖G‖² and E[g·g] = ‖G‖² + tr Σ/B. Both are averaged over some
    ten steps before they are divided (McCandlish et al. 2018, arXiv 1812.06162, whose pair is a small and a large
    batch). Below 1 the batch is larger than the noise scale: steps are quiet. A gradient that turns about, as beyond
    the edge of stability, makes g₁·g₂ negative and counts as infinitely noisy.

    Read on a fixed sample of 4096 entries over all parameters. Cost: two inner products of it; memory: one sample.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self._sample = Sample(self.params, ENTRIES)
        self._before = torch.full((self._sample.size,), math.nan)
        self._along, self._square = math.nan, math.nan

    @property
    def ratio(self) -> float:
        """B_noise/B; nan before two gradients, inf without a common direction."""
        if math.isnan(self._along):
            return math.nan
        return max(self._square / self._along - 1.0, 0.0) if self._along > 0.0 else math.inf

    def see(self) -> None:
        """Take in the gradients that are there. One small collective, where there are several ranks."""
        now = self._sample.take([p.grad for p in self.params])
        along, square = float(torch.dot(now, self._before.to(now))), float(torch.dot(now, now))
        if distributed.world_size() > 1:
            along, square = distributed.agree([along, square], local(self.params[0]).device)
        self._before = now
        if not math.isfinite(along):
            return
        first = math.isnan(self._along)
        self._along = along if first else KEPT * self._along + (1.0 - KEPT) * along
        self._square = square if first else KEPT * self._square + (1.0 - KEPT) * square

    def state_dict(self) -> dict[str, Any]:
        return {"along": self._along, "square": self._square, "gradient": self._before}

    def load_state_dict(self, values: dict[str, Any]) -> None:
        self._along, self._square, self._before = values["along"], values["square"], values["gradient"]
