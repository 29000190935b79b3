"""Is a diagnosis right? What it advises is tried: a lower rate, a longer and a shorter warmup.

    python -m benchmarks.diagnoses_hold            tasks 0–17, where thresholds were chosen, and 100–117; resumes
    python -m benchmarks.diagnoses_hold --quick    three tasks
    python -m benchmarks.diagnoses_hold --report   the table from the rows there are

Each task is trained at four peak rates, from a third of its best constant one to ten times it, with six linear warmups
of 0 to 70 % of 400 steps. The diagnosis sees loss, rate and gradient norm of one run; the others say what would have
become of its advice. A row keeps the verdict, not the log: rows of other rules are trained again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import typer
from torch.optim.lr_scheduler import LambdaLR

import warmctl
from benchmarks.harness.results import RESULTS, Quick, Report, console, table
from benchmarks.harness.rows import Row, append, read
from benchmarks.harness.source import bare, digest
from benchmarks.tasks.policies import linear
from benchmarks.tasks.tasks import task
from warmctl.diagnosis import diagnose

WARMUPS, RATES, STEPS = (0.0, 0.01, 0.03, 0.1, 0.3, 0.7), (2, 3, 4, 5), 400
SETS = {"chosen on": range(18), "checked on": range(100, 118)}
BETTER, NO_WORSE, FLOOR = 0.05, 0.03, 0.02
"""In log loss over that of the start, plus the floor."""


class Job(NamedTuple):
    seed: int
    rate: int
    warmup: float


def log_of(job: Job) -> tuple[list[Row], float, float]:
    """(rows as a logger would have them, held-out loss at the start, and at the end)."""
    drawn = task(job.seed)
    lr, warmup = drawn.rates()[job.rate], round(job.warmup * STEPS)
    model = drawn.build(0)
    start = drawn.evaluate(model)
    optimizer = drawn.optimizer(model, lr)
    scheduler = LambdaLR(optimizer, lambda step: linear(step, STEPS, warmup))
    rows: list[Row] = []
    for step, batch in enumerate(islice(drawn.batches(0), STEPS), start=1):
        optimizer.zero_grad()
        loss = drawn.loss(model, batch)
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
        rows.append({"step": step, "loss": loss.item(), "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm})
        if not math.isfinite(rows[-1]["loss"]):
            return rows, start, math.nan
        optimizer.step()
        scheduler.step()
    return rows, start, drawn.evaluate(model)


def judged(job: Job, rows: list[Row], start: float, final: float) -> Row:
    """What is kept of a run."""
    drawn = task(job.seed)
    found = diagnose(rows) if len(rows) >= 8 else None
    without = diagnose([{**row, "grad_norm": None} for row in rows]) if found else None
    losses = [min(level(row["loss"], start), 1.0) for row in rows] + [1.0] * (STEPS - len(rows))
    return {
        **job._asdict(), "family": drawn.family, "optimizer": drawn.rule_name, "start": start,
        "final": final if math.isfinite(final) else None, "mean": sum(losses) / STEPS,
        "verdict": found.verdict if found else "lost", "lower": "Lower `lr`" in found.advice if found else True,
        "verdict_without_norm": without.verdict if without else "lost", "code": code(),
    }  # fmt: skip


def level(loss: float | None, start: float) -> float:
    return math.log(max(loss, 0.0) / start + FLOOR) if loss is not None and math.isfinite(loss) else math.inf


@lru_cache
def code() -> str:
    """Of the rules."""
    folder = Path(warmctl.__file__).parent / "diagnosis"
    return digest("".join(bare(file.read_text()) for file in sorted(folder.glob("*.py"))))


class Tried(NamedTuple):
    """A run, and by how much the others of its task end lower."""

    row: Row
    longer: float
    lower: float
    shorter: float
    higher: float
    sooner: float


def tried(rows: list[Row]) -> Iterator[Tried]:
    for row in rows:
        others = [other for other in rows if other["seed"] == row["seed"]]
        same = [other for other in others if other["rate"] == row["rate"]]
        here = min(level(row["final"], row["start"]), 1.0)

        def gain(those: list[Row], here: float = here) -> float:
            return here - min((min(level(other["final"], other["start"]), 1.0) for other in those), default=math.inf)

        shorter = [other for other in same if other["warmup"] <= row["warmup"] / 2 and other is not row]
        good = [o for o in shorter if min(level(o["final"], o["start"]), 1.0) < here + NO_WORSE]
        yield Tried(
            row,
            gain([other for other in same if other["warmup"] > row["warmup"]]),
            gain([o for o in others if row["rate"] - 2 <= o["rate"] < row["rate"] and o["warmup"] >= row["warmup"]]),
            gain([other for other in same if other["warmup"] < row["warmup"]]),
            gain([other for other in others if other["rate"] == row["rate"] + 1]),
            max((row["mean"] - other["mean"] for other in good), default=-math.inf),
        )


def line(name: str, verdict: str, runs: list[Tried]) -> Row:
    """How often each change ends lower, or a shorter warmup no worse, among the runs of a verdict."""
    count = max(1, len(runs))

    def share(hits: list[bool]) -> float:
        return sum(hits) / count

    return {
        "tasks": name, "verdict": verdict, "runs": len(runs), "of tasks": len({run.row["seed"] for run in runs}),
        "lower rate": share([run.lower > BETTER for run in runs]),
        "longer warmup": share([run.longer > BETTER for run in runs]),
        "shorter no worse": share([run.shorter > -NO_WORSE for run in runs]),
        "and sooner": share([run.sooner > BETTER for run in runs]),
        "no warmup better by .1": share([max(run.longer, run.shorter) < 0.1 for run in runs]),
    }  # fmt: skip


def lines(name: str, rows: list[Row]) -> Iterator[Row]:
    runs = list(tried(rows))
    kinds = {
        "lost, told to lower": [r for r in runs if r.row["verdict"] == "lost" and r.row["lower"]],
        "lost, not told": [r for r in runs if r.row["verdict"] == "lost" and not r.row["lower"]],
        **{v: [r for r in runs if r.row["verdict"] == v] for v in ("under-warmed", "over-warmed", "well warmed")},
    }
    yield from (line(name, verdict, found) for verdict, found in kinds.items())


def main(quick: Quick = False, report: Report = False) -> None:
    torch.set_num_threads(1)
    path = RESULTS / f"diagnoses_hold{'-quick' if quick else ''}.jsonl"
    rows = {Job(row["seed"], row["rate"], row["warmup"]): row for row in read(path)}
    sets = {"quick": range(0, 9, 3)} if quick else SETS
    shown: list[Row] = []
    for name, seeds in sets.items():
        jobs = [Job(seed, rate, warmup) for seed in seeds for rate in RATES for warmup in WARMUPS]
        for job in jobs:
            if not report and (job not in rows or rows[job]["code"] != code()):
                rows[job] = judged(job, *log_of(job))
                append(path, rows[job])
        shown += lines(name, [rows[job] for job in jobs if job in rows])
    if any(row["code"] != code() for row in rows.values()):
        console.print("some rows are of other rules: run without --report")
    shares = ("lower rate", "longer warmup", "shorter no worse", "and sooner", "no warmup better by .1")
    columns = {"tasks": "{}", "verdict": "{}", "runs": "{:d}", "of tasks": "{:d}", **dict.fromkeys(shares, "{:.2f}")}
    table("Share of the runs of a verdict in which this change ends lower", shown, columns)


if __name__ == "__main__":
    typer.run(main)
