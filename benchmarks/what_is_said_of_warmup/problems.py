"""What claims 11 to 19 and the followers are tried on: small enough for some seconds a seed on one thread.

Weights, data and their order depend on the seed alone. The peak rate of a problem is the largest of its half decades
that linear warmup bears: over seeds 100 and 101, which no trial uses, its mean log held-out loss is within .1 of the
best rate's. `python -m benchmarks.what_is_said_of_warmup.rates` prints it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from benchmarks.harness.data import Batch, class_batches, corpus, digits as images, place, placed_batches, text_batches
from benchmarks.harness.models import GPT, LSTM, resnet, small_conv
from benchmarks.harness.problems import half_decades
from benchmarks.tasks.data import digits, seeded
from benchmarks.tasks.models import mlp
from benchmarks.tasks.optimizers import Muon
from benchmarks.what_is_said_of_warmup.training import Ascent, Half, Problem, weights_by
from warmctl import EasyFirst

LABELLED, WRONG = 400, 0.2
NARROW = 64, 96, 96, 10
POOL, NOISIEST = 2000, 2.0

# Digits of which a fifth of the labels is wrong: the better minimum is not the lower training loss.


@lru_cache
def few_labels(seed: int) -> tuple[Batch, Batch]:
    """400 digits with a fifth of labels drawn at random, and 1397 with their own."""
    parts = [digits(held_out=False), digits(held_out=True)]
    x, y = (torch.cat(both) for both in zip(*parts, strict=True))
    generator = seeded(seed)
    rows = torch.randperm(len(y), generator=generator)
    x, y = x[rows], y[rows]
    drawn = torch.randint(0, 10, (LABELLED,), generator=generator)
    given = torch.where(torch.rand(LABELLED, generator=generator) < WRONG, drawn, y[:LABELLED])
    return (x[:LABELLED], given), (x[LABELLED:], y[LABELLED:])


def labels(
    batch: int,
    rule: Callable[..., Optimizer],
    rates: tuple[float, ...],
    lr: float,
    sizes: Sequence[int] = NARROW,
    **options: Any,
) -> Problem:
    return Problem(
        model=partial(weights_by, model=partial(mlp, sizes, "relu")),
        stream=lambda seed: class_batches(few_labels(seed)[0], seeded(seed), batch),
        held=lambda seed: few_labels(seed)[1],
        rule=rule, rates=rates, lr=lr, **options,
    )  # fmt: skip


# Digits at a random place of a noisy field.


@lru_cache
def placed_test() -> Batch:
    x, y = images()[1]
    return place(x, seeded(0), 12), y


def placed(rule: Callable[..., Optimizer], lr: float, model: Callable[[], nn.Module] = small_conv) -> Problem:
    return Problem(
        model=partial(weights_by, model=model),
        stream=lambda seed: placed_batches(images()[0], seeded(seed), 32),
        held=lambda seed: placed_test(),
        rule=rule, rates=half_decades(3e-2, 5), lr=lr, steps=400,
    )  # fmt: skip


# Digits of which each has its own noise, the measure of how hard it is.


@lru_cache
def graded(seed: int, held_out: bool = False) -> tuple[Batch, Tensor]:
    """Digits of unit variance, and how noisy each is."""
    generator = seeded(seed)
    pictures, classes = digits(held_out)
    rows = torch.randint(0, len(classes), (POOL,), generator=generator)
    noise = NOISIEST * torch.rand(POOL, generator=generator)
    x = pictures[rows]
    return (x + noise[:, None, None, None] * torch.randn(x.shape, generator=generator), classes[rows]), noise


def drawn(sampler: EasyFirst, data: Batch, batch: int = 32) -> Iterator[Batch]:
    """Batches of what the sampler gives at its present difficulty."""

    def endless() -> Iterator[int]:
        while True:
            yield from sampler

    indices = endless()
    while True:
        rows = list(islice(indices, batch))
        yield data[0][rows], data[1][rows]


# Text.


@lru_cache
def text_test() -> Batch:
    return next(text_batches(corpus()[1], seeded(0), 128, 32))


def text(model: Callable[[], nn.Module], rule: Callable[..., Optimizer], low: float, lr: float) -> Problem:
    return Problem(
        model=partial(weights_by, model=model),
        stream=lambda seed: text_batches(corpus()[0], seeded(seed), 8, 32),
        held=lambda seed: text_test(),
        rule=rule, rates=half_decades(low, 5), lr=lr, steps=300, chance=math.log(256),
    )  # fmt: skip


MOMENTUM = partial(SGD, momentum=0.9)
RHO = 0.2
"""The best of .05, .1, .2, .5 and 1 with a fixed radius, over the seeds of the rates; printed by `rates`."""
PROBLEMS = {
    "noisy labels, full batch": labels(LABELLED, MOMENTUM, half_decades(1e-2, 5), 0.03),
    "noisy labels": labels(50, MOMENTUM, half_decades(1e-2, 5), 0.03),
    "noisy labels, SAM": labels(50, MOMENTUM, half_decades(1e-2, 5), 0.1, new_step=lambda: Ascent(RHO)),
    "noisy labels, float16": labels(
        50, MOMENTUM, half_decades(3e-2, 5), 0.3, sizes=(64, 128, 128, 128, 128, 10), new_step=Half
    ),
    "noisy labels, AdamW": labels(50, partial(AdamW, weight_decay=0.1), half_decades(1e-3, 5), 3e-3, warmup=0.5),
    "noisy labels, Muon": labels(50, partial(Muon, momentum=0.95), half_decades(1e-3, 5), 1e-2),
    "placed, SGD": placed(SGD, 1.0),
    "placed, momentum": placed(MOMENTUM, 0.1),
    "graded": Problem(
        model=partial(weights_by, model=partial(mlp, NARROW, "relu")),
        stream=lambda seed: drawn(EasyFirst(graded(seed)[1], seed), graded(seed)[0]),
        held=lambda seed: graded(seed, held_out=True)[0],
        rule=MOMENTUM, rates=half_decades(1e-2, 5), lr=0.03,
    ),
    "placed, batch norm": placed(MOMENTUM, 0.3, partial(resnet, width=8, depth=1)),
    "text, Adam": text(partial(GPT, width=32, depth=2, context=32, post_norm=True), Adam, 1e-3, 3e-2),
    "text, LSTM": text(partial(LSTM, width=64), RMSprop, 3e-3, 3e-2),
}  # fmt: skip
