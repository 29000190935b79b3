"""A way back for a run that has died: to where it was before, at a lower rate."""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from warmctl import AdaptiveWarmup
from warmctl.control.controller import FLOOR
from warmctl.control.gauges import NEWEST
from warmctl.warning import warn

START, DEAD = 5, 20
"""First losses, above whose largest a run has made nothing of what it learned; and steps above it after which it is
dead."""
LOWER = 0.25
"""Scale after the return over the one that it returns to."""
RETURNED = (
    "warmctl: {why}. Parameters and optimizer are put back to step {step}, at {scale:.3g} of the schedule, and warmup "
    "ends there. This is done once"
)


class Snapshot(NamedTuple):
    """A step as it was before its update: parameters and buffers, the optimizer's state and the law's."""

    step: int
    tensors: list[Tensor]
    state: dict[Any, dict[str, Any]]
    law: list[list[float]]


class Returns(AdaptiveWarmup):
    """Where the smoothed loss is lowest in warmup, a snapshot. A dead run goes back there, to a quarter of its scale.

    Dead: a loss that is not finite, or a smoothed one above that of the start for 20 steps. Warmup is over then, and
    guard comes back no higher, for the law would climb to the same place again. A cut alone cannot save such a run: it
    lowers the rate, but the weights stay where the last step has thrown them. Once only, said with a warning; the step
    whose loss was not finite is made again. Memory: another copy of model and optimizer.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, **options: Any) -> None:
        super().__init__(optimizer, model, **options)
        self.snapshot: Snapshot | None = None
        self.smoothed, self.lowest, self.start = math.nan, math.inf, -math.inf
        self.heard = self.above = 0
        self.lost = self.returned = False

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        if self.snapshot is None or self.returned or not (self.lost or self.above >= DEAD):
            return result
        again = self.lost
        self._go_back(self.snapshot)
        if not again:
            return result
        self.counts.cost += 1.0
        return super().step(closure)

    def _decide(self, loss: Tensor | None) -> None:
        super()._decide(loss)
        value = math.nan if loss is None else float(loss)
        self.lost = not math.isfinite(value)
        if self.lost or self.returned:
            return
        self.heard += 1
        self.smoothed = value if self.heard == 1 else self.smoothed + NEWEST * (value - self.smoothed)
        self.start = max(self.start, value) if self.heard <= START else self.start
        self.above = self.above + 1 if self.smoothed > self.start else 0
        if self.phase == "warmup" and self.smoothed < self.lowest:
            self.lowest, self.snapshot = self.smoothed, self._take()

    @property
    def _tensors(self) -> list[Tensor]:
        return [*self.all_params, *self.model.buffers()]

    def _take(self) -> Snapshot:
        law = [part.state_values() for part in self.controller.parts]
        state = {p: _copied(values) for p, values in self.base.state.items()}
        return Snapshot(int(self.counts.steps), [t.clone() for t in self._tensors], state, law)

    @torch.no_grad()
    def _go_back(self, snapshot: Snapshot) -> None:
        why = "the loss is not finite" if self.lost else f"the loss is above its start for {DEAD} steps"
        for tensor, before in zip(self._tensors, snapshot.tensors, strict=True):
            tensor.copy_(before)
        self.base.state.clear()
        self.base.state.update(snapshot.state)
        for part, values in zip(self.controller.parts, snapshot.law, strict=True):
            part.load_state_values(values)
        law = self.controller.state
        law.scale = law.measured_scale = law.highest_scale = law.settled = max(LOWER * law.scale, FLOOR)
        law.phase = 1.0
        self._signals.rest()
        warn(RETURNED.format(why=why, step=snapshot.step, scale=law.scale))
        self.returned, self.lost, self.snapshot = True, False, None


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: v.clone() if isinstance(v, Tensor) else copy.deepcopy(v) for name, v in state.items()}
