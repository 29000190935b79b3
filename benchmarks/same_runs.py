"""Digests of short runs, to hold two versions of the code against each other: a refactoring changes none of them.

    python -m benchmarks.same_runs --out before.json       on the old code
    python -m benchmarks.same_runs --against before.json   on the new: exit code 1 if a digest differs

Each line is one problem trained through one source of the loss; its digest covers the loss and the scale of every step
bit for bit. In the middle of each run the optimizer is saved and loaded into a new wrapper. Digests depend on the
processor and on torch's version: compare on one machine.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.optim import Adafactor, Optimizer

from benchmarks.harness.data import Batch
from benchmarks.harness.problems import PROBLEMS, Problem
from warmctl import AdaptiveWarmup

RATES = {"gpt-post": 0.03, "cnn": 1.0, "mlp-adam": 0.1, "lstm": 0.03, "resnet": 0.3}
SOURCES = ("closure", "captured", "observed", "live graph")


class ReturnsLoss(nn.Module):
    """A model that computes its own loss, as those of Hugging Face do."""

    def __init__(self, problem: Problem, model: nn.Module) -> None:
        super().__init__()
        self.model, self.problem = model, problem

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.problem.loss(self.model, batch)}


def step(source: str, opt: AdaptiveWarmup, model: nn.Module, problem: Problem, batch: Batch) -> float:
    """One step of training, its loss taken from `source`; returns that loss."""

    def closure() -> Tensor:
        opt.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()
        return loss

    if source == "closure":
        return float(opt.step(closure).detach())
    opt.zero_grad()
    loss = model(batch)["loss"] if source == "captured" else problem.loss(model, batch)
    if source == "live graph":
        opt.backward(loss)
    else:
        loss.backward()
    if source == "observed":
        opt.observe(batch)
    opt.step()
    return float(loss.detach())


def trained(problem: Problem, lr: float, source: str, steps: int, rule: Callable[..., Optimizer] | None) -> str:
    """The digest of the losses and scales of a run that is saved and resumed in its middle."""
    torch.manual_seed(0)
    bare = problem.build(0)
    model: nn.Module = ReturnsLoss(problem, bare) if source == "captured" else bare

    def wrap() -> AdaptiveWarmup:
        base = problem.optimizer(model.parameters(), lr=lr) if rule is None else rule(model.parameters(), lr=lr)
        loss_fn = problem.loss if source == "observed" else None
        return AdaptiveWarmup(base, model, loss_fn=loss_fn)

    opt, digest = wrap(), hashlib.sha256()
    batches = problem.batches(0)
    for index in range(steps):
        if index == steps // 2:
            saved = copy.deepcopy(opt.state_dict())
            opt = wrap()
            opt.load_state_dict(saved)
        loss = step(source, opt, model, problem, next(batches))
        digest.update(struct.pack("<2d", loss, opt.metrics["scale"]))
    return digest.hexdigest()[:16]


def main(
    out: Annotated[Path | None, typer.Option(help="Write the digests here.")] = None,
    against: Annotated[Path | None, typer.Option(help="Compare with the digests in this file.")] = None,
    steps: int = 120,
) -> None:
    torch.set_num_threads(1)
    expected: dict[str, str] = json.loads(against.read_text()) if against else {}
    found: dict[str, str] = {}
    runs: list[tuple[str, str, Any]] = [(name, source, None) for name in RATES for source in SOURCES]
    runs += [(name, source, Adafactor) for name in ("gpt-post", "cnn") for source in SOURCES[:3]]
    for name, source, rule in runs:
        key = f"{name}{' with ' + rule.__name__ if rule else ''}, {source}"
        found[key] = trained(PROBLEMS[name], RATES[name], source, steps, rule)
        verdict = "" if against is None else "same" if found[key] == expected.get(key) else "DIFFERS"
        typer.echo(f"{key:40} {found[key]} {verdict}")
    if out:
        out.write_text(json.dumps(found, indent=2) + "\n")
    if against and found != expected:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
