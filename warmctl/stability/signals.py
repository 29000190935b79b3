"""What a step says for free: its loss and the norm of its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from warmctl import distributed
from warmctl.state import ANYTHING, FLAG, Allowed, check
from warmctl.vectors import gathered, local


class StepSignals:
    """Loss and gradient norm, the same on every rank; nan where unknown.

    On an accelerator they are those of the step before: reading this step's would make the device wait.
    """

    def __init__(self, loss: float = math.nan, norm: float = math.nan, sent: float = 0.0) -> None:
        self._sent = torch.tensor([loss, norm], dtype=torch.float64)
        self._nothing_sent = not sent
        self._arrived: Any = None

    def read(self, loss: Tensor | None, params: list[Tensor]) -> tuple[float, float, bool]:
        """Loss, gradient norm, and whether both are finite, as far as they are known."""
        grads = [local(grad) for p in params if (grad := p.grad) is not None]
        norms = torch._foreach_norm([g if g.layout == torch.strided else g.coalesce().values() for g in grads])
        square = gathered(norms).square().sum()
        if norms[0].device.type == "cpu" and distributed.world_size() == 1:
            return _judged(math.nan if loss is None else float(loss), math.sqrt(float(square)), loss is not None)
        value = torch.full_like(square, math.nan) if loss is None else loss.to(square)
        signals = distributed.average(torch.stack([value.reshape(()), square.sqrt()]))
        if signals.device.type == "cpu":
            return _judged(float(signals[0]), float(signals[1]), loss is not None)
        (before, norm), first = self.delayed, self._nothing_sent
        self._send(signals)
        return (before, norm, True) if first else _judged(before, norm, loss is not None)

    @property
    def delayed(self) -> tuple[float, float]:
        """Those that `read` has not returned yet. Waits until they have arrived, not for what was launched since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, norm = self._sent.tolist()
        return loss, norm

    def _send(self, signals: Tensor) -> None:
        """To the host, behind the device's work so far."""
        self._nothing_sent = False
        if signals.device.type != "cuda":
            self._sent = signals
            return
        self._sent = torch.empty_like(signals, device="cpu", pin_memory=True)
        self._sent.copy_(signals, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record(torch.cuda.current_stream(signals.device))

    def state_values(self) -> list[float]:
        return [*self.delayed, float(not self._nothing_sent)]

    def check_state_values(self, values: list[float]) -> None:
        check(values, {"loss": ANYTHING, "norm": Allowed(0.0, math.inf, unknown=True), "sent": FLAG})

    def load_state_values(self, values: list[float]) -> None:
        self.__dict__ = StepSignals(*values).__dict__

    def __reduce__(self) -> Any:
        return StepSignals, tuple(self.state_values())


def _judged(loss: float, norm: float, loss_known: bool) -> tuple[float, float, bool]:
    return loss, norm, math.isfinite(norm) and (not loss_known or math.isfinite(loss))
