"""What a step says for free: its loss, the norm of its gradient, and its slope along the last movement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from warmctl import distributed
from warmctl.stability.end_slope import EndSlope
from warmctl.state import ANYTHING, COUNT, FLAG, LARGEST_COUNT, Allowed, check
from warmctl.vectors import local, square_norm, squares, strided

UNKNOWN = (*(math.nan,) * 4, 1.0, 1.0)


class Signals(NamedTuple):
    """Of one step, the same on every rank; nan where unknown.

    Attributes:
        norm: of the gradient, over all its shards.
        end_slope: see `EndSlope`.
        finite: whether loss and norm are, as far as they are known.
        evaluations: of the gradient that went into it, on average over the ranks.
    """

    loss: float
    norm: float
    end_slope: float
    finite: bool
    evaluations: float


class StepSignals:
    """Reads the signals of each step.

    On an accelerator they are those of the step before: reading this step's would make the device wait.

    Attributes:
        slope: keeps the vector that the end slope needs.
        end_slope: as last read.
    """

    def __init__(self) -> None:
        self.slope, self.end_slope = EndSlope(), math.nan
        self._arrived: Any = None
        self._wait_for(UNKNOWN)

    def rest(self) -> None:
        """No end slope is wanted any more: free its vector. The next that is wanted begins anew."""
        self.slope.forget()
        self.end_slope = math.nan

    def read(
        self, loss: Tensor | None, params: list[Tensor], end_slope: bool = True, evaluations: float = 1.0
    ) -> Signals:
        """The signals of the coming step, whose gradient is there. Call it once a step.

        Args:
            loss: None if unknown.
            end_slope: whether it is wanted at this step.
            evaluations: of the gradient, on this rank.
        """
        found = self._read(loss, params, self.slope.products(params) if end_slope else None, evaluations)
        self.end_slope = self.end_slope if math.isnan(found.end_slope) else found.end_slope
        if not found.finite:  # the vector may not be, and would never be again
            self.slope.forget()
        return found

    def _read(
        self, loss: Tensor | None, params: list[Tensor], slope: tuple[Tensor, Tensor] | None, evaluations: float
    ) -> Signals:
        counted = [evaluations, float(loss is not None)]
        held, gradients = _gradients(params)
        if loss_is_free(params):
            sums = (math.nan, math.nan) if slope is None else map(float, slope)
            known = math.nan if loss is None else float(loss)
            return _signals([known, square_norm(gradients), *sums, *counted])
        square = distributed.sum_over_shards(held, squares(gradients))
        unknown = torch.full_like(square, math.nan)
        value = unknown if loss is None else loss.to(square).reshape(())
        sent = [value, square, *(part.to(square) for part in slope or (unknown, unknown))]
        sent += [torch.full_like(square, number) for number in counted]
        average = distributed.average(torch.stack(sent))
        if average.device.type == "cpu":
            return _signals(average.tolist())
        first, before = self._nothing_sent, self.delayed
        self._send(average)
        return _signals(before)._replace(finite=True) if first else _signals(before)

    @property
    def delayed(self) -> list[float]:
        """What `read` has not returned yet. Waits until it has arrived, not for what was launched since."""
        if self._arrived is not None:
            self._arrived.synchronize()
        values: list[float] = self._sent.tolist()
        return values

    def _send(self, values: Tensor) -> None:
        """To the host, behind the device's work so far."""
        self._nothing_sent = False
        if values.device.type != "cuda":
            self._sent = values
            return
        self._sent = torch.empty_like(values, device="cpu", pin_memory=True)
        self._sent.copy_(values, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record(torch.cuda.current_stream(values.device))

    def _wait_for(self, values: Sequence[float], sent: bool = False) -> None:
        """Those that the next `read` returns on an accelerator."""
        self._sent = torch.tensor(values, dtype=torch.float64)
        self._nothing_sent = not sent
        self._arrived = None

    def state_values(self) -> list[float]:
        return [*self.delayed, self.end_slope, float(not self._nothing_sent), float(self.slope.followed)]

    def check_state_values(self, values: list[float]) -> None:
        square = Allowed(0.0, math.inf, unknown=True)
        awaited = {"loss": ANYTHING, "square": square, "along": ANYTHING, "length": square}
        awaited |= {"gradients": Allowed(1.0, LARGEST_COUNT), "known": Allowed(0.0, 1.0)}
        slope = Allowed(-1.0, 1.0, unknown=True)
        check(values, {**awaited, "end_slope": slope, "sent": FLAG, "followed": COUNT})

    def load_state_values(self, values: list[float]) -> None:
        *awaited, self.end_slope, sent, followed = values
        self._wait_for(awaited, sent=bool(sent))
        self.slope.followed = int(followed)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sent": torch.tensor(self.delayed, dtype=torch.float64), "_arrived": None}


def loss_is_free(params: Sequence[Tensor]) -> bool:
    """Whether the loss can be read without waiting, and without asking other ranks for theirs."""
    return params[0].device.type == "cpu" and distributed.world_size() == 1


def _gradients(params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that have a gradient, and this process's parts of these."""
    held = [(p, local(p.grad)) for p in params if p.grad is not None]
    return [p for p, _ in held], [strided(g) for _, g in held]


def _signals(values: Sequence[float]) -> Signals:
    """From the loss, gᵀg, −gᵀM and MᵀM, the evaluations, and the part of the ranks on which the loss is known.

    −gᵀM and MᵀM are of any scale; without a direction there is no slope.
    """
    loss, square, along, length, evaluations, known = values
    norm = math.sqrt(square) if square >= 0.0 else math.nan
    size = norm * math.sqrt(length) if length >= 0.0 else math.nan
    slope = along / size if size > 0.0 else math.nan
    slope = min(max(slope, -1.0), 1.0) if math.isfinite(slope) else math.nan
    return Signals(loss, norm, slope, math.isfinite(norm) and (known < 1.0 or math.isfinite(loss)), evaluations)
