"""mnist1d's convolutional network: notebooks/mnist1d-classification.ipynb with its train.py and models.py."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import torch
from torch import nn
from torch.optim import Adam

from benchmarks.harness.data import Batch, mnist1d
from benchmarks.published_recipes.recipe import Recipe, constant

SAMPLES, BATCH = 5000, 100


def signals() -> Recipe:
    """Adam at one rate, without a schedule: 92.3 % of the test signals were right."""
    return Recipe(
        name="mnist1d",
        lr=1e-2,
        steps=6000,
        warmup=0,
        stated=1 - 0.923,
        score="error",
        model=cnn,
        rule=lambda model, lr: Adam(model.parameters(), lr=lr),
        stream=in_order,
        held_out=lambda: [mnist1d(SAMPLES)[1]],
        decay=constant,
    )


def cnn(width: int = 25) -> nn.Module:
    """Signals [B, 1, 40] to logits [B, 10]."""
    return nn.Sequential(
        nn.Conv1d(1, width, 5, stride=2, padding=1), nn.ReLU(),
        nn.Conv1d(width, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv1d(width, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(5 * width, 10),
    )  # fmt: skip


def in_order(generator: torch.Generator) -> Iterator[Batch]:
    """The 4000 training signals in their one order, again and again: a seed decides the weights alone."""
    (x, y), _ = mnist1d(SAMPLES)
    yield from cycle(zip(x.split(BATCH), y.split(BATCH), strict=True))
