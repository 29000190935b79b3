"""Runs of the recipes, one line of a .jsonl file each. A hand-set row outlives any change of warmctl's code."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.harness.jobs import complete
from benchmarks.harness.rows import Row, read
from benchmarks.harness.source import digest, library
from benchmarks.published_recipes.nanogpt import nanogpt
from benchmarks.published_recipes.recipe import MULTIPLES, OURS, Recipe, cross_entropy
from benchmarks.published_recipes.signals import signals
from warmctl import AdaptiveWarmup

FAILED = 0.98  # of chance level
PARTS = 20
"""Of a run, whose mean training losses are its curve."""
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (nanogpt(), signals())}
"""By name; the command adds nanoGPT's on another text."""


class Job(NamedTuple):
    recipe: str
    policy: str
    multiple: float  # of the published peak rate
    seed: int
    steps: int


def grid(
    recipe: Recipe, steps: int, seeds: int, policies: Iterable[str], multiples: Iterable[float] = MULTIPLES
) -> list[Job]:
    """All runs of the first seed before the second's, so that an unfinished grid can be read."""
    cells = [(multiple, policy) for multiple in multiples for policy in policies]
    return [Job(recipe.name, policy, multiple, seed, steps) for seed in range(seeds) for multiple, policy in cells]


def measure(job: Job) -> Row:
    """Train once. `seconds` are wall-clock, `cpu_seconds` the same on a core of its own; neither holds evaluation."""
    recipe = RECIPES[job.recipe]
    lr = float(f"{recipe.lr * job.multiple:.3g}")
    model = recipe.build(job.seed)
    base = recipe.rule(model, lr)
    optimizer = AdaptiveWarmup(base, model) if job.policy == OURS else base
    warmup = recipe.warmups(job.steps).get(job.policy, 0)
    losses: list[float] = []
    scales: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step, batch in enumerate(islice(recipe.batches(job.seed), job.steps)):
            for group in optimizer.param_groups:  # as nanoGPT's loop does
                group["lr"] = lr * recipe.share(step, job.steps, warmup)
            losses.append(update(recipe, model, optimizer, batch))
            if not math.isfinite(losses[-1]):
                break
            if job.policy == OURS:
                scales.append(optimizer.metrics["scale"])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    final = recipe.evaluate(model)
    metrics = getattr(optimizer, "metrics", {})
    return {
        **job._asdict(),
        "lr": lr,
        "published": job.policy == recipe.published,
        "by": recipe.score,
        "stated": recipe.stated if job.steps == recipe.steps else None,
        **outcome(recipe, final, losses),
        "train": curve(losses, job.steps),
        "updates": len(losses),
        "overhead": metrics.get("overhead", 0.0),
        **({"scales": curve(scales, job.steps), "phase": metrics["phase"]} if scales else {}),
        "seconds": round(wall, 3),
        "cpu_seconds": round(cpu, 3),
        "warnings": sorted({str(w.message)[:160] for w in said if str(w.message).startswith("warmctl")}),
        "code": code(job),
        "torch": torch.__version__,
    }


def update(recipe: Recipe, model: torch.nn.Module, optimizer: Optimizer, batch: Any) -> float:
    def closure() -> Tensor:
        optimizer.zero_grad()
        return recipe.gradient(model, batch)

    if isinstance(optimizer, AdaptiveWarmup):
        return float(optimizer.step(closure).detach())
    loss = closure()
    optimizer.step()
    return float(loss.detach())


def outcome(recipe: Recipe, final: dict[str, float], losses: Sequence[float]) -> Row:
    """What a run counts for: its own score, or chance level where it diverged or ended above that."""
    chance = recipe.chance()
    finite = math.isfinite(losses[-1]) and math.isfinite(final["loss"])
    score = min(final[recipe.score], chance) if finite else chance
    return {
        "score": score,
        "loss": final["loss"] if finite else None,
        "error": final["error"] if finite else None,
        "chance": chance,
        "failed": score > FAILED * chance,
    }


def curve(values: Sequence[float], steps: int) -> list[float]:
    """Means over `PARTS` equal parts of the run, as many as it reached; four digits."""
    bounds = [round(i * steps / PARTS) for i in range(PARTS + 1)]
    parts = [values[low:high] for low, high in pairwise(bounds)]
    means = [sum(part) / len(part) for part in parts if part]
    return [float(f"{mean:.4g}") for mean in means if math.isfinite(mean)]


def code(job: Job) -> str:
    """Which code a row belongs to: the recipe's, and for "warmctl" the library's."""
    return signature(job.recipe) + (f"+{library()}" if job.policy == OURS else "")


@lru_cache
def signature(name: str) -> str:
    """Of a recipe: model, optimizer, schedule, data, and the first loss, which weights decide too."""
    recipe = RECIPES[name]
    model = recipe.build(0)
    first = next(recipe.batches(0))
    with torch.no_grad():
        loss = cross_entropy(model, first).item()
    shares = [round(recipe.share(step, 100, warmup), 6) for warmup in (0, 10) for step in (0, 5, 10, 50, 99)]
    seen = [f"{float(x.double().sum()):.3f} {int(y.sum())} {tuple(x.shape)}" for x, y in (first, *recipe.held_out())]
    return digest(f"{model} {recipe.rule(model, 1.0)} {recipe.clip} {shares} {seen} {loss:.4f}")


def load(path: Path) -> dict[Job, Row]:
    """The last whole row of each run."""
    return {Job(*(row[field] for field in Job._fields)): row for row in read(path)}


def run(jobs: Sequence[Job], path: Path, workers: int = 1) -> dict[Job, Row]:
    """Do what is not in the file yet, and return the rows of all jobs."""
    library()  # now, while the files are those that were imported
    for name in {job.recipe for job in jobs}:
        signature(name)  # makes the data too, before workers are forked
    return complete(jobs, load(path), path, workers, measure, code, every=10)
