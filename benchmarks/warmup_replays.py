"""A warmup that was recorded once, replayed in other seeds without a probe: as good as the controller?

    python -m benchmarks.warmup_replays            four problems at the best rate and at ten times it; resumes
    python -m benchmarks.warmup_replays --quick    one problem, two seeds
    python -m benchmarks.warmup_replays --report   the table from the rows there are

Seed 0 is controlled and recorded. Seeds 1 to 5 are then trained four ways: controlled, with the record replayed, with
the nearest linear warmup to it (`warmup_steps`), and with none. Every row carries the code of the library that it was
measured with, so rows of an older law are measured again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
import typer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.harness.policies import schedule
from benchmarks.harness.problems import PROBLEMS
from benchmarks.harness.results import Quick, Report, Results, table
from benchmarks.harness.source import library
from warmctl import AdaptiveWarmup
from warmctl.record.schedule import RecordedWarmup

NAMES = ("mlp", "mlp-adam", "cnn", "gpt-post")
POLICIES = ("controlled", "replayed", "number", "none")
STEPS, SEEDS = 400, 5
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}
"""Of the 95 % interval of a mean, by degrees of freedom."""


def train(name: str, lr: float, policy: str, seed: int, steps: int, recorded: RecordedWarmup | None) -> dict[str, Any]:
    """The row of one run; that of a controlled one holds its record."""
    problem = PROBLEMS[name]
    model = problem.build(seed)
    optimizer: Any = problem.optimizer(model.parameters(), lr)
    if policy == "controlled":
        optimizer = AdaptiveWarmup(optimizer, model)
    if policy == "replayed" and recorded is not None:
        scheduler = recorded.scheduler(optimizer, decay=lambda step: schedule(step, steps))
    else:
        number = recorded.warmup_steps if policy == "number" and recorded is not None else 0
        peak = recorded.scales[-1] if policy == "number" and recorded is not None else 1.0
        scheduler = LambdaLR(
            optimizer, lambda step: peak * min(1.0, (step + 1) / max(1, number)) * schedule(step, steps)
        )
    for batch in islice(problem.batches(seed), steps):

        def closure(batch: Any = batch) -> torch.Tensor:
            optimizer.zero_grad()
            loss = problem.loss(model, batch)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        if not math.isfinite(float(loss.detach())):
            break
        scheduler.step()
    row = {"problem": name, "lr": lr, "policy": policy, "seed": seed, "loss": problem.evaluate(model)}
    if policy == "controlled":
        found = optimizer.history.schedule()
        record = {"steps": found.steps, "scales": found.scales, "length": found.length, "lr": found.lr}
        row |= {"overhead": optimizer.metrics["overhead"], "record": record if seed == 0 else None}
    return row


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval."""
    count = len(differences)
    mean = sum(differences) / count
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / max(1, count - 1))
    return mean, STUDENT.get(count - 1, 2.0) * spread / math.sqrt(count)


def measured(results: Results, name: str, lr: float, seeds: int, steps: int) -> dict[str, Any]:
    """The four policies over the seeds, each against the controller in log loss, seed by seed."""

    def run(policy: str, seed: int, recorded: RecordedWarmup | None = None) -> dict[str, Any]:
        key = f"{name}, {lr:g}, {policy}, {seed}"
        return results.row(key, train, name, lr, policy, seed, steps, recorded, code=library())

    record = run("controlled", 0)["record"]
    recorded = RecordedWarmup(tuple(record["steps"]), tuple(record["scales"]), record["length"], record["lr"])
    rows = {policy: [run(policy, seed, recorded) for seed in range(1, seeds + 1)] for policy in POLICIES}
    logs = {policy: [_log(row["loss"]) for row in found] for policy, found in rows.items()}
    cell: dict[str, Any] = {
        "problem": name,
        "lr": lr,
        "warmup_steps": recorded.warmup_steps,
        "peak": recorded.scales[-1],
    }
    cell["controlled"] = sum(math.exp(x) for x in logs["controlled"]) / seeds
    for policy in POLICIES[1:]:
        mean, half = interval([a - b for a, b in zip(logs[policy], logs["controlled"], strict=True)])
        cell[policy] = f"{mean:+.3f} ± {half:.3f}"
        if policy == "replayed":
            surely = "worse" if mean > half + 0.02 else "better" if mean < -half - 0.02 else ""
            cell["verdict"] = surely or ("holds" if half <= 0.1 else "cannot be told")
    return cell


def _log(loss: float | None) -> float:
    return math.log(min(loss, 1e3)) if isinstance(loss, float) and loss == loss else math.log(1e3)


def main(quick: Quick = False, report: Report = False) -> None:
    torch.set_num_threads(1)
    names, seeds, steps = (NAMES[:1], 2, 200) if quick else (NAMES, SEEDS, STEPS)
    results = Results("warmup_replays", {"quick": quick, "seeds": seeds, "steps": steps}, only_report=report)
    cells = [
        measured(results, name, lr, seeds, steps)
        for name in names
        for lr in (PROBLEMS[name].demo_lr, PROBLEMS[name].tuned_lr)
    ]
    results.finish({"cells": cells})
    table(
        "Log loss against five controlled runs of the same seeds, mean and 95 % interval",
        cells,
        {
            **{"problem": "{}", "lr": "{:g}", "controlled": "{:.3f}", "replayed": "{}", "verdict": "{}"},
            **{"number": "{}", "none": "{}", "warmup_steps": "{:d}", "peak": "{:.2g}"},
        },
    )


if __name__ == "__main__":
    typer.run(main)
