"""Variants on the development problems, a row each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from benchmarks.defaults_are_measured.variants import DEFAULT, VARIANTS
from benchmarks.harness import runs
from benchmarks.harness.jobs import measured
from benchmarks.harness.policies import uses_adam
from benchmarks.harness.problems import PROBLEMS, half_decades
from benchmarks.harness.results import Results, Row, console
from benchmarks.harness.runs import Job

RATES = ("tuned", "3x", "10x")
Cell = tuple[str, str, int]
"""Problem, one of RATES, seed."""


class Trial(NamedTuple):
    variant: str
    job: Job
    rate: str  # of RATES

    @property
    def key(self) -> str:
        return f"{self.variant}|{self.job.problem}|{self.job.lr:g}|{self.job.seed}"

    @property
    def cell(self) -> Cell:
        return self.job.problem, self.rate, self.job.seed

    @property
    def source(self) -> str:
        """The variant that this trial is in fact."""
        same = VARIANTS[self.variant].adam_only and not uses_adam(PROBLEMS[self.job.problem])
        return DEFAULT if same else self.variant


@lru_cache
def code(trial: Trial) -> str:
    return f"{runs.code(trial.job)}+{VARIANTS[trial.source].code()}"


def measure(trial: Trial) -> Row:
    row = runs.measure(trial.job, VARIANTS[trial.variant])
    return {**row, "variant": trial.variant, "rate": trial.rate, "key": trial.key, "code": code(trial)}


def trials(names: Iterable[str], seeds: int, steps: int, quick: bool) -> list[Trial]:
    """Seed by seed, variant by variant in the order of the list, so that an unfinished run has whole variants."""
    return [
        Trial(variant, Job(name, "warmctl", half_decades(PROBLEMS[name].tuned_lr)[i], seed, steps), rate)
        for seed in range(seeds)
        for variant, what in VARIANTS.items()
        if what.quick or not quick
        for name in names
        for i, rate in enumerate(RATES)
        if rate == RATES[-1] or not quick
    ]


def run(wanted: Sequence[Trial], results: Results, workers: int) -> None:
    """Do what the file does not have yet: the variants of the quick run first, the dearest last."""
    for trial in wanted:
        code(trial)  # now, while the files are those that were imported; makes the data too
    todo = [t for t in wanted if t.source == t.variant and (results.get(t.key) or {}).get("code") != code(t)]
    todo.sort(key=lambda t: (t.job.seed, not VARIANTS[t.variant].quick, VARIANTS[t.variant].options.get("every") == 1))
    start = time.perf_counter()
    for done, row in enumerate(measured(todo, workers, measure), 1):
        results.add(row["key"], row)
        if done % 30 == 0 or done == len(todo):
            spent = (time.perf_counter() - start) / 60
            left = spent / done * (len(todo) - done)
            console.print(f"{done} of {len(todo)} runs, {spent:.1f} min, about {left:.0f} to go; now {row['variant']}")
