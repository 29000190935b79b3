"""The optimizer's momentum, low where the rate is."""

from __future__ import annotations

from typing import Any

from warmctl.follow.follower import Levers
from warmctl.momentum import momentum

Group = dict[str, Any]


class Momentum:
    """β_t = low + (β − low) · s_t: momentum rises with the scale to the group's own β, as Muon's recipes warm it.

    β is `momentum` or the first of `betas`; a group whose β is not above `low` keeps it. It is put in place for each
    update and put back after it, so schedules of momentum go on working. A probe reads the group's own β: its edge of
    stability is up to (1 + β)/(1 + low) of the step's with SGD (1.03 for .9 and .85), and (1 + β)(1 − low) /
    ((1 − β)(1 + low)) with Adam (1.54), so the ratio is as much too low, at low scales.

    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.95)
    >>> opt = AdaptiveWarmup(optimizer, model).follow(Momentum(low=0.85))
    >>> train(opt)
    >>> 0.85 < opt.metrics["momentum"] <= 0.95
    True

    Args:
        low: at scale 0, in [0, 1).

    Reading: `momentum` of the first group that moves.

    Raises: ValueError for a `low` outside [0, 1), and by `opt.follow` where no group has a momentum above it.
    """

    def __init__(self, low: float = 0.85) -> None:
        if not 0.0 <= low < 1.0:
            raise ValueError(f"low must be in [0, 1), the momentum at scale 0, got {low!r}")
        self.low = low
        self._levers: Levers | None = None
        self._readings: dict[str, float] = {}

    def attach(self, levers: Levers) -> None:
        if not any(momentum(group) > self.low for group in levers.groups):
            found = ", ".join(f"{momentum(group):g}" for group in levers.groups)
            raise ValueError(
                f"no parameter group of {type(levers.optimizer).__name__} has a momentum above low={self.low:g} "
                f"(found: {found}): Momentum has nothing to raise. Give a smaller low"
            )
        self._levers = levers

    def follow(self, scale: float, rate: float, phase: str) -> None:
        assert self._levers is not None
        self._readings = {}
        for group in self._levers.groups:
            own = momentum(group)
            if own <= self.low:
                continue
            value = own if scale == 1.0 else self.low + (own - self.low) * scale
            self._readings.setdefault("momentum", value)
            if value == own:
                continue
            if group.get("betas") is not None:
                self._levers.lend(group, "betas", (value, *group["betas"][1:]))
            else:
                self._levers.lend(group, "momentum", value)

    def readings(self) -> dict[str, float]:
        return self._readings
