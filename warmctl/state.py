"""What is saved with a run beside tensors: floats only, by walking the fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Protocol


class Saved(Protocol):
    """A part of the wrapper that is saved: floats only, always the same number of them."""

    def state_values(self) -> list[float]: ...

    def load_state_values(self, values: list[float]) -> None: ...


@dataclass
class FloatState:
    """Base of dataclasses that hold nothing but floats."""

    def state_values(self) -> list[float]:
        return [float(value) for value in asdict(self).values()]

    def load_state_values(self, values: list[float]) -> None:
        for field, value in zip(fields(self), values, strict=True):
            setattr(self, field.name, value)


@dataclass
class Counts(FloatState):
    """Steps and probes made, and what they cost in gradient evaluations."""

    steps: float = 0.0
    gradients: float = 0.0
    probes: float = 0.0
    hvps: float = 0.0
    cost: float = 0.0

    @property
    def overhead(self) -> float:
        """Gradient evaluations spent on probes over those of training."""
        return self.cost / max(self.gradients, 1.0)
