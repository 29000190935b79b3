"""What is saved with a run beside tensors: floats only, by walking the fields, and what each of them may be."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Protocol

LARGEST = sys.float_info.max
LARGEST_COUNT = 2.0**53


@dataclass(frozen=True)
class Allowed:
    """What a saved number may be.

    Args:
        low, high: both included; infinity only where one of them is infinite.
        unknown: it may be nan.
        among: nothing but these.
    """

    low: float = -LARGEST
    high: float = LARGEST
    whole: bool = False
    unknown: bool = False
    among: tuple[float, ...] = ()

    def holds(self, value: float) -> bool:
        if self.among:
            return value in self.among
        if math.isnan(value):
            return self.unknown
        return self.low <= value <= self.high and (not self.whole or value.is_integer())

    def __str__(self) -> str:
        if self.among:
            return " or ".join(f"{value:g}" for value in self.among)
        words = f"{'a whole number' if self.whole else 'a number'} in [{self.low:g}, {self.high:g}]"
        return words + (" or nan" if self.unknown else "")


FLAG = Allowed(among=(0.0, 1.0))
COUNT = Allowed(0.0, LARGEST_COUNT, whole=True)
POSITIVE = Allowed(0.0)
SHARE = Allowed(1e-9)
ANYTHING = Allowed(-math.inf, math.inf, unknown=True)


def check(values: Sequence[float], allowed: Mapping[str, Allowed]) -> None:
    """Raise ValueError, with the name of the field, unless these are values of those fields."""
    for (name, wanted), value in zip(allowed.items(), values, strict=True):
        if not wanted.holds(value):
            raise ValueError(f"{name} is {value:g}, it must be {wanted}")


class Saved(Protocol):
    """A part of the wrapper that is saved: floats only, always the same number of them."""

    def state_values(self) -> list[float]: ...

    def check_state_values(self, values: list[float]) -> None:
        """Raise ValueError, with the name of the field, for values that cannot be its own. Changes nothing."""
        ...

    def load_state_values(self, values: list[float]) -> None: ...


def saved(default: float, allowed: Allowed) -> float:
    """A field of a `FloatState` and what it may be."""
    value: float = field(default=default, metadata={"allowed": allowed})
    return value


@dataclass
class FloatState:
    """Base of dataclasses that hold nothing but floats, each made by `saved`."""

    def state_values(self) -> list[float]:
        return [float(value) for value in asdict(self).values()]

    def check_state_values(self, values: list[float]) -> None:
        check(values, {entry.name: entry.metadata["allowed"] for entry in fields(self)})

    def load_state_values(self, values: list[float]) -> None:
        for entry, value in zip(fields(self), values, strict=True):
            setattr(self, entry.name, value)


@dataclass
class Counts(FloatState):
    """Steps and probes made, what they cost in gradient evaluations, and how many parameters trained at the last."""

    steps: float = saved(0.0, COUNT)
    gradients: float = saved(0.0, COUNT)
    probes: float = saved(0.0, COUNT)
    hvps: float = saved(0.0, COUNT)
    cost: float = saved(0.0, POSITIVE)
    trained: float = saved(0.0, COUNT)

    @property
    def overhead(self) -> float:
        """Gradient evaluations spent on probes over those of training."""
        return self.cost / max(self.gradients, 1.0)
