"""Jobs done in parallel, a row each, kept over a kill."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.harness.results import console
from benchmarks.harness.rows import Row, append

Job = TypeVar("Job", bound=tuple[Any, ...])


def complete(
    jobs: Sequence[Job],
    rows: Mapping[Job, Row],
    path: Path,
    workers: int,
    work: Callable[[Job], Row],
    code: Callable[[Job], str],
    every: int = 50,
) -> dict[Job, Row]:
    """The rows of all jobs: those of `rows` that are of the present code; the others are made, and appended to `path`.

    A row holds the fields of its job, a named tuple. After `every` rows it is said how long the rest may take.
    """
    found = {job: rows[job] for job in jobs if job in rows and rows[job]["code"] == code(job)}
    todo = [job for job in jobs if job not in found]
    if found:
        console.print(f"{len(found)} of {len(jobs)} runs are in {path.name} already")
    start = time.perf_counter()
    for done, row in enumerate(measured(todo, workers, work), 1):
        append(path, row)
        found[type(jobs[0])(*(row[field] for field in jobs[0]._fields))] = row
        if done % every == 0 or done == len(todo):
            spent = time.perf_counter() - start
            left = spent / done * (len(todo) - done)
            console.print(f"{done} of {len(todo)} runs, {spent / 60:.1f} min, about {left / 60:.0f} min to go")
    return {job: found[job] for job in jobs}


def measured(jobs: Sequence[Job], workers: int, work: Callable[[Job], Row]) -> Iterator[Row]:
    """Rows in the order of completion; each worker is a process of one thread."""
    if workers < 2 or len(jobs) < 2:
        yield from map(work, jobs)
        return
    # Forked, so that data is made once and an edit of the library in mid-run cannot reach a worker.
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap_unordered(work, jobs)
