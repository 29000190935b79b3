"""All followers of one wrapper: told of each step, dropped where they fail, saved with the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from warmctl.follow.follower import Follower, Levers
from warmctl.state import FLAG, POSITIVE, check
from warmctl.warning import first_line, warn

Value = float | int | str


class Followers:
    """Tells each follower of every step. One that raises is dropped, with a word, and training goes on.

    Args:
        optimizer: the wrapped one.
        control: False calls only those that move nothing.

    Attributes:
        row: the readings of the last step, columns of the history.
        latest: of each reading the latest.
    """

    def __init__(self, optimizer: Optimizer, control: bool) -> None:
        self.levers, self.control = Levers(optimizer), control
        self.row: dict[str, Value] = {}
        self.latest: dict[str, Value] = {}
        self._all: list[Follower] = []
        self._dropped: dict[int, int] = {}  # and the size of its state

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, followers: Sequence[Any], scale: float) -> None:
        """Followers from the coming step on.

        Args:
            scale: at which it would be made.

        Raises: TypeError for what cannot follow, ValueError for one that follows already; whatever `attach` raises.
        """
        for follower in followers:
            if isinstance(follower, type) or not callable(getattr(follower, "follow", None)):
                given = follower.__name__ if isinstance(follower, type) else type(follower).__name__
                raise TypeError(
                    f"follow() takes followers, objects with a method follow(scale, rate, phase), got {given}"
                    + ("; give an instance of it" if isinstance(follower, type) else "")
                )
            if any(follower is other for other in self._all):
                raise ValueError(f"this {type(follower).__name__} follows already")
            self.levers.scale = scale
            if self._called(follower) and hasattr(follower, "attach"):
                follower.attach(self.levers)
            self._all.append(follower)

    def applied(self, scale: float) -> float:
        """What the rate that is shown was multiplied by at the last step, given the scale that was decided."""
        return self.levers.shown_factor * (scale if self.control else 1.0)

    def ratio(self, decided: float, scale: float) -> float:
        """The stability ratio of the coming update, of what it is at the scale that was decided.

        Where followers slow the groups unequally, that of the slowest.
        """
        return min(self.levers.factors) * (decided if self.control else decided / scale)

    def decided(self, scale: float, phase: str, probed: bool) -> list[float]:
        """The scale of the coming update is decided, its gradient is there: each moves what it moves.

        Args:
            scale: as decided; without control the update is made at 1 all the same.

        Returns: what the scheduled rate of each group is to be multiplied by.
        """
        self.levers.begin(scale if self.control else 1.0, probed)
        self.row = {}
        for place in sorted(range(len(self._all)), key=lambda i: not getattr(self._all[i], "moves_rate", False)):
            if self._called(self._all[place]) and place not in self._dropped:
                self._tell(place, phase)
        self.latest.update(self.row)
        return self.levers.scales

    def unlent(self, saved: dict[str, Any]) -> dict[str, Any]:
        """`saved`, a state dict, without what is lent for the step: a hook of it may save."""
        return self.levers.unlent(saved)

    def end(self) -> None:
        """The update has been made: what was lent for it is put back."""
        self.levers.put_back()

    def _called(self, follower: Any) -> bool:
        return self.control or not getattr(follower, "moves", True)

    def _tell(self, place: int, phase: str) -> None:
        follower: Any = self._all[place]
        try:
            follower.follow(self.levers.scale, self.levers.rate, phase)
            if hasattr(follower, "readings"):
                self.row.update(follower.readings())
        except Exception as error:
            self._dropped[place] = _size(follower)
            warn(
                f"warmctl: {type(follower).__name__} raised {first_line(error)}. It no longer follows, training goes on"
            )
            with suppress(Exception):
                getattr(follower, "detach", _nothing)()

    def state_values(self) -> list[float]:
        """The factor of the rate that is shown; of each follower whether it was dropped, and its own numbers."""
        values = [self.levers.shown_factor] if self._all else []
        for place, follower in enumerate(self._all):
            dropped = place in self._dropped
            values += [float(dropped), *([0.0] * self._dropped[place] if dropped else _flat(follower))]
        return values

    def check_state_values(self, values: list[float]) -> None:
        """A follower checks its own when they are loaded, and is rolled back."""
        check(values[:1], {"factor of the first rate": POSITIVE} if self._all else {})
        for place, dropped, _ in self._split(values):
            check([dropped], {f"dropped of {type(self._all[place]).__name__}": FLAG})

    def load_state_values(self, values: list[float]) -> None:
        parts = list(self._split(values))
        self._dropped.clear()
        for place, dropped, own in parts:
            if dropped:
                self._dropped[place] = len(own)
            elif own:
                _load(self._all[place], own)
        if self._all:
            self.levers.load_factor(values[0])  # of the group that is the first to train now

    def _split(self, values: list[float]) -> Iterator[tuple[int, float, list[float]]]:
        start = 1
        for place, follower in enumerate(self._all):
            size = self._dropped[place] if place in self._dropped else len(_flat(follower))
            yield place, values[start], values[start + 1 : start + 1 + size]
            start += 1 + size


def _nothing() -> None:
    pass


def _state(follower: Any) -> dict[str, Any]:
    state_dict: Callable[[], dict[str, Any]] = getattr(follower, "state_dict", dict)
    return dict(state_dict())


def _flat(follower: Any) -> list[float]:
    values: list[float] = []
    for value in _state(follower).values():
        values += value.double().tolist() if isinstance(value, Tensor) else [float(value)]
    return values


def _size(follower: Any) -> int:
    try:
        return len(_flat(follower))
    except Exception:  # it is the one that has just failed
        return 0


def _load(follower: Any, values: list[float]) -> None:
    """In the layout of its present state."""
    state, start = _state(follower), 0
    for name, value in state.items():
        size = value.numel() if isinstance(value, Tensor) else 1
        part = values[start : start + size]
        if isinstance(value, Tensor):
            state[name] = torch.tensor(part, dtype=value.dtype, device=value.device)
        else:
            state[name] = part[0]
        start += size
    follower.load_state_dict(state)
