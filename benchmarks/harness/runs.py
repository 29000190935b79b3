"""Training runs, one line of a .jsonl file each: made in parallel, kept over a kill, renewed when code changes."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.harness.jobs import complete
from benchmarks.harness.policies import Wrap, prepare
from benchmarks.harness.problems import PROBLEMS, Problem
from benchmarks.harness.results import Row
from benchmarks.harness.rows import read
from benchmarks.harness.source import digest, library
from warmctl import AdaptiveWarmup

STATISTICS_BATCHES = 50  # forward passes that renew batch norm's statistics at schedule-free's average
FAILED = 0.98  # of chance level


class Job(NamedTuple):
    problem: str
    policy: str
    lr: float
    seed: int
    steps: int


# -- one run ----------------------------------------------------------------------------------------------


def measure(job: Job, wrap: Wrap = AdaptiveWarmup) -> Row:
    """Train once. `seconds` are wall-clock, `cpu_seconds` the same on a core of its own; neither holds evaluation."""
    problem = PROBLEMS[job.problem]
    problem.data()
    model = problem.build(job.seed)
    optimizer, tick = prepare(job.policy, problem, model, job.lr, job.steps, wrap)
    losses: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in islice(problem.batches(job.seed), job.steps):
            losses.append(update(problem, model, optimizer, batch))
            if not math.isfinite(losses[-1]):
                break
            tick()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    diverged = not math.isfinite(losses[-1])
    final = math.nan if diverged else evaluate(problem, model, optimizer, job.seed)
    metrics = getattr(optimizer, "metrics", {})
    return {
        **job._asdict(),
        **outcome(final, losses, job.steps, problem.chance()),
        "split": problem.split,
        "diverged_at": len(losses) if diverged else None,
        "overhead": metrics.get("overhead", 0.0),
        "scale": metrics.get("scale"),
        "seconds": round(wall, 4),
        "cpu_seconds": round(cpu, 4),
        "updates": len(losses),
        "warnings": sorted({str(w.message)[:160] for w in said if str(w.message).startswith("warmctl")}),
        "code": code(job),
        "torch": torch.__version__,
    }


def update(problem: Problem, model: nn.Module, optimizer: Optimizer, batch: Any) -> float:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()
        return loss

    if isinstance(optimizer, AdaptiveWarmup):
        return optimizer.step(closure).item()
    loss = closure()
    optimizer.step()
    return loss.item()


def evaluate(problem: Problem, model: nn.Module, optimizer: Optimizer, seed: int) -> float:
    """Final loss; for schedule-free at its average, with batch norm's statistics renewed there as it asks for."""
    if hasattr(optimizer, "eval") and not isinstance(optimizer, AdaptiveWarmup):
        optimizer.eval()
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            with torch.no_grad():
                for batch in islice(problem.batches(seed), STATISTICS_BATCHES):
                    problem.loss(model, batch)
    return problem.evaluate(model)


def outcome(final: float, losses: Sequence[float], steps: int, chance: float) -> Row:
    """What a run counts for. Training losses count as chance level where they are above it or missing."""
    finite = math.isfinite(final)
    seen = sum(min(loss, chance) if math.isfinite(loss) else chance for loss in losses)
    return {
        "loss": min(final, chance) if finite else chance,
        "raw_loss": final if finite else None,
        "train_loss": (seen + chance * (steps - len(losses))) / steps,
        "failed": not finite or final > FAILED * chance,
        "chance": chance,
    }


# -- rows that survive a kill -----------------------------------------------------------------------------


def code(job: Job) -> str:
    """Which code a row belongs to. Runs with another value are not comparable with the next."""
    return signature(job.problem) + (f"+{library()}" if job.policy == "warmctl" else "")


@lru_cache
def signature(name: str) -> str:
    """Of a problem: model, optimizer, batches, and the first loss, which weights and data decide."""
    problem = PROBLEMS[name]
    model = problem.build(0)
    with torch.no_grad():
        first = problem.loss(model, next(problem.batches(0))).item()
    rule = problem.optimizer(model.parameters(), 1.0)
    sizes = problem.batch, problem.eval_batch, problem.eval_count
    return digest(f"{model} {rule} {sizes} {first:.4f}")


def load(path: Path) -> dict[Job, Row]:
    """The last whole row of each run; a line that a kill cut short is passed over."""
    return {Job(*(row[field] for field in Job._fields)): row for row in read(path)}


def run(jobs: Sequence[Job], path: Path, workers: int) -> dict[Job, Row]:
    """Do what is not in the file yet, and return the rows of all jobs."""
    library()  # now, while the files are those that were imported
    for name in {job.problem for job in jobs}:
        signature(name)  # makes the data too, before workers are forked
    return complete(jobs, load(path), path, workers, measure, code)
