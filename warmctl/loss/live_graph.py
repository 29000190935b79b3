"""The live graph of `backward(loss)`: for a loss that cannot be evaluated again, measured before it is freed."""

from __future__ import annotations

from torch import Tensor

from warmctl import distributed
from warmctl.loss.scaler import loss_scale, weight_of
from warmctl.state import FLAG, LARGEST_COUNT, Allowed, check


class LiveGraph:
    """Counts the backward passes of a step: a probe is made in the last of them, or in that of the next step.

    Attributes:
        wanted: a probe was asked for.
        weights: of the backward passes of this step, up to a common factor.
        passes_before: how many there were in the last step.
        loss: the sum of these passes' so far, detached, without the factor of a gradient scaler.
    """

    def __init__(self) -> None:
        self.wanted, self.passes_before = True, 1
        self.weights: list[float] = []
        self.loss: Tensor | None = None

    def begin_pass(self, loss: Tensor, cleared: bool) -> None:
        if self.passes and cleared:
            self.weights, self.loss = [], None  # the step of those passes was skipped
        value = loss.detach() / loss_scale(loss)
        self.weights.append(weight_of(loss))
        self.loss = value if self.loss is None else self.loss + value.to(self.loss)

    @property
    def passes(self) -> int:
        """Backward passes of this step."""
        return len(self.weights)

    @property
    def last_pass(self) -> bool:
        """Whether this pass is the one to measure in: the last, as far as the last step tells.

        On several ranks it is the first, which every rank comes to: one may have fewer than before.
        """
        return self.passes == (1 if distributed.world_size() > 1 else self.passes_before)

    def next_step(self, measured: bool) -> None:
        if measured:
            self.wanted = False
        self.passes_before, self.weights, self.loss = max(self.passes, 1), [], None

    def state_values(self) -> list[float]:
        return [float(self.wanted), float(self.passes_before)]

    def check_state_values(self, values: list[float]) -> None:
        check(values, {"wanted": FLAG, "passes_before": Allowed(1.0, LARGEST_COUNT, whole=True)})

    def load_state_values(self, values: list[float]) -> None:
        self.wanted, self.passes_before = bool(values[0]), int(values[1])
