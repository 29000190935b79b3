"""The map of peak rate × length of warmup, for Adam and for Adam with its second moment seeded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.harness.data import text_batches
from benchmarks.harness.models import GPT
from benchmarks.harness.policies import seed_second_moment
from benchmarks.harness.problems import PROBLEMS, Problem
from benchmarks.harness.results import Row

KINDS = ("adam", "seeded")
TOLERABLE = 0.5
"""A rate is tolerated if the run learns this part of the way from chance to the best cell of its map."""
LAYERS = 3


@lru_cache
def small_gpt(layers: int) -> Problem:
    """`gpt-post` at half the width and context."""
    stream = partial(text_batches, context=32)
    return replace(
        PROBLEMS["gpt-post"], model=partial(GPT, 32, layers, 32, post_norm=True), stream=stream, eval_count=4
    )


def warmed_up(rule: str, lr: float, warmup: int, steps: int, seed: int, layers: int = LAYERS) -> Row:
    """Train with linear warmup and a constant rate after it, by Adam or by Adam with v = g₀² at first."""
    problem = small_gpt(layers)
    model = problem.build(seed)
    optimizer = problem.optimizer(model.parameters(), lr)
    if rule == "seeded":
        optimizer.register_step_pre_hook(seed_second_moment)
    scheduler = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(warmup, 1)))
    chance, loss = problem.chance(), torch.tensor(0.0)
    for batch in islice(problem.batches(seed), steps):
        optimizer.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if not math.isfinite(loss.item()):
            break
        optimizer.step()
        scheduler.step()
    final = problem.evaluate(model) if math.isfinite(loss.item()) else math.inf
    diverged = not math.isfinite(final)
    return {"loss": chance if diverged else min(final, chance), "diverged": diverged, "chance": chance}


@dataclass(frozen=True)
class Heatmap:
    """Final losses of "adam" and "seeded", means over seeds, [warmup][rate], counted as chance where they are above."""

    rates: tuple[float, ...]
    warmups: tuple[int, ...]
    losses: dict[str, list[list[float]]]
    diverged: dict[str, list[list[bool]]]
    chance: float

    def best(self) -> float:
        return min(loss for rows in self.losses.values() for row in rows for loss in row)

    def learnt(self, loss: float) -> float:
        return (self.chance - loss) / max(self.chance - self.best(), 1e-12)

    def boundary(self, rule: str) -> list[float]:
        """The largest tolerated rate at each warmup length; 0 if there is none."""
        rows = self.losses[rule]
        return [
            max((lr for lr, loss in zip(self.rates, row, strict=True) if self.learnt(loss) >= TOLERABLE), default=0.0)
            for row in rows
        ]


def collect(
    cells: dict[tuple[str, int, float], list[Row]], rates: tuple[float, ...], warmups: tuple[int, ...]
) -> Heatmap:
    """The map from the rows, one a seed, of each (kind, warmup, rate)."""

    def grid(value: Callable[[list[Row]], Any]) -> dict[str, list[list[Any]]]:
        return {kind: [[value(cells[kind, warmup, lr]) for lr in rates] for warmup in warmups] for kind in KINDS}

    (first, *_) = cells.values()
    losses = grid(lambda rows: statistics.fmean(row["loss"] for row in rows))
    diverged = grid(lambda rows: any(row["diverged"] for row in rows))
    return Heatmap(rates, warmups, losses, diverged, first[0]["chance"])
