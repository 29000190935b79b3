"""What a step says for free: its loss and the norm of its gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from warmctl import distributed
from warmctl.vectors import gathered, local


class StepSignals:
    """Loss and gradient norm, the same on every rank; nan where unknown.

    On an accelerator they are those of the step before: reading this step's would make the device wait.
    """

    def __init__(self, loss: float = math.nan, norm: float = math.nan) -> None:
        self.delayed = torch.tensor([loss, norm], dtype=torch.float64)

    def read(self, loss: Tensor | None, params: list[Tensor]) -> tuple[float, float]:
        grads = [local(grad) for p in params if (grad := p.grad) is not None]
        norms = torch._foreach_norm([g if g.layout == torch.strided else g.coalesce().values() for g in grads])
        square = gathered(norms).square().sum()
        if norms[0].device.type == "cpu" and distributed.world_size() == 1:
            return math.nan if loss is None else float(loss), math.sqrt(float(square))
        value = torch.full_like(square, math.nan) if loss is None else loss.to(square)
        signals = distributed.average(torch.stack([value.reshape(()), square.sqrt()]))
        if norms[0].device.type != "cpu":
            signals, self.delayed = self.delayed, signals
        found: list[float] = signals.tolist()
        return found[0], found[1]
