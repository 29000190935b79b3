"""Part 3: training steps in each phase, and a step when all is done, against the bare optimizer's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks.costs_what_it_says.training import Make, Rule, Training
from benchmarks.harness.data import Batch
from benchmarks.harness.models import size_of
from benchmarks.harness.results import Row, median
from benchmarks.harness.timing import interleaved, relative

PHASES: dict[str, dict[str, Any]] = {
    "bare": {},
    "monitor": {"control": False},
    "warmup": {},
    "guard": {"max_warmup": 1, "after": "guard"},
    "done": {"max_warmup": 1, "after": "hold"},
}


def training_steps(make: Make, stream: Iterator[Batch], rule: Rule, rounds: int) -> dict[str, Row]:
    """One training a phase from the same weights, a step of each in turn on the same batch.

    A step without a probe is compared with the bare step of the same round. What probes add is the sum of their steps
    over what these steps would have taken without.
    """
    options = {"seed": 0, "hvp": "finite_difference"}  # `auto` compares the methods once, at the first probe
    runs = {name: Training(make, rule, **({} if name == "bare" else options | PHASES[name])) for name in PHASES}
    names = list(runs)
    for index in range(rounds + 1):  # the first round sets optimizers up and ends the warmup of two of them
        batch = next(stream)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            runs[name].step(batch)
    bare = runs["bare"].times[1:]
    rows: dict[str, Row] = {"bare": {"ms": 1e3 * median(bare)}}
    for name, run in list(runs.items())[1:]:
        pairs = list(zip(run.times[1:], bare, run.probed[1:], strict=True))
        quiet = median([mine / other for mine, other, probed in pairs if not probed] or [math.nan])
        probes = [mine / median(bare) - 1 for mine, _, probed in pairs if probed]
        rows[name] = {
            "phase": run.optimizer.phase,
            "ms": 1e3 * median([mine for mine, _, probed in pairs if not probed] or [math.nan]),
            "without probe %": 100 * (quiet - 1),
            "probes": len(probes),
            "one probe": median(probes) if probes else None,
            "whole %": 100 * ((quiet - 1) + sum(probes) / len(pairs)),
            "metric %": 100 * run.optimizer.counts.cost / run.optimizer.counts.gradients,
        }
    return rows


def step_when_done(make: Make, stream: Iterator[Batch], rule: Rule, rounds: int) -> Row:
    """A step after the end with after="hold" against the bare step, two at a time."""
    bare, wrapped = Training(make, rule), Training(make, rule, max_warmup=1, after="hold", hvp="finite_difference")
    batch = next(stream)
    for training in (bare, wrapped):
        training.step(batch)
    times = interleaved({"bare": lambda: bare.step(batch), "done": lambda: wrapped.step(batch)}, rounds)
    extra = [done - step for done, step in zip(times["done"], times["bare"], strict=True)]
    row: Row = {"parameters": size_of(bare.model), "phase": wrapped.optimizer.phase}
    return row | {
        "bare ms": 1e3 * median(times["bare"]),
        "extra ms": 1e3 * median(extra),
        "extra %": 100 * (relative(times, "done", "bare") - 1),
    }
