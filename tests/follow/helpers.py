"""Followers driven without a wrapper, and what stands in the groups while an update is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from warmctl.follow.followers import Followers

Step = tuple[float, str]
WARMUP = [(0.01, "warmup"), (0.05, "warmup"), (0.3, "warmup"), (0.2, "warmup"), (0.7, "warmup")]
AFTER = [(0.7, "guard"), (0.9, "guard"), (1.0, "guard"), (1.0, "done")]


class Listener:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[float, float, str]] = []

    def follow(self, scale: float, rate: float, phase: str) -> None:
        self.told.append((scale, rate, phase))


def drive(
    optimizer: Optimizer,
    follower: Any,
    steps: Iterable[Step],
    update: Callable[[], Any] = lambda: None,
    look: Callable[[], Any] = lambda: None,
) -> list[Any]:
    """Tell it of these steps, (scale, phase) each; `update` at the rates that it asks for. What `look` saw before."""
    steps = list(steps)
    followers = Followers(optimizer, control=True)
    followers.add([follower], steps[0][0])
    seen = []
    for scale, phase in steps:
        scales = followers.decided(scale, phase, probed=False)
        full = [group["lr"] for group in optimizer.param_groups]
        for group, factor in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = group["lr"] * factor
        seen.append(look())
        update()
        for group, rate in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = rate
        followers.end()
    return seen


def parameter(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values or (1.0,), dtype=torch.float64))
