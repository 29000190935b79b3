"""Training runs of the tasks: one line of a .jsonl file each, made in parallel, kept over a kill."""

from __future__ import annotations

import math
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.results import console
from benchmarks.harness.rows import Row as Row, append, read
from benchmarks.harness.source import digest, library
from benchmarks.tasks.policies import LINEAR, PEERS, Wrap, prepare
from benchmarks.tasks.tasks import task
from warmctl import AdaptiveWarmup

STATISTICS_BATCHES = 30  # forward passes that renew batch norm's statistics at schedule-free's average


class Job(NamedTuple):
    seed: int  # of the task
    rate: int  # which of its eight
    policy: str
    steps: int
    run: int  # seed of weights and batches


def measure(job: Job, wrap: Wrap = AdaptiveWarmup) -> Row:
    """Train once."""
    drawn = task(job.seed)
    lr = drawn.rates()[job.rate]
    model = drawn.build(job.run)
    start = drawn.evaluate(model)
    optimizer, tick = prepare(job.policy, drawn, model, lr, job.steps, wrap)
    wrapped = job.policy not in LINEAR and job.policy not in PEERS
    losses: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for batch in islice(drawn.batches(job.run), job.steps):

            def closure(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = drawn.loss(model, batch)
                drawn.backward(model, loss)
                return loss

            loss = optimizer.step(closure) if wrapped else closure()
            if not wrapped:
                optimizer.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                break
            tick(losses[-1])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if not wrapped and hasattr(optimizer, "eval"):
        optimizer.eval()
        renew_statistics(job, model)
    final = drawn.evaluate(model) if math.isfinite(losses[-1]) else math.nan
    metrics = getattr(optimizer, "metrics", {})
    history = getattr(optimizer, "trace", None)
    return {
        **job._asdict(),
        "family": drawn.family, "optimizer": drawn.rule_name, "lr": lr,
        "loss": final if math.isfinite(final) else None, "start": start, "updates": len(losses),
        "train": [round(sum(part) / len(part), 5) for part in tenths(losses)],
        "overhead": metrics.get("overhead", 0.0), "scale": metrics.get("scale"), "phase": metrics.get("phase"),
        "seconds": round(wall, 4), "cpu_seconds": round(cpu, 4),
        "warnings": sorted({str(w.message)[:120] for w in said if str(w.message).startswith("warmctl")}),
        "code": code(job), "torch": torch.__version__,
        **({} if history is None else {"trace": history}),
    }  # fmt: skip


def tenths(losses: Sequence[float]) -> list[list[float]]:
    """The training losses in ten parts; a run that ended early leaves the last ones out."""
    size = max(1, len(losses) // 10)
    parts = [[x for x in losses[i : i + size] if math.isfinite(x)] for i in range(0, len(losses), size)]
    return [part for part in parts if part][:10]


def renew_statistics(job: Job, model: torch.nn.Module) -> None:
    """Batch norm's averages at the point that schedule-free evaluates, as it asks for."""
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        drawn = task(job.seed)
        with torch.no_grad():
            for batch in islice(drawn.batches(job.run), STATISTICS_BATCHES):
                drawn.loss(model, batch)


def code(job: Job) -> str:
    """Which code a row belongs to: the task as drawn, and for what is no peer's also the library."""
    peers = job.policy in LINEAR or job.policy in PEERS
    return signature(job.seed) + ("" if peers else f"+{library()}")


@lru_cache
def signature(seed: int) -> str:
    """Of a task: model, optimizer, choices, and the first loss, which weights and data decide."""
    drawn = task(seed)
    model = drawn.build(0)
    first = drawn.loss(model, next(drawn.batches(0))).item()
    return digest(f"{model} {drawn.optimizer(model, 1.0)} {drawn.choices} {first:.4f}")


def load(*paths: Path) -> dict[Job, Row]:
    """The last whole row of each run; a line that a kill cut short is passed over."""
    return {Job(*(row[name] for name in Job._fields)): row for path in paths for row in read(path)}


def run(jobs: Iterable[Job], path: Path, workers: int = 1, work: Callable[[Job], Row] = measure) -> dict[Job, Row]:
    """Do what is not in the file yet, and return the rows of all jobs."""
    library()  # now, while the files are those that were imported
    jobs, rows = list(jobs), load(path)
    todo = [job for job in jobs if job not in rows or rows[job]["code"] != code(job)]
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are in {path.name} already")
    start = time.perf_counter()
    # Forked, so that an edit of the library in mid-run cannot reach a worker; a chunk is a task's, as its search is.
    with multiprocessing.get_context("fork").Pool(workers, _one_thread) as pool:
        for done, row in enumerate(pool.imap_unordered(work, todo, chunksize=8), 1):
            append(path, row)
            rows[Job(*(row[name] for name in Job._fields))] = row
            if done % 100 == 0 or done == len(todo):
                spent = time.perf_counter() - start
                left = spent / done * (len(todo) - done)
                console.print(f"{done} of {len(todo)} runs, {spent / 60:.1f} min, about {left / 60:.0f} min to go")
    return {job: rows[job] for job in jobs}


def _one_thread() -> None:
    torch.set_num_threads(1)
