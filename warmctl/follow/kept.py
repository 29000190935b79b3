"""Values that stay where a follower put them, and the user's own beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a value stands: an entry of a parameter group, an attribute of another object."""

    holder: Any
    name: str

    @property
    def value(self) -> Any:
        return self.holder[self.name] if isinstance(self.holder, dict) else getattr(self.holder, self.name)

    def put(self, value: Any) -> None:
        if isinstance(self.holder, dict):
            self.holder[self.name] = value
        else:
            setattr(self.holder, self.name, value)


class Kept:
    """One value in each of several places, moved as a function of the user's own.

    A value that is not as it was last put there is the user's new own.

    Args:
        name: in the state.
        places: how many.
    """

    def __init__(self, name: str, places: int) -> None:
        self.name = name
        self._own: list[Any] = [math.nan] * places
        self._put: list[Any] = [math.nan] * places

    def move(self, places: Sequence[Place], moved: Callable[[Any], Any]) -> None:
        for i, place in enumerate(places):
            if place.value != self._put[i]:
                self._own[i] = place.value
            self._put[i] = moved(self._own[i])
            place.put(self._put[i])

    def put_back(self, places: Sequence[Place]) -> None:
        """The user's own."""
        for i, place in enumerate(places):
            if place.value == self._put[i]:
                place.put(self._own[i])

    def state_dict(self) -> dict[str, float]:
        own = {f"{self.name}_{i}": float(value) for i, value in enumerate(self._own)}
        return own | {f"{self.name}_put_{i}": float(value) for i, value in enumerate(self._put)}

    def load_state_dict(self, values: dict[str, float], places: Sequence[Place]) -> None:
        """Continue, with every value where it was put. Raises ValueError for a negative one."""
        own, put = ([values[f"{name}_{i}"] for i in range(len(places))] for name in (self.name, f"{self.name}_put"))
        for value in (*own, *put):
            if value < 0.0 or value == math.inf:
                raise ValueError(f"{self.name} is {value!r} in the state, it must be a number of at least 0")
        self._own, self._put = own, put
        for place, value in zip(places, put, strict=True):
            if not math.isnan(value):
                place.put(value)


def whole(name: str, value: float) -> int:
    """A count from a saved state. Raises ValueError if it is none."""
    if not (value >= 0.0 and math.isfinite(value) and float(value).is_integer()):
        raise ValueError(f"{name} is {value!r} in the state, it must be a whole number of at least 0")
    return int(value)
