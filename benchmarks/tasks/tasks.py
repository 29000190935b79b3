"""A task: a workload and an optimizer drawn from one seed, and the peak rates at which it is trained.

Development seeds are for choosing; test seeds are for one report on a law that is finished; the others' families are of
other kinds, for another such report. Families and optimizers take turns by seed, so that any range of seeds is
balanced; everything else is drawn. Weights and batches depend on the run's seed alone, and nothing touches the global
random streams.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from benchmarks.tasks.data import Batch, mean_loss, seeded
from benchmarks.tasks.families import FAMILIES, Draw, Workload, scaled
from benchmarks.tasks.optimizers import OPTIMIZERS, ORDER, Rule, trained
from benchmarks.tasks.other_families import OTHER_FAMILIES

DEVELOPMENT, TEST, OTHER = range(0, 1000), range(1000, 2000), range(2000, 3000)
SPLITS = {"development": DEVELOPMENT, "test": TEST, "other": OTHER}
RATES, CENTRE = 8, 3
"""Peak rates of a task, in half decades, and which of them the search below puts at its centre."""
SEARCHED = tuple(10 ** (k / 2) for k in range(-10, 4))
SEARCH_STEPS = 40
EVAL_BATCHES = 2


@dataclass(frozen=True)
class Task:
    """One training problem with its optimizer."""

    seed: int
    family: str
    rule_name: str
    workload: Workload
    rule: Rule
    choices: dict[str, Any]

    def build(self, seed: int) -> nn.Module:
        """A new model whose weights depend on `seed` and the task alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * self.seed + seed)
            return scaled(self.workload.model(), self.workload.gain)

    def optimizer(self, model: nn.Module, lr: float) -> Optimizer:
        return self.rule(trained(model), lr=lr)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.workload.loss(model, batch)

    def backward(self, model: nn.Module, loss: Tensor) -> None:
        """The gradient, clipped where the task says so."""
        loss.backward()
        if self.workload.clip is not None:
            clip_grad_norm_(model.parameters(), self.workload.clip)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless training batches, by `seed` and the task alone."""
        generator = seeded(7 + 1000 * self.seed + seed)
        while True:
            yield self.workload.train(generator)

    def evaluate(self, model: nn.Module) -> float:
        """Mean loss over the same held-out batches for every run of the task."""
        return mean_loss(self.workload.loss, model, _held_out(self.seed))

    def rates(self) -> tuple[float, ...]:
        """Eight peak rates in half decades, the fourth of which is where 40 updates at a constant rate do best.

        That search knows no schedule, no warmup and no wrapper, so it favours no policy; it costs as much as one run.
        """
        return _rates(self.seed)


@lru_cache
def task(seed: int) -> Task:
    """The task of a seed."""
    families = OTHER_FAMILIES if seed in OTHER else FAMILIES
    names = list(families)
    family, rule = names[seed % len(names)], ORDER[seed % len(ORDER)]
    draw = Draw(f"task {seed}")
    workload, made = families[family](draw), OPTIMIZERS[rule](draw)
    return Task(seed, family, rule, workload, made, draw.made)


@lru_cache
def _held_out(seed: int) -> list[Batch]:
    generator = seeded(13 + seed)
    return [task(seed).workload.held_out(generator) for _ in range(EVAL_BATCHES)]


@lru_cache
def _rates(seed: int) -> tuple[float, ...]:
    drawn = task(seed)
    best, lowest = 0, math.inf
    for k, lr in enumerate(SEARCHED):
        reached = _constant(drawn, lr)
        if reached < lowest:
            best, lowest = k, reached
    return tuple(float(f"{SEARCHED[best] * 10 ** ((i - CENTRE) / 2):.3g}") for i in range(RATES))


def _constant(drawn: Task, lr: float) -> float:
    """Held-out loss after a few updates at one rate, from weights and batches that no run has."""
    model = drawn.build(999)
    optimizer = drawn.optimizer(model, lr)
    for batch in islice(drawn.batches(999), SEARCH_STEPS):
        optimizer.zero_grad()
        loss = drawn.loss(model, batch)
        if not math.isfinite(float(loss.detach())):
            return math.inf
        drawn.backward(model, loss)
        optimizer.step()
    reached = drawn.evaluate(model)
    return reached if math.isfinite(reached) else math.inf
