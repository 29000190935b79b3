"""A recipe: everything that its authors fixed, and which warmups are tried in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from benchmarks.harness.data import Batch

OURS = "warmctl"
NONE = "none"
SHARES = {f"linear-{percent}%": percent / 100 for percent in (2, 10, 20)}
MULTIPLES = 1, 3, 10, 30
"""Of the published peak rate."""

Decay = Callable[[int, int, int], float]  # (step, steps, warmup) -> share of the peak rate, warmup over


@dataclass(frozen=True)
class Recipe:
    """As published: model, optimizer, order of the data, schedule, and what it scores by."""

    name: str
    lr: float
    steps: int
    warmup: int
    stated: float  # the score that was published
    score: str  # "loss", in nats, or "error", a share; lower is better
    model: Callable[[], nn.Module]
    rule: Callable[[nn.Module, float], Optimizer]
    stream: Callable[[torch.Generator], Iterator[Batch]]  # endless training batches
    held_out: Callable[[], list[Batch]]  # of one size each
    decay: Decay
    clip: float | None = None

    @property
    def published(self) -> str:
        """The policy that the authors chose."""
        return f"published-{self.warmup}" if self.warmup else NONE

    def warmups(self, steps: int) -> dict[str, int]:
        """Updates of warmup by hand-set policy, no policy twice."""
        by_share = {name: round(share * steps) for name, share in SHARES.items()}
        return {NONE: 0, **({self.published: self.warmup} if self.warmup else {}), **by_share}

    def share(self, step: int, steps: int, warmup: int) -> float:
        """Of the peak rate at `step`, from 0 on: nanoGPT's linear rise, which the peak follows, then the decay."""
        return (step + 1) / (warmup + 1) if step < warmup else self.decay(step, steps, warmup)

    def build(self, seed: int) -> nn.Module:
        """A new model whose weights depend on `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model()

    def batches(self, seed: int) -> Iterator[Batch]:
        return self.stream(torch.Generator().manual_seed(seed))

    def gradient(self, model: nn.Module, batch: Batch) -> Tensor:
        """Backward and the recipe's clipping: what a closure holds after gradients are cleared. Returns the loss."""
        loss = cross_entropy(model, batch)
        loss.backward()
        if self.clip is not None:
            clip_grad_norm_(model.parameters(), self.clip)
        return loss

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """ "loss" and "error" over the held-out data, in eval mode; the mode is put back."""
        was_training = model.training
        model.eval()
        with torch.no_grad():
            scores = [_scores(model(x), y) for x, y in self.held_out()]
        model.train(was_training)
        losses, errors = zip(*scores, strict=True)
        return {"loss": sum(losses) / len(losses), "error": sum(errors) / len(errors)}

    def chance(self) -> float:
        """The score of one who has learnt no more than the held-out targets' frequencies."""
        frequencies = torch.cat([y.flatten() for _, y in self.held_out()]).bincount().double()
        frequencies /= frequencies.sum()
        if self.score == "error":
            return 1 - float(frequencies.max())
        return torch.distributions.Categorical(frequencies).entropy().item()


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean in nats over all outputs, logits in the last dimension."""
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def cosine_to_a_tenth(step: int, steps: int, warmup: int) -> float:
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def constant(step: int, steps: int, warmup: int) -> float:
    return 1.0


def _scores(logits: Tensor, y: Tensor) -> tuple[float, float]:
    logits, y = logits.flatten(0, -2), y.flatten()
    return F.cross_entropy(logits, y).item(), (logits.argmax(-1) != y).double().mean().item()
