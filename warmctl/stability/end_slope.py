"""The slope at the end of a step: whether the next batch would have had the parameters go on moving as they did.

e = −gᵀM / (‖g‖ ‖M‖), with g the gradient of a new batch and M the recent movement of the parameters,
M ← β(M + Δ) after each step Δ. The batch has had no say in the movement, so on average e has the sign of the true
slope: above 0 the loss still falls that way, below 0 the steps went past where it is lowest.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from warmctl.distributed import inner_product, sum_over_shards
from warmctl.vectors import Vector, dense_gradient, local, products, squares

MEMORY = 0.97
"""β: a movement averaged over some thirty steps, one meter for rules with and without momentum. Bouncing across a
valley cancels in it."""


class EndSlope:
    """Keeps one vector, the running average of the parameters m ← m + (1 − β)(θ − m), once a step.

    θ − m before that update is M/β exactly, in whatever way the optimizer moves.
    """

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._average: list[Tensor | None] = []
        self.followed = 0
        """Parameters whose average is kept."""

    @property
    def has_vector(self) -> bool:
        """Whether there is an average."""
        return self.followed > 0

    def forget(self) -> None:
        """Free the vector; the next reading begins anew."""
        self._params, self._average, self.followed = [], [], 0

    @torch.no_grad()
    def products(self, params: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        """−gᵀM and MᵀM, in units of their own, over shards as by `sum_over_shards`. Call it once a step.

        None before the first movement, and where the parameters are not those of the last step.
        """
        parts = [local(p) for p in params]
        average = self._of_last_step(params, parts)
        if average is None:
            self._params, self._average = list(params), [_wide(t) for t in parts]
            self.followed = len(params)
            return None
        moved = [(p, a, dense_gradient(p)) for p, a in zip(params, average, strict=True) if p.grad is not None]
        torch._foreach_sub_(average, parts)  # −M/β, in place: half the time of a temporary vector
        slopes = products([g for _, _, g in moved], [back for _, back, _ in moved])
        slope = sum_over_shards([p for p, _, _ in moved], slopes)
        length = sum_over_shards(params, squares(average))
        for back, now in zip(average, parts, strict=True):
            torch.add(now, back, alpha=MEMORY, out=back)
        return slope, length

    def _of_last_step(self, params: list[Tensor], parts: Vector) -> Vector | None:
        """The average, if it is one of these very parameters; one that was not saved has never moved."""
        if len(params) != self.followed or not all(map(operator.is_, params, self._params)):
            return None
        average = [_wide(t) if a is None else a for a, t in zip(self._average, parts, strict=True)]
        if any(a.shape != t.shape or a.device != t.device for a, t in zip(average, parts, strict=True)):
            return None
        self._average = list(average)
        return average

    def vector_of(self, params: list[Tensor]) -> dict[Tensor, Tensor]:
        """The average, this process's part of it, by parameter; zeros where there is none."""
        known = dict(zip(self._params, self._average, strict=True))
        kept = [(p, known.get(p), local(p.detach())) for p in params]
        return {p: torch.zeros_like(t, dtype=_at_least_float32(t)) if a is None else a for p, a, t in kept}

    def load_vector(self, parts: Sequence[Tensor | None], params: list[Tensor]) -> None:
        """Continue from a saved average, if as many parameters were followed then.

        Raises: ValueError for one that is not finite. Nothing is changed then.
        """
        saved = [*parts, *[None] * (len(params) - len(parts))]
        average = [
            None if a is None else local(a).to(local(p).device, _at_least_float32(p), copy=True)
            for a, p in zip(saved, params, strict=True)
        ]
        whole = [torch.zeros_like(local(p)) if a is None else a for a, p in zip(average, params, strict=True)]
        if not math.isfinite(inner_product(params)(whole, whole)):
            raise ValueError("warmctl_average is not finite in the checkpoint")
        if self.followed != len(params):
            return self.forget()
        self._params, self._average = list(params), average
        return None


def _wide(tensor: Tensor) -> Tensor:
    """A copy that an average can be kept in."""
    return tensor.to(_at_least_float32(tensor), copy=True)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
