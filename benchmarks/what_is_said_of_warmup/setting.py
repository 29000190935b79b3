"""A small training problem, trained with and without warmup: one initialisation, one order of data, one peak rate.

    python -m benchmarks.what_is_said_of_warmup.setting    the plain runs that each setting's rate was picked by

The rate of a setting is the best of plain training, no warmup and a constant rate, on seeds that no claim is tried on;
claims about warmup are tried at three times that, where it is said to be needed.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import SGD, Optimizer

from benchmarks.harness.results import console, table
from benchmarks.tasks.data import Batch, Sampler, seeded

Watch = Callable[[int, nn.Module, Batch], object]
"""Called after each backward pass, before clipping, with the number of steps made, the model and the batch."""
RATES = tuple(round(10 ** (exponent / 2), 5) for exponent in range(-8, 3))
PICKED_ON = (100, 101)
ABOVE, SHARE = 3.0, 0.2
"""Claims are tried at this multiple of the best rate of plain training, with warmup over this share of the steps."""


def momentum(parameters: Iterable[nn.Parameter], rate: float) -> Optimizer:
    return SGD(parameters, rate, momentum=0.9)


def class_loss(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return cross_entropy(model(x).flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class Setting:
    """What is trained, and the best rate of training it plainly."""

    name: str
    build: Callable[[], nn.Module]
    sample: Sampler
    rate: float
    steps: int
    chance: float
    """The loss of who knows the classes' frequencies alone: what a run that diverged is counted as."""
    optimizer: Callable[[Iterable[nn.Parameter], float], Optimizer] = momentum
    loss: Callable[[nn.Module, Batch], Tensor] = class_loss
    clip: float = math.inf
    """Of the gradient's norm."""

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            return self.build()

    def train(
        self, seed: int, rate: float, warmup: int = 0, steps: int | None = None, watch: Watch | None = None
    ) -> list[float]:
        """The losses of the steps, up to one that is not finite. After linear warmup the rate stays constant."""
        model, data, losses = self.model(seed), seeded(seed), []
        optimizer = self.optimizer(model.parameters(), rate)
        for step in range(steps or self.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / max(1, warmup))
            batch = self.sample(data)
            optimizer.zero_grad()
            loss = self.loss(model, batch)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                break
            loss.backward()
            if watch:
                watch(step, model, batch)
            if self.clip < math.inf:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
        return losses

    def final(self, losses: Sequence[float], steps: int | None = None) -> float:
        """Mean loss of the last tenth of the steps, at most chance; chance for a run that did not get there."""
        steps = steps or self.steps
        last = losses[-max(1, steps // 10) :]
        mean = sum(last) / len(last)
        return min(mean, self.chance) if len(losses) == steps and math.isfinite(mean) else self.chance


def settings() -> list[Setting]:
    """Those of all modules here."""
    found: list[Setting] = []
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name not in ("__main__", "setting"):
            found += getattr(importlib.import_module(f"{__package__}.{module.name}"), "SETTINGS", ())
    return found


def main(name: Annotated[list[str] | None, typer.Option(help="Only this setting; may be repeated.")] = None) -> None:
    """Plain training at the setting's rate, and at half a decade to either side of it."""
    torch.set_num_threads(1)
    for setting in settings():
        if name and setting.name not in name:
            continue
        means = {
            rate: sum(setting.final(setting.train(seed, rate)) for seed in PICKED_ON) / len(PICKED_ON)
            for rate in RATES
            if setting.rate / 4 < rate < setting.rate * 4
        }
        best = min(means, key=means.__getitem__)
        rows = [{"rate": rate, "final loss": mean, "": "best" * (rate == best)} for rate, mean in means.items()]
        table(f"{setting.name}: plain training", rows, {"rate": "{:g}", "final loss": "{:.4f}", "": "{}"})
        if best != setting.rate:
            console.print(f"the setting has {setting.rate:g}")


if __name__ == "__main__":
    typer.run(main)
