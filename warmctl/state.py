"""What is saved with a run beside tensors: floats only, by walking the fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass
class FloatState:
    """Base of dataclasses that hold nothing but floats."""

    def state_values(self) -> list[float]:
        return [float(value) for value in asdict(self).values()]

    def load_state_values(self, values: list[float]) -> None:
        for field, value in zip(fields(self), values, strict=True):
            setattr(self, field.name, value)
