"""How claims 11 to 19 and the followers train: a problem, one update of it, a run of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harness.data import Batch
from benchmarks.harness.policies import schedule
from benchmarks.harness.problems import cross_entropy
from warmctl import AdaptiveWarmup

Step = Callable[[nn.Module, Any, Batch], Tensor]
"""(model, optimizer, batch) → loss: one update."""
QUICK = 5
"""A run is so many times shorter in quick mode."""
MARGIN = 0.05
"""Of log held-out losses."""
LOG_LOSS = "log held-out loss, without − with"


def difference(first: str, second: str) -> Callable[[Mapping[str, float]], float]:
    return lambda figures: figures[first] - figures[second]


gain = difference("without", "with")


def plain(model: nn.Module, optimizer: Any, batch: Batch) -> Tensor:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        return loss

    if isinstance(optimizer, AdaptiveWarmup):
        loss: Tensor = optimizer.step(closure)
        return loss.detach()
    loss = closure()
    optimizer.step()
    return loss.detach()


@dataclass
class Ascent:
    """A step of sharpness-aware minimisation (Foret et al. 2021): the gradient at θ + ρ g/‖g‖ moves θ."""

    rho: float

    def __call__(self, model: nn.Module, optimizer: Any, batch: Batch) -> Tensor:
        params = [p for p in model.parameters() if p.requires_grad]
        loss = cross_entropy(model, batch)
        gradients = torch.autograd.grad(loss, params)
        length = float(torch.stack([g.square().sum() for g in gradients]).sum().sqrt()) + 1e-12
        old = [p.detach().clone() for p in params]
        with torch.no_grad():
            torch._foreach_add_(params, gradients, alpha=self.rho / length)
        optimizer.zero_grad()
        above = cross_entropy(model, batch)
        optimizer.backward(above) if isinstance(optimizer, AdaptiveWarmup) else above.backward()
        with torch.no_grad():
            torch._foreach_copy_(params, old)
        optimizer.step()
        return loss.detach()


class Half:
    """A forward and backward pass in float16 with a fixed loss scale; a step whose gradient overflows is left out.

    The scale is three powers of two below the first that overflows on the first batch.
    """

    HEADROOM = 3

    def __init__(self) -> None:
        self.scale, self.overflows = 0.0, list[bool]()

    def __call__(self, model: nn.Module, optimizer: Any, batch: Batch) -> Tensor:
        if not self.scale:
            fits = [power for power in range(40) if self._gradient(model, optimizer, batch, 2.0**power)[1]]
            self.scale = 2.0 ** (max(fits) + 1 - self.HEADROOM)
        loss, fits_now = self._gradient(model, optimizer, batch, self.scale)
        self.overflows.append(not fits_now)
        if fits_now:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.div_(self.scale)
            optimizer.step()
        return loss

    def _gradient(self, model: nn.Module, optimizer: Any, batch: Batch, scale: float) -> tuple[Tensor, bool]:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = cross_entropy(model, batch)
        (loss * scale).backward()
        return loss.detach(), all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


@dataclass(frozen=True)
class Problem:
    """One model, its data and optimizer, trained for `steps` at `lr`."""

    model: Callable[[int], nn.Module]  # by seed
    stream: Callable[[int], Iterator[Batch]]
    held: Callable[[int], Batch]
    rule: Callable[..., Optimizer]
    rates: tuple[float, ...]
    lr: float
    steps: int = 200
    warmup: float = 0.2
    """Share of the steps that linear warmup takes."""
    chance: float = math.log(10)
    """Loss of knowing nothing; a run that ends above counts as that."""
    new_step: Callable[[], Step] = lambda: plain

    def length(self, quick: bool) -> int:
        return self.steps // QUICK if quick else self.steps

    def linear(self, quick: bool, share: float | None = None) -> Callable[[int], float]:
        """Linear warmup over a share of the steps, then cosine decay to a tenth."""
        steps = self.length(quick)
        return partial(schedule, steps=steps, warmup=round((self.warmup if share is None else share) * steps))

    def optimizer(self, model: nn.Module, lr: float | None = None) -> Optimizer:
        return self.rule([p for p in model.parameters() if p.requires_grad], lr=lr or self.lr)

    def held_out(self, model: nn.Module, seed: int, held: Batch | None = None) -> float:
        """Log of the held-out loss, in evaluation mode."""
        training = model.training
        model.eval()
        with torch.no_grad():
            loss = float(cross_entropy(model, held or self.held(seed)))
        model.train(training)
        return math.log(min(loss, self.chance)) if math.isfinite(loss) else math.log(self.chance)


class Run(NamedTuple):
    model: nn.Module
    optimizer: Any
    losses: list[float]
    log_loss: float
    """Of the held-out loss at the end."""


def train(
    problem: Problem,
    seed: int,
    quick: bool,
    scale: Callable[[int], float],
    *,
    prepare: Callable[[nn.Module, Any], Any] = lambda model, optimizer: optimizer,
    stream: Iterator[Batch] | None = None,
    before: Callable[[int, nn.Module, Any], Any] | None = None,
    step: Step | None = None,
    lr: float | None = None,
) -> Run:
    """Train at `scale(step)` times the peak rate.

    Args:
        prepare: given model and optimizer, what steps; to wrap, hook or add followers.
        before: called before each step.
    """
    model = problem.model(seed)
    optimizer = prepare(model, problem.optimizer(model, lr))
    step = step or problem.new_step()
    losses: list[float] = []
    for t, batch in enumerate(islice(stream or problem.stream(seed), problem.length(quick))):
        for group in optimizer.param_groups:
            group["lr"] = (lr or problem.lr) * scale(t)
        if before:
            before(t, model, optimizer)
        losses.append(float(step(model, optimizer, batch)))
        if not math.isfinite(losses[-1]):
            break
    return Run(model, optimizer, losses, problem.held_out(model, seed))


def weights_by(seed: int, model: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model()
