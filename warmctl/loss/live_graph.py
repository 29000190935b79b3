"""What a probe on the live graph of `backward(loss)` remembers from step to step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from warmctl.stability.measurement import Measurement


@dataclass
class GraphProbe:
    """A probe on the live graph of `backward(loss)`: asked for at one step, made in the last backward of the next.

    Attributes:
        wanted: asked for; found: what it found at this step.
        passes, passes_before: backward passes of this step and of the last.
        loss: of the last pass, detached, without the factor of a gradient scaler.
    """

    wanted: bool = True
    found: Measurement | None = None
    passes: int = 0
    passes_before: int = 1
    loss: Tensor | None = None

    def next_step(self) -> None:
        if self.found is not None:
            self.wanted, self.found = False, None
        self.passes_before, self.passes, self.loss = max(self.passes, 1), 0, None

    def state_values(self) -> list[float]:
        return [float(self.wanted), float(self.passes_before)]

    def load_state_values(self, values: list[float]) -> None:
        self.wanted, self.passes_before = bool(values[0]), int(values[1])
