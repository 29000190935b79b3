"""The claims of all modules of this folder, and the rows of their trials."""

from __future__ import annotations

import importlib
import math
import pkgutil
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from benchmarks import what_is_said_of_warmup as package
from benchmarks.harness import jobs
from benchmarks.harness.results import RESULTS
from benchmarks.harness.rows import Row, read
from benchmarks.harness.source import bare, digest, library
from benchmarks.what_is_said_of_warmup.claim import Claim

ROWS = RESULTS / "what_is_said_of_warmup"
FOLDER = Path(package.__file__).parent


Trial = tuple[str, int, str]
"""Module, number and title of the first claim that is tried by it."""


class Job(NamedTuple):
    module: str
    claim: int
    title: str
    seed: int
    quick: bool


@lru_cache
def collected() -> dict[Trial, list[Claim]]:
    """The claims that one trial tries, in the order of the numbers."""
    found: dict[Trial, list[Claim]] = {}
    for module in pkgutil.iter_modules([str(FOLDER)]):
        if module.name != "__main__":
            claims = getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "CLAIMS", ())
            for claim in claims:
                first = next(other for other in claims if other.trial == claim.trial)
                found.setdefault((module.name, first.number, first.title), []).append(claim)
    return dict(sorted(found.items(), key=lambda item: item[0][1]))


def wanted(numbers: Iterable[int], seeds: int, quick: bool) -> list[Job]:
    """Seed after seed, so that a run cut short has some seeds of all claims; all claims where no number is given."""
    numbers = set(numbers)
    trials = [key for key, claims in collected().items() if not numbers or numbers & {each.number for each in claims}]
    return [Job(*key, seed, quick) for seed in range(seeds) for key in trials]


def path(module: str, quick: bool) -> Path:
    return ROWS / f"{module}{'-quick' * quick}.jsonl"


def complete(todo: Sequence[Job], workers: int) -> dict[Job, Row]:
    """The rows of all jobs: those kept of the present code, and the others measured now."""
    found: dict[Job, Row] = {}
    for module in dict.fromkeys(job.module for job in todo):
        those = [job for job in todo if job.module == module]
        found |= jobs.complete(
            those, kept(those), path(module, those[0].quick), workers, measured, lambda job: code(job.module), every=10
        )
    return found


def kept(todo: Iterable[Job]) -> dict[Job, Row]:
    """The last row of each job, of whatever code."""
    asked = set(todo)
    files = {path(job.module, job.quick) for job in asked}
    rows = {Job(*(row[field] for field in Job._fields)): row for file in files for row in read(file)}
    return {job: row for job, row in rows.items() if job in asked}


def measured(job: Job) -> Row:
    start = time.process_time()
    figures = dict(collected()[job[:3]][0].trial(job.seed, job.quick))
    if wrong := [name for name, value in figures.items() if not math.isfinite(value)]:
        raise ValueError(f"claim {job.claim}, {job.title!r}, seed {job.seed}: {', '.join(wrong)} not finite")
    seconds = round(time.process_time() - start, 2)
    return {**job._asdict(), "figures": figures, "seconds": seconds, "code": code(job.module)}


@lru_cache
def code(module: str) -> str:
    """Of the module and of those beside it that it imports, and of the library where one of them does."""
    texts = [(FOLDER / f"{name}.py").read_text() for name in sorted(set(_sources(module)))]
    made_with = library("follow") if any("AdaptiveWarmup(" in text for text in texts) else ""
    return digest("".join(map(bare, texts)) + made_with)


def _sources(module: str) -> Iterator[str]:
    yield module
    text = (FOLDER / f"{module}.py").read_text()
    for beside in pkgutil.iter_modules([str(FOLDER)]):
        if beside.name not in (module, "claim") and f"{package.__name__}.{beside.name} import" in text:
            yield from _sources(beside.name)
