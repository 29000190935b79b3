"""Variants on tasks drawn at random, a row each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

from benchmarks.defaults_are_measured.variants import VARIANTS
from benchmarks.harness.jobs import measured
from benchmarks.harness.results import Results, Row, console
from benchmarks.tasks import runs
from benchmarks.tasks.policies import OURS
from benchmarks.tasks.runs import Job
from benchmarks.tasks.tasks import CENTRE

RATES = {"1x": CENTRE, "10x": CENTRE + 2}
"""Peak rates, relative to the one at which 40 updates at a constant rate do best."""
Cell = tuple[int, str]
"""Task and one of RATES."""


class Trial(NamedTuple):
    variant: str
    task: int
    rate: str  # of RATES
    steps: int

    @property
    def key(self) -> str:
        return f"{self.variant}|{self.task}|{self.rate}"

    @property
    def cell(self) -> Cell:
        return self.task, self.rate

    @property
    def job(self) -> Job:
        return Job(self.task, RATES[self.rate], OURS, self.steps, 0)


@lru_cache
def code(trial: Trial) -> str:
    return f"{runs.code(trial.job)}+{VARIANTS[trial.variant].code()}"


def measure(trial: Trial) -> Row:
    row = runs.measure(trial.job, partial(VARIANTS[trial.variant], updates=trial.steps))
    return {**row, "variant": trial.variant, "key": trial.key, "code": code(trial)}


def trials(tasks: Iterable[int], steps: int, quick: bool) -> list[Trial]:
    """Variant by variant in the order of the list, so that an unfinished run has whole variants."""
    tasks = list(tasks)
    return [
        Trial(variant, task, rate, steps)
        for variant, what in VARIANTS.items()
        if what.quick or not quick
        for task in tasks
        for rate in RATES
    ]


def run(wanted: Sequence[Trial], results: Results, workers: int) -> None:
    """Do what the file does not have yet: the variants of the quick run first, the dearest last."""
    for trial in wanted:
        code(trial)  # now, while the files are those that were imported
    todo = [t for t in wanted if (results.get(t.key) or {}).get("code") != code(t)]
    todo.sort(key=lambda t: (not VARIANTS[t.variant].quick, VARIANTS[t.variant].options.get("every") == 1))
    start = time.perf_counter()
    for done, row in enumerate(measured(todo, workers, measure), 1):
        results.add(row["key"], row)
        if done % 100 == 0 or done == len(todo):
            spent = (time.perf_counter() - start) / 60
            left = spent / done * (len(todo) - done)
            console.print(f"{done} of {len(todo)} runs, {spent:.1f} min, about {left:.0f} to go; now {row['variant']}")
