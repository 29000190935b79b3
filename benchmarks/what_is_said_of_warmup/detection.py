"""Claim 6: a single-stage and a two-stage detector of digits in a field, early in training."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.tasks.data import Batch, seeded
from benchmarks.what_is_said_of_warmup.claim import Claim, Figures
from benchmarks.what_is_said_of_warmup.detectors import SingleStage, TwoStage, average_precision, fields
from benchmarks.what_is_said_of_warmup.setting import SHARE, Setting

STEPS, LOOKS = 300, 4
TIMES = 2.0
"""The best plain rate; at three times it neither detector trains, warmed up or not."""


@lru_cache
def pool(held_out: bool) -> Batch:
    return fields(seeded(int(held_out)), 100 if held_out else 1500, held_out)


def sample(generator: torch.Generator) -> Batch:
    x, truth = pool(False)
    rows = torch.randint(0, len(x), (16,), generator=generator)
    return x[rows], truth[rows]


def own_loss(model: Any, batch: Batch) -> Tensor:
    return model.loss(batch)  # type: ignore[no-any-return]


SINGLE = Setting("single-stage", SingleStage, sample, rate=0.03162, steps=STEPS, chance=6.3, loss=own_loss)
TWO = Setting("two-stage", TwoStage, sample, rate=0.03162, steps=STEPS, chance=5.5, loss=own_loss)
SETTINGS = (SINGLE, TWO)


def early_precision(setting: Setting, seed: int, warmup: int, steps: int) -> float:
    """Mean of the held-out average precision at some steps of the run; 0 from where it diverged."""
    found: list[float] = []
    x, truth = pool(True)

    def watch(step: int, model: Any, batch: Batch) -> None:
        if (step + 1) % (steps // LOOKS) == 0:
            with torch.no_grad():
                detected = model.detect(x)
            usable = all(part.isfinite().all() for part in detected)
            found.append(average_precision(detected, truth) if usable else 0.0)

    setting.train(seed, TIMES * setting.rate, warmup, steps, watch)
    return float(np.sum(found)) / LOOKS


def precision(seed: int, quick: bool) -> Figures:
    steps = 60 if quick else STEPS
    return {
        f"{setting.name}, {name}": early_precision(setting, seed, warmup, steps)
        for setting in SETTINGS
        for name, warmup in (("with", round(SHARE * steps)), ("without", 0))
    }


def gain(figures: Figures, name: str) -> float:
    return figures[f"{name}, with"] - figures[f"{name}, without"]


TRIED = (
    f"one to three digits in a field of 24 × 24, a small convolution, SGD momentum .9, {STEPS} steps at twice "
    f"each detector's best plain rate, warmup over {SHARE:.0%} of them and none; mean of four looks at held-out fields"
)
CLAIMS = (
    Claim(
        6,
        "A single-stage detector is helped by warmup early on",
        "common advice, after Lin et al. 2017",
        TRIED,
        precision,
        lambda figures: gain(figures, "single-stage"),
        "average precision, with − without",
        margin=0.02,
    ),
    Claim(
        6,
        "So is a two-stage detector",
        "common advice, after Goyal et al. 2017",
        TRIED,
        precision,
        lambda figures: gain(figures, "two-stage"),
        "average precision, with − without",
        margin=0.02,
    ),
    Claim(
        6,
        "A single-stage detector needs warmup more than a two-stage one",
        "common advice",
        TRIED,
        precision,
        lambda figures: gain(figures, "single-stage") - gain(figures, "two-stage"),
        "average precision, with − without, single-stage − two-stage",
        margin=0.02,
    ),
)
