"""An optimizer's double: its settings and a copy of its state, on the very same parameters.

What the double does to the parameters is put back; the optimizer itself is never touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from warmctl.rates import learning_rate
from warmctl.vectors import Vector, locals_of

PEAKS = ("lr", "initial_lr", "max_lr")
"""Where a group may hold the peak of its schedule: a scheduler that begins low has written the others."""


def double_of(optimizer: Optimizer) -> Optimizer:
    """A copy that trains the same parameters, without the hooks of the original and without its schedulers."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    kept = {name: value for name, value in vars(optimizer).items() if name != "step" and not name.endswith("_hooks")}
    double = type(optimizer).__new__(type(optimizer))
    double.__setstate__(copy.deepcopy(kept, {id(p): p for p in params}))
    return double


def peak_rates(optimizer: Optimizer) -> list[float]:
    """The peak rate of each group: the highest that its schedule, if it has one, is known to reach."""
    return [
        max(float(group[name]) for name in PEAKS if group.get(name) is not None) for group in optimizer.param_groups
    ]


def first_rate(rates: Sequence[float]) -> float:
    """The rate that a plan speaks of: that of the first group with one above 0; 0 if there is none."""
    return next((rate for rate in rates if rate > 0.0), 0.0)


def proportions(rates: Sequence[float]) -> list[float]:
    """The groups' rates per unit of the first one; all alike where none is above 0."""
    first = first_rate(rates)
    return [rate / first for rate in rates] if first else [1.0] * len(rates)


def set_rates(optimizer: Optimizer, rates: Sequence[float]) -> None:
    """Give each group its rate; tensor rates are filled in place."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        elif learning_rate(group) != rate:
            group["lr"] = rate


def take_step(double: Optimizer, closure: Callable[[], Any]) -> None:
    """One step with the gradients that there are; rules that need a closure (SAM) are given it."""
    try:
        double.step()
    except (TypeError, AssertionError, RuntimeError):
        double.step(closure)


@contextmanager
def put_back(params: Sequence[Tensor]) -> Iterator[Vector]:
    """A copy of the parameters, which they are given again on leaving, bit for bit."""
    shards = locals_of(params)
    before = [shard.clone() for shard in shards]
    try:
        yield before
    finally:
        with torch.no_grad():
            for shard, value in zip(shards, before, strict=True):
                shard.copy_(value)
