"""Fine-tuning of a small convolution net that was trained on placed digits; rates by the rule of `problems`."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from benchmarks.harness.data import Batch, class_batches, digits as images, place, placed_batches
from benchmarks.harness.problems import half_decades
from benchmarks.tasks.data import seeded
from benchmarks.what_is_said_of_warmup.problems import MOMENTUM, PROBLEMS
from benchmarks.what_is_said_of_warmup.training import Problem, train


@lru_cache
def pretrained(seed: int, classes: range = range(10)) -> nn.Module:
    """Trained on placed digits of some classes as "placed, momentum" is."""
    problem = PROBLEMS["placed, momentum"]
    x, y = images()[0]
    rows = torch.isin(y, torch.tensor(classes))
    stream = placed_batches((x[rows], y[rows]), seeded(seed), 32)
    return train(problem, seed, False, problem.linear(False), stream=stream).model


@lru_cache
def target(seed: int, far: bool, held_out: bool) -> Batch:
    """400 placed digits of the training half, or those held out: turned by 90 degrees, or only somewhat noisier."""
    x, y = images()[held_out]
    generator = seeded(seed)
    rows = torch.randperm(len(y), generator=generator)[: len(y) if held_out else 400]
    x = torch.rot90(x[rows], 1, (2, 3)) if far else x[rows]
    return place(x, generator, 12, 0.2 if far else 0.3), y[rows]


@lru_cache
def new_classes(seed: int, held_out: bool) -> Batch:
    """200 placed fives to nines, or those held out."""
    x, y = images()[held_out]
    generator = seeded(seed)
    rows = torch.randperm(len(y), generator=generator)
    rows = rows[y[rows] >= 5]
    rows = rows if held_out else rows[:200]
    return place(x[rows], generator, 12), y[rows]


def with_fresh_head(seed: int) -> nn.Module:
    """Trained on zeros to fours; its last layer as it was initialised."""
    model: Any = copy.deepcopy(pretrained(seed, range(5)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model[-1].reset_parameters()
    return model


def transfer(far: bool) -> Problem:
    return Problem(
        model=lambda seed: copy.deepcopy(pretrained(seed)),
        stream=lambda seed: class_batches(target(seed, far, held_out=False), seeded(seed), 20),
        held=lambda seed: target(seed, far, held_out=True),
        rule=MOMENTUM, rates=half_decades(1e-3, 5), lr=3e-2, warmup=0.3,
    )  # fmt: skip


TRANSFERS = {
    "shifted": transfer(far=True),
    "noisier": transfer(far=False),
    "new classes": Problem(
        model=with_fresh_head,
        stream=lambda seed: class_batches(new_classes(seed, held_out=False), seeded(seed), 20),
        held=lambda seed: new_classes(seed, held_out=True),
        rule=MOMENTUM, rates=half_decades(1e-3, 5), lr=1e-2,
    ),
}  # fmt: skip
