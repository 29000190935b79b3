"""The command: run what is missing, report what is there."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import torch
import typer

from benchmarks.harness.results import Quick, Report, Results, console, table
from benchmarks.harness.rows import Row
from benchmarks.what_is_said_of_warmup.collected import Job, code, collected, complete, kept, wanted
from benchmarks.what_is_said_of_warmup.report import PAGE, draw, lines, renew, span

NAME = "what_is_said_of_warmup"
SEEDS, QUICK_SEEDS = 5, 3


def main(
    quick: Quick = False,
    only_report: Report = False,
    claim: Annotated[list[int] | None, typer.Option(help="Only this number; may be repeated.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Default: five, in --quick three.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
) -> None:
    """What is said of warmup, tried: an effect with its interval and a verdict for each claim."""
    torch.set_num_threads(1)
    if unknown := set(claim or ()) - {each.number for claims in collected().values() for each in claims}:
        raise typer.BadParameter(f"--claim {', '.join(map(str, unknown))}: there is no such claim")
    todo = wanted(claim or (), seeds or (QUICK_SEEDS if quick else SEEDS), quick)
    rows = kept(todo) if only_report else complete(todo, workers)
    if missing := len(todo) - len(rows):
        console.print(f"{missing} of {len(todo)} trials are still to be run")
    if any(row["code"] != code(job.module) for job, row in rows.items()):
        console.print("some rows are of other code: run without --report to renew them")
    found = lines(rows)
    show(found, rows)
    if claim or seeds or not found:
        return  # the files are of all claims and of the seeds that are stated
    results = Results(NAME, {"quick": quick}, only_report=only_report)
    results.finish({"lines": found, "verdicts": Counter(line["verdict"] for line in found)})
    draw(found, results.path.with_suffix(".png"))
    console.print(f"summary and figure: {results.path.with_suffix('')}.*")
    if not quick:
        renew(PAGE, found)
        console.print(f"table: {PAGE}")


def show(found: list[Row], rows: dict[Job, Row]) -> None:
    shown = [{**line, "mean [95 %]": span(line)} for line in found]
    columns = {"claim": "{}", "title": "{}", "unit": "{}", "mean [95 %]": "{}", "margin": "{:g}", "verdict": "{}"}
    table("What is said of warmup: effects, mean over seeds", shown, columns)
    seconds = Counter[int]()
    for job, row in rows.items():
        seconds[job.claim] += row["seconds"]
    console.print("CPU seconds: " + ", ".join(f"{number}: {spent:.0f}" for number, spent in sorted(seconds.items())))


if __name__ == "__main__":
    typer.run(main)
