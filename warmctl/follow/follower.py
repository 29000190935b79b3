"""What a follower is, and what it may move in the optimizer's parameter groups."""

from __future__ import annotations

import math
from typing import Any, Protocol

from torch.optim import Optimizer

from warmctl.rates import learning_rate, shown


class Follower(Protocol):
    """Is told each step's scale, and moves something with it. One method is all that is asked for.

    >>> class Temperature:
    ...     def follow(self, scale, rate, phase):
    ...         self.value = 2.0 - scale
    >>> train(opt := AdaptiveWarmup(optimizer, model).follow(temperature := Temperature()))
    >>> temperature.value == 2.0 - opt.metrics["scale"]
    True

    Where a follower also has them, these are used:

    - `attach(levers)`: called once, by `opt.follow`; its `Levers` reach the parameter groups. Errors are the user's.
    - `detach()`: put back what is moved; called when the follower is dropped because it raised.
    - `state_dict()`, `load_state_dict(values)`: numbers, and tensors of one dimension, by name; always as many of them.
      They are saved with the optimizer.
    - `readings()`: numbers and words of this step by name, for `opt.metrics` and the history; may be empty.
    - `moves = False`: it only watches, and so also follows with `control=False`.
    - `moves_rate = True`: it multiplies rates, and goes before those that depend on them.
    """

    def follow(self, scale: float, rate: float, phase: str) -> None:
        """The coming update is decided, its gradient is there.

        Args:
            scale: what the scheduled rates are multiplied by.
            rate: as it will be applied, of the first group that trains.
            phase: "warmup", "guard" or "done".
        """
        ...


class Levers:
    """The optimizer's parameter groups, and values in them that hold for one step and are then put back.

    Attributes:
        optimizer: the one that makes the update.
        scale: of the coming step; before the first, of the start of warmup.
        probed: whether the step was probed.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.scale, self.probed = 1.0, False
        self._factors: dict[int, float] = {}
        self._lent: list[tuple[dict[str, Any], str, Any, Any]] = []

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The live ones."""
        return self.optimizer.param_groups

    @property
    def factors(self) -> list[float]:
        """What followers multiply the rate of each group by, beside the scale."""
        if not self._factors:
            return [1.0] * len(self.groups)
        return [self._factors.get(index, 1.0) for index in range(len(self.groups))]

    @property
    def scales(self) -> list[float]:
        """What the scheduled rate of each group is multiplied by at this step."""
        return [self.scale * factor for factor in self.factors]

    @property
    def rate(self) -> float:
        """As applied, of the first group that trains."""
        return learning_rate(self.groups[shown(self.groups)]) * self.scale * self.shown_factor

    @property
    def shown_factor(self) -> float:
        """What followers multiply the rate of the first group that trains by."""
        return self._factors.get(shown(self.groups), 1.0)

    def begin(self, scale: float, probed: bool) -> None:
        """A step is decided: nothing is lent and no rate multiplied yet."""
        self.put_back()
        self.scale, self.probed = scale, probed
        self._factors = {}

    def multiply_rate(self, group: int, factor: float) -> None:
        """Multiply the rate of a group, by its place, for this step, beside the scale.

        Raises: ValueError for a factor that is negative or not finite.
        """
        if not 0.0 <= factor < math.inf:
            raise ValueError(f"a rate cannot be multiplied by {factor!r}")
        self._factors[group] = self._factors.get(group, 1.0) * factor

    def load_factor(self, factor: float) -> None:
        """That of the first group that trains, of the step that a state was saved after."""
        self._factors = {} if factor == 1.0 else {shown(self.groups): factor}

    def lend(self, group: dict[str, Any], name: str, value: Any) -> None:
        """group[name] is `value` until the update has been made."""
        self._lent.append((group, name, group[name], value))
        group[name] = value

    def unlent(self, saved: dict[str, Any]) -> dict[str, Any]:
        """`saved`, a state dict of these groups, with every value as `put_back` will put it back."""
        kept = {id(group): saved_group for group, saved_group in zip(self.groups, saved["param_groups"], strict=False)}
        for group, name, own, lent in reversed(self._lent):
            if kept.get(id(group), {}).get(name) is lent:
                kept[id(group)][name] = own
        return saved

    def put_back(self) -> None:
        """Every value that is still as it was lent: one that somebody has written since stays."""
        while self._lent:
            group, name, own, lent = self._lent.pop()
            if group.get(name) is lent:
                group[name] = own
