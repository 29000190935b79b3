"""The training problems that the demo and the benchmarks share: a model, its data, and the optimizer that suits it.

Weights depend on `build`'s seed alone, the order of the data on `batches`' seed alone, and neither touches the global
random streams: policies given one seed see the same weights and data. All problems are sized for one thread of a CPU:
2 to 12 ms a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from benchmarks.harness.data import Batch, class_batches, corpus, digits, mnist1d, placed_batches, text_batches
from benchmarks.harness.models import GPT, LSTM, ViT, cnn, mlp, resnet, small_conv


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean in nats over all outputs, logits in the last dimension."""
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class Problem:
    """One training problem: a model, its data and the optimizer that suits it.

    `split` is "development" where warmctl's defaults may be chosen on the problem, "test" where they may not.
    """

    name: str
    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Any, Any]]  # () -> train, eval
    stream: Callable[[Any, torch.Generator, int], Iterator[Batch]]  # data, generator, batch size -> batches
    batch: int
    rule: Callable[..., Optimizer]  # params, lr=... -> optimizer
    lrs: tuple[float, ...]  # peak rates in half decades, reaching past where fixed schedules fail
    tuned_lr: float  # the best of `lrs` under 10 % linear warmup, 400 steps, mean over five seeds
    split: str
    eval_batch: int
    eval_count: int = 8

    @property
    def demo_lr(self) -> float:
        """A peak rate that is far too high: ten times the tuned one."""
        return 10 * self.tuned_lr

    def build(self, seed: int) -> nn.Module:
        """A new model whose weights depend on `seed` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.model()

    def optimizer(self, params: Iterable[nn.Parameter], lr: float) -> Optimizer:
        return self.rule(params, lr=lr)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats."""
        return cross_entropy(model, batch)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless training batches, in an order that depends on `seed` alone."""
        return self.stream(self.data()[0], torch.Generator().manual_seed(seed), self.batch)

    def eval_batches(self) -> list[Batch]:
        """The same held-out batches for every seed and policy."""
        return _eval_batches(self)

    def evaluate(self, model: nn.Module) -> float:
        """Mean loss over `eval_batches` in eval mode; the mode is put back."""
        was_training = model.training
        model.eval()
        with torch.no_grad():
            losses = [self.loss(model, batch).item() for batch in self.eval_batches()]
        model.train(was_training)
        return sum(losses) / len(losses)

    def chance(self) -> float:
        """Entropy of the held-out targets in nats: who ends here has learnt no more than the frequencies."""
        counts = torch.cat([y.flatten() for _, y in self.eval_batches()]).bincount().double()
        return torch.distributions.Categorical(counts).entropy().item()


@lru_cache
def _eval_batches(problem: Problem) -> list[Batch]:
    stream = problem.stream(problem.data()[1], torch.Generator().manual_seed(0), problem.eval_batch)
    return [next(stream) for _ in range(problem.eval_count)]


def half_decades(low: float, count: int = 7) -> tuple[float, ...]:
    """Peak rates 1, 3, 10, 30, … from `low` on: seven span three decades."""
    rates = [float(f"{digit}e{exponent}") for exponent in range(-6, 4) for digit in (1, 3)]
    return tuple(rates[rates.index(low) :][:count])


def _problems() -> Iterator[Problem]:
    text = partial(Problem, data=corpus, stream=partial(text_batches, context=64), batch=8, eval_batch=32)
    lines = partial(Problem, data=corpus, stream=partial(text_batches, context=32), batch=16, eval_batch=64)
    signals = partial(Problem, data=mnist1d, stream=class_batches, batch=128, eval_batch=500)
    images = partial(Problem, data=digits, stream=partial(placed_batches, size=12), batch=64, eval_batch=180)
    patches = partial(Problem, data=digits, stream=partial(placed_batches, size=9), batch=64, eval_batch=180)
    post_gpt = partial(GPT, post_norm=True)
    momentum = partial(SGD, momentum=0.9)
    nesterov = partial(SGD, momentum=0.9, nesterov=True)
    adamw = partial(AdamW, betas=(0.9, 0.95), weight_decay=0.1)

    yield text("gpt", GPT, rule=adamw, lrs=half_decades(3e-4), tuned_lr=3e-3, split="test")
    yield text("gpt-post", post_gpt, rule=Adam, lrs=half_decades(1e-4), tuned_lr=3e-3, split="development")
    yield text("gpt-sgd", GPT, rule=momentum, lrs=half_decades(1e-2), tuned_lr=0.1, split="development")
    yield signals("cnn", cnn, rule=momentum, lrs=half_decades(1e-2), tuned_lr=0.1, split="development")
    yield signals("mlp", mlp, rule=momentum, lrs=half_decades(1e-2), tuned_lr=0.3, split="test")
    yield signals("mlp-adam", mlp, rule=Adam, lrs=half_decades(3e-4), tuned_lr=1e-2, split="development")
    yield images("resnet", resnet, rule=nesterov, lrs=half_decades(3e-2), tuned_lr=0.3, split="development")
    yield patches("vit", ViT, rule=adamw, lrs=half_decades(3e-4), tuned_lr=3e-3, split="test")
    yield lines("lstm", LSTM, rule=RMSprop, lrs=half_decades(1e-3), tuned_lr=3e-2, split="test")
    yield images("digits", small_conv, rule=momentum, lrs=half_decades(1e-2), tuned_lr=0.1, split="test")


PROBLEMS = {problem.name: problem for problem in _problems()}
