"""The gradient as the backward pass leaves it, before clipping and unscaling: its length, its largest entry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from warmctl import distributed
from warmctl.follow.sampling import Sample
from warmctl.loss.no_trace import measuring
from warmctl.vectors import gathered, local, squares, strided

LARGEST, SMALLEST = 65504.0, 2.0**-24
"""The largest float16, and the smallest above 0."""
SHORTER = 1e-3
ENTRIES = 4096


class BackwardPass:
    """Readings of the last backward pass after `watch`, taken when the pass has ended.

    The pass announces itself by the hook of one parameter, the smallest.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = list(params)
        self._sample: Sample | None = None
        self._handle: Any = None
        self._left: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def watching(self) -> bool:
        return self._handle is not None

    def watch(self) -> None:
        self.stop()
        announcing = min((p for p in self.params if p.requires_grad and p.numel()), key=Tensor.numel, default=None)
        if announcing is not None:
            self._handle = announcing.register_post_accumulate_grad_hook(self._begun)  # type: ignore[no-untyped-call]

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._left = None

    def take(self) -> dict[str, float]:
        """The readings, held against the gradient as it is now; the watch ends."""
        left = self._left
        self.stop()
        if left is None:
            return {}
        before, now = math.sqrt(float(left[0])), math.sqrt(float(squares(self._gradients()).sum()))
        largest = float(left[1])
        return {
            "vitals/clipped": math.nan if distributed.world_size() > 1 else float(_shortened(before, now)),
            "vitals/float16_headroom": LARGEST / largest if largest > 0.0 else math.inf,
            "vitals/float16_underflow": float(left[2]),
        }

    def _begun(self, param: Tensor) -> None:
        if not measuring([param]):
            torch.autograd.Variable._execution_engine.queue_callback(self._ended)

    @torch.no_grad()
    def _ended(self) -> None:
        if not self.watching:
            return
        gradients = self._gradients()
        if not gradients:
            return
        largest = gathered(torch._foreach_norm([g for g in gradients if g.numel()], math.inf)).amax()
        self._sample = self._sample or Sample(self.params, ENTRIES)
        entries = self._sample.take([p.grad for p in self.params]).abs()
        small = (entries < SMALLEST) & (entries > 0)
        self._left = squares(gradients).sum(), largest, small.sum() / (entries > 0).sum().clamp(min=1)

    def _gradients(self) -> list[Tensor]:
        return [strided(local(p.grad)) for p in self.params if p.grad is not None]


def _shortened(before: float, now: float) -> bool:
    """Whether `now` is shorter than `before`, but for a power of two, by which gradient scalers multiply."""
    if not (before > 0.0 and now > 0.0 and math.isfinite(before / now)):
        return False
    power = math.log2(now / before)
    return power < 0.0 and abs(power - round(power)) > SHORTER
