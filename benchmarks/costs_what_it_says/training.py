"""What the costs are measured on: three models of a million parameters, a tiny one, and one that is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from benchmarks.harness.data import Batch, corpus, digits, place, text_batches
from benchmarks.harness.models import GPT, mlp, resnet
from benchmarks.harness.problems import cross_entropy
from benchmarks.harness.timing import seconds
from warmctl import AdaptiveWarmup

Batches = Callable[[int], Iterator[Batch]]  # batch size -> batches
Make = Callable[[], nn.Module]
Rule = Callable[..., Optimizer]


def signals(batch: int) -> Iterator[Batch]:
    """Noise [B, 1, 40] and labels [B]: what it costs does not depend on what is learnt."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(batch, 1, 40, generator=generator), torch.randint(10, (batch,), generator=generator)


def images(batch: int) -> Iterator[Batch]:
    """Digits at random places, [B, 1, 12, 12]."""
    (x, y), _ = digits()
    generator = torch.Generator().manual_seed(0)
    while True:
        rows = torch.randint(len(y), (batch,), generator=generator)
        yield place(x[rows], generator, 12), y[rows]


def text(batch: int) -> Iterator[Batch]:
    return text_batches(corpus()[0], torch.Generator().manual_seed(0), batch, context=64)


Setup = tuple[Callable[[], nn.Module], Batches, int, Callable[..., Optimizer]]
MODELS: dict[str, Setup] = {
    "MLP": (partial(mlp, 640, 4), signals, 512, partial(SGD, lr=0.02, momentum=0.9)),
    "convolutional": (partial(resnet, 136, 3), images, 16, partial(SGD, lr=0.02, momentum=0.9)),
    "GPT": (partial(GPT, 144, 4), text, 8, partial(AdamW, lr=3e-4)),
}
TINY: dict[str, Setup] = {"tiny MLP": (partial(mlp, 52, 3), signals, 32, partial(SGD, lr=0.02, momentum=0.9))}


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


class Training:
    """A model, its optimizer, bare or wrapped, and the seconds of each step."""

    def __init__(self, make: Callable[[], nn.Module], rule: Callable[..., Optimizer], **options: Any) -> None:
        self.model = build(make)
        self.times: list[float] = []
        self.probed: list[bool] = []
        self.optimizer: Any = rule(self.model.parameters())
        if options:
            self.optimizer = AdaptiveWarmup(self.optimizer, self.model, **options)
        self.wrapped = bool(options)

    def step(self, batch: Batch) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = cross_entropy(self.model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        before = self.probes
        self.times.append(seconds(lambda: self.optimizer.step(closure)))
        self.probed.append(self.probes > before)

    @property
    def probes(self) -> int:
        return self.optimizer.metrics["probes"] if self.wrapped else 0
