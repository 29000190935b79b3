"""Decoupled weight decay while the rate is held back: kept up at every step, or made up for after warmup."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import SGD

from warmctl.follow.follower import Levers
from warmctl.follow.kept import whole
from warmctl.numeric import is_count
from warmctl.rates import learning_rate
from warmctl.stability.update_rules import update_rule

Group = dict[str, Any]
MODES = ("compensate", "delay")
ALWAYS_DECOUPLED = {"AdamW", "Adafactor", "Muon", "Lion"}
"""Classes, by name, that multiply by 1 − ηw whatever their groups say."""
FIELDS = "applied", "full", "owed"


class WeightDecay:
    """Decoupled decay multiplies the weights by 1 − η_t w at each step; a scale s makes that 1 − sη_t w, less decay.

    "compensate" decays by w/s at scale s: the weights shrink at every step as they would at the full schedule, in
    whatever phase.

    "delay" leaves decay out in warmup and makes up for it afterwards, by equal parts of the logarithm over as many
    steps as warmup took: from then on Π(1 − η_t v_t) = Π(1 − η_t w) for the decay v_t that is applied, exactly. At a
    constant rate v is constant.
    From warmup's end decay is otherwise that of the full schedule, as by "compensate".

    Values are put in place for each update and put back after it; at scale 1, with nothing delayed, none is touched.

    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    >>> opt = AdaptiveWarmup(optimizer, model).follow(WeightDecay("compensate"))
    >>> train(opt)
    >>> math.isclose(opt.metrics["shrinkage"], opt.metrics["full_shrinkage"])
    True

    Args:
        mode: "compensate" or "delay".
        over: steps in which what was delayed is made up for; as many as warmup took if None.

    Readings, of the first group that decays, for a parameter with a gradient at every step: `shrinkage`, the product of
    1 − η_t w_t as applied so far, and `full_shrinkage`, that of the full schedule.

    Raises: ValueError for another mode, for `over` below 1, and by `opt.follow` where no group decays by a decoupled
    rule: AdamW, Adam with decoupled_weight_decay, Muon, Lion, Adafactor, SGD without momentum.
    """

    def __init__(self, mode: str = "compensate", over: int | None = None) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
        if over is not None and not is_count(over):
            raise ValueError(f"over must be None or a number of steps of at least 1, got {over!r}")
        self.mode, self.over = mode, over
        self._levers: Levers | None = None
        self._sums: list[dict[str, float]] = []  # logarithms, by group
        self._delayed, self._left = 0, 0  # steps of this warmup; steps that are left to make up for them

    def attach(self, levers: Levers) -> None:
        if not any(_decays(levers, group) for group in levers.groups):
            name = type(levers.optimizer).__name__
            raise ValueError(
                f"no parameter group of {name} has decoupled weight decay, which multiplies the weights by 1 − lr·w: "
                "WeightDecay follows AdamW, Adam(decoupled_weight_decay=True), Muon, Lion, Adafactor and SGD without "
                "momentum, with a weight_decay above 0"
            )
        self._levers = levers
        self._take_in_added()

    def follow(self, scale: float, rate: float, phase: str) -> None:
        levers = self._levers
        assert levers is not None
        if self.mode == "delay":
            self._count(phase)
        self._take_in_added()
        for group, sums, share in zip(levers.groups, self._sums, levers.scales, strict=True):
            if not _decays(levers, group):
                continue
            scheduled, decay = learning_rate(group), float(group["weight_decay"])
            applied, full = scheduled * share, math.log1p(-scheduled * decay)
            sums["full"] += full
            if self.mode == "delay" and phase == "warmup":
                sums["owed"] += full
                levers.lend(group, "weight_decay", 0.0)
                continue
            due = sums["owed"] / self._left if self._left else 0.0
            if applied > 0.0 and (share != 1.0 or due):
                sums["owed"] -= due
                levers.lend(group, "weight_decay", -math.expm1(full + due) / applied if due else decay / share)
            sums["applied"] += math.log1p(-applied * float(group["weight_decay"]))
        self._left = max(self._left - 1, 0) if phase != "warmup" else 0

    def _take_in_added(self) -> None:
        groups = self._levers.groups if self._levers else []
        self._sums += [dict.fromkeys(FIELDS, 0.0) for _ in groups[len(self._sums) :]]

    def _count(self, phase: str) -> None:
        if phase == "warmup":
            self._delayed += 1
        elif self._delayed:
            self._left, self._delayed = self.over or self._delayed, 0

    def readings(self) -> dict[str, float]:
        assert self._levers is not None
        for group, sums in zip(self._levers.groups, self._sums, strict=True):
            if sums["full"] or _decays(self._levers, group):
                return {"shrinkage": math.exp(sums["applied"]), "full_shrinkage": math.exp(sums["full"])}
        return {}

    def state_dict(self) -> dict[str, float]:
        self._take_in_added()
        sums = {f"{name}_{i}": value for i, own in enumerate(self._sums) for name, value in own.items()}
        return {"delayed": float(self._delayed), "left": float(self._left), **sums}

    def load_state_dict(self, values: dict[str, float]) -> None:
        self._delayed, self._left = (whole(name, values[name]) for name in ("delayed", "left"))
        self._sums = [{name: values[f"{name}_{i}"] for name in FIELDS} for i in range(len(self._sums))]


def _decays(levers: Levers, group: Group) -> bool:
    """Whether an update multiplies this group's parameters by 1 − ηw, with w above 0."""
    if not float(group.get("weight_decay") or 0.0) > 0.0:
        return False
    optimizer = getattr(levers.optimizer, "base_optimizer", levers.optimizer)  # of SAM
    names = {ancestor.__name__ for ancestor in type(optimizer).__mro__}
    if isinstance(optimizer, SGD):
        return not group["momentum"]
    if names & ALWAYS_DECOUPLED or group.get("decoupled_weight_decay"):
        return True
    rule = update_rule(optimizer)
    return rule is not None and rule.decoupled_decay(group) > 0.0
