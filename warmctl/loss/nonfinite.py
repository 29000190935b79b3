"""Steps whose loss or gradient is not finite: made as the bare optimizer makes them, or left out as by `GradScaler`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from warmctl import distributed
from warmctl.loss.replay import Closure
from warmctl.vectors import local, squares, strided
from warmctl.warning import warn

SKIPPED = "step skipped: the loss or its gradient is not finite"
APPLIED = (
    "warmctl: the loss or its gradient is not finite, and the step is made as the bare optimizer makes it. "
    "AdaptiveWarmup(..., skip_nonfinite=True) leaves such steps out"
)
LEFT_OUT = "warmctl: the loss or its gradient is not finite: the step was left out, as any other such step will be"


class NonfiniteSteps:
    """Args: skip: leave them out.

    Attributes:
        skipping: whether the present step is one.
    """

    def __init__(self, skip: bool) -> None:
        self.skip, self.skipping = skip, False
        self._said = False

    def to_skip(self, loss: Tensor | None, params: list[Tensor]) -> bool:
        """Whether the coming step, whose gradient is there, is to be skipped: the same on every rank.

        Cost: a pass over the gradient; waits for the device, and for the other ranks. Nothing if none is skipped.
        """
        if self.skip:
            square = squares([strided(local(p.grad.detach())) for p in params if p.grad is not None]).sum()
            finite = math.isfinite(float(square)) and (loss is None or bool(loss.isfinite().all()))
            self.skipping = not distributed.everywhere(finite, square.device)
            if self.skipping:
                self._say(LEFT_OUT)
        return self.skipping

    def make(self, finite: bool) -> None:
        """The step is made, finite or not."""
        if not finite:
            self._say(APPLIED)

    def step(self, step: Callable[..., Any], evaluate: Closure | None = None) -> Any:
        """`step(evaluate)`, or nothing but the evaluation where the step is to be skipped.

        Args:
            step: of the wrapped optimizer. evaluate: its closure, at whose first call `to_skip` is called; None if that
                was done.
        """
        try:
            if evaluate is None:
                return None if self.skipping else step()
            if not self.skip:
                return step(evaluate)
            loss = evaluate()
            return loss if self.skipping else step(_called_before(evaluate, loss))
        finally:
            self.skipping = False

    def _say(self, message: str) -> None:
        if not self._said:
            self._said = True
            warn(message)


def _called_before(evaluate: Closure, loss: Any) -> Closure:
    """The same closure, whose next call has been made, with this result."""
    results = [loss]

    def next_evaluation() -> Any:
        return results.pop() if results else evaluate()

    return next_evaluation
